package image

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/test/imagetest"
)

// A liar is a registry that has one image, and lies about it if told to.
type liar struct {
	*httptest.Server
	paths map[string]served
	lie   func(path string, s served) served
	deny  func(w http.ResponseWriter, r *http.Request) bool // has answered by itself

	mu   sync.Mutex
	auth []string // what each request had of credentials, "" included
}

type served struct {
	kind string
	body []byte
}

func newLiar(t *testing.T, img v1.Image) *liar {
	t.Helper()
	l := &liar{paths: map[string]served{}}
	put := func(what, digest string, kind types.MediaType, body []byte) {
		l.paths["/v2/app/"+what+"/"+digest] = served{string(kind), body}
	}
	raw, kind := must(img.RawManifest())(t), must(img.MediaType())(t)
	put("manifests", "1", kind, raw)
	put("manifests", imagetest.Digest(t, img), kind, raw)
	put("blobs", must(img.ConfigName())(t).String(), "", must(img.RawConfigFile())(t))
	for _, layer := range must(img.Layers())(t) {
		put("blobs", must(layer.Digest())(t).String(), "", must(io.ReadAll(must(layer.Compressed())(t)))(t))
	}
	l.Server = httptest.NewServer(l)
	t.Cleanup(l.Close)
	return l
}

func (l *liar) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	l.mu.Lock()
	l.auth = append(l.auth, r.Header.Get("Authorization"))
	lie := l.lie
	l.mu.Unlock()
	if l.deny != nil && l.deny(w, r) || r.URL.Path == "/v2/" {
		return
	}
	s, ok := l.paths[r.URL.Path]
	if !ok {
		http.NotFound(w, r)
		return
	}
	if lie != nil {
		s = lie(r.URL.Path, s)
	}
	if s.kind != "" {
		w.Header().Set("Content-Type", s.kind)
	}
	_, _ = w.Write(s.body)
}

// lies changes what is answered from now on.
func (l *liar) lies(lie func(path string, s served) served) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lie = lie
}

func (l *liar) host() string { return strings.TrimPrefix(l.URL, "http://") }

// saw says whether some request had credentials.
func (l *liar) saw() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.auth, "") != ""
}

// edited is a manifest with a change.
func edited(body []byte, change func(m *v1.Manifest)) []byte {
	var m v1.Manifest
	_ = json.Unmarshal(body, &m) // it is one
	change(&m)
	b, _ := json.Marshal(m)
	return b
}

// TestRegistryThatLies: whatever of an image is not what its digest says is
// refused, and leaves nothing.
func TestRegistryThatLies(t *testing.T) {
	t.Parallel()
	img := small(t, "content")
	digest := imagetest.Digest(t, img)
	onManifest := func(change func(m *v1.Manifest)) func(string, served) served {
		return func(path string, s served) served {
			if strings.Contains(path, "/manifests/") {
				s.body = edited(s.body, change)
			}
			return s
		}
	}
	spoil := func(part string) func(string, served) served {
		return func(path string, s served) served {
			if strings.Contains(path, part) {
				s.body = append([]byte{}, s.body...)
				s.body[len(s.body)/2] ^= 1
			}
			return s
		}
	}
	layers := must(img.Layers())(t)
	for _, c := range []struct {
		what, name, reason string
		lie                func(path string, s served) served
	}{
		{"another manifest for a digest", "@" + digest, "digest", onManifest(func(m *v1.Manifest) { m.SchemaVersion = 3 })},
		{"another configuration", ":1", "verifying", spoil("/blobs/" + must(img.ConfigName())(t).String())},
		{"another layer", ":1", "", spoil("/blobs/" + must(layers[1].Digest())(t).String())},
		{"a layer that is shorter than it says", ":1", "bytes and not", onManifest(func(m *v1.Manifest) { m.Layers[0].Size++ })},
		{"a layer that is longer than it says", ":1", "more than", onManifest(func(m *v1.Manifest) { m.Layers[0].Size-- })},
		{"a negative size", ":1", "malformed", onManifest(func(m *v1.Manifest) { m.Layers[0].Size = -1 })},
		{"a configuration that is larger than any", ":1", "at most", onManifest(func(m *v1.Manifest) { m.Config.Size = 1 << 40 })},
		{"layers in another order", ":1", "layer holds", onManifest(func(m *v1.Manifest) { m.Layers[0], m.Layers[1] = m.Layers[1], m.Layers[0] })},
		{"fewer layers than diff ids", ":1", "1 layers and its configuration 2", onManifest(func(m *v1.Manifest) { m.Layers = m.Layers[:1] })},
		{"no layers", ":1", "0 layers", onManifest(func(m *v1.Manifest) { m.Layers = nil })},
		{"a layer from somewhere else", ":1", "is of type", onManifest(func(m *v1.Manifest) { m.Layers[0].MediaType = types.DockerForeignLayer })},
		{"a manifest of a type that is none", ":1", "given as", func(path string, s served) served {
			if strings.Contains(path, "/manifests/") {
				s.kind = "text/html"
			}
			return s
		}},
		{"a manifest that is an index too", ":1", "neither", func(path string, s served) served {
			if strings.Contains(path, "/manifests/") {
				s.body = []byte(strings.Replace(string(s.body), "{", `{"manifests":[],`, 1))
			}
			return s
		}},
		{"a manifest without an end", ":1", "longer than", func(path string, s served) served {
			if strings.Contains(path, "/manifests/") {
				s.body = append(s.body, make([]byte, 5<<20)...)
			}
			return s
		}},
	} {
		l := newLiar(t, img)
		s := open(t, func(cfg *Config) { cfg.From = []string{l.host() + "/**"} })
		l.lies(c.lie)
		_, err := s.get(t, l.host()+"/app"+c.name)
		refused(t, c.what, err, c.reason)
		s.cleanOfRecords(t, c.what)
		l.lies(nil)
		if got, err := s.get(t, l.host()+"/app"+c.name); err != nil || got.Digest != digest {
			t.Errorf("%s: without the lie: got %+v, %v, want %s", c.what, got, err, digest)
		}
	}
}

// cleanOfRecords wants no image, and nothing half done. A layer that was good
// may stay.
func (s *Store) cleanOfRecords(t *testing.T, what string) {
	t.Helper()
	for _, dir := range []string{"images", "names", "work"} {
		entries, err := os.ReadDir(s.path(dir))
		if err != nil || len(entries) > 0 {
			t.Errorf("%s: left in %s: %v, %v", what, dir, entries, err)
		}
	}
}

// TestIndexes: an index in an index ends, and one that contains itself, which
// only a lie can, is refused.
func TestIndexes(t *testing.T) {
	t.Parallel()
	img := small(t, "x")
	nest := func(n int) v1.ImageIndex {
		index := mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: img})
		for range n {
			index = mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: index})
		}
		return index
	}
	r := imagetest.StartRegistry(t)
	r.Push(t, "app:2", nest(1))
	r.Push(t, "app:9", nest(8))
	s := open(t, func(c *Config) { c.From, c.CAFile = []string{r.Host + "/*"}, r.CAFile })
	as := func(name string) error {
		_, err := s.Pull(bounded(t), sandbox.Pull{Image: r.Host + "/" + name, User: r.User, Password: creds.NewSecret(r.Password)})
		return err
	}
	if err := as("app:2"); err != nil {
		t.Error(err)
	}
	refused(t, "nine deep", as("app:9"), "index in index")

	dir := imagetest.Layout(t, img)
	hex := strings.Repeat("ab", 32)
	index := `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{"mediaType":"application/vnd.oci.image.index.v1+json","digest":"sha256:` + hex + `","size":0}]}`
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "index.json"), []byte(index), 0o600),
		os.WriteFile(filepath.Join(dir, "blobs", "sha256", hex), []byte(index), 0o600)); err != nil {
		t.Fatal(err)
	}
	s = open(t, func(c *Config) { c.Sources = map[string]string{"app:1": dir} })
	_, err := s.get(t, "app:1")
	refused(t, "an index that contains itself", err, "its digest is")
}

// TestCredentials: what an image is pulled with reaches its registry and nobody
// whom that redirects to, nor a token server that no operator named.
func TestCredentials(t *testing.T) {
	t.Parallel()
	img := small(t, "x")
	secret := func(host string) sandbox.Pull {
		return sandbox.Pull{Image: host + "/app:1", User: "me", Password: creds.NewSecret("hunter22")}
	}
	basic := func(w http.ResponseWriter, r *http.Request) bool {
		_, password, _ := r.BasicAuth()
		if password == "hunter22" {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	}

	elsewhere, l := newLiar(t, img), newLiar(t, img)
	l.deny = func(w http.ResponseWriter, r *http.Request) bool {
		if basic(w, r) {
			return true
		}
		if strings.Contains(r.URL.Path, "/blobs/") {
			http.Redirect(w, r, elsewhere.URL+r.URL.Path, http.StatusTemporaryRedirect)
			return true
		}
		return false
	}
	s := open(t, func(c *Config) { c.From = []string{l.host() + "/*"} })
	if _, err := s.Pull(bounded(t), secret(l.host())); err != nil {
		t.Errorf("blobs that lie elsewhere: %v", err)
	}
	if !l.saw() || elsewhere.saw() || len(elsewhere.auth) == 0 {
		t.Errorf("credentials: the registry saw them: %v, want true; where it redirected to: %v of %d requests, want none of some",
			l.saw(), elsewhere.saw(), len(elsewhere.auth))
	}

	// The same with tokens. A name of its own, as of another machine.
	tokens := newLiar(t, img)
	tokens.deny = func(w http.ResponseWriter, _ *http.Request) bool {
		_, _ = io.WriteString(w, `{"token": "the token"}`)
		return true
	}
	l.deny = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Authorization") == "Bearer the token" {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Bearer realm="`+strings.Replace(tokens.URL, "127.0.0.1", "localhost", 1)+`/token",service="x"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	}
	s = open(t, func(c *Config) { c.From = []string{l.host() + "/*"} })
	_, err := s.Pull(bounded(t), secret(l.host()))
	if err == nil || !strings.Contains(err.Error(), "images.token_servers") || tokens.saw() || strings.Contains(err.Error(), "hunter22") {
		t.Errorf("a token server that nobody named: got %v, and it saw credentials: %v", err, tokens.saw())
	}
	s.cfg.TokenServers = []string{"localhost:" + must(url.Parse(tokens.URL))(t).Port()}
	if _, err := s.Pull(bounded(t), secret(l.host())); err != nil || !tokens.saw() {
		t.Errorf("a token server that is named: got %v, and it saw credentials: %v", err, tokens.saw())
	}
}

// TestGuard: what a registry cannot make the agent do.
func TestGuard(t *testing.T) {
	t.Parallel()
	g := &guard{host: "registry.example", trusted: []string{"registry.example"}, insecure: []string{"lab.example:5000"}, named: true}
	for _, c := range []struct{ url, auth, reason string }{
		{"http://registry.example/v2/", "", "plain HTTP"},
		{"http://10.0.0.7:5000/v2/", "", "plain HTTP"},
		{"https://evil.example/token", "Basic eDp5", "images.token_servers"},
		{"https://registry.example.evil.example/v2/", "Bearer x", "images.token_servers"},
		{"https://registry.example:444/v2/", "Bearer x", "images.token_servers"},
	} {
		r := must(http.NewRequestWithContext(bounded(t), http.MethodGet, c.url, nil))(t)
		if c.auth != "" {
			r.Header.Set("Authorization", c.auth)
		}
		_, err := g.RoundTrip(r)
		refused(t, c.url, err, c.reason)
	}
	for address, refused := range map[string]bool{
		"169.254.169.254:80": true, "[fe80::1]:443": true, "127.0.0.1:443": true, "[::ffff:127.0.0.1]:443": true, "[::1]:443": true,
		"10.0.0.7:443": false, "203.0.113.9:443": false,
	} {
		if err := g.dial("tcp", address, nil); (err != nil) != refused {
			t.Errorf("dial %s: got %v, want refused: %v", address, err, refused)
		}
	}
	for _, host := range []string{"127.0.0.1:5000", "localhost", "[::1]:5000"} {
		if err := (&guard{host: host}).dial("tcp", "127.0.0.1:5000", nil); err != nil {
			t.Errorf("a registry on loopback, %s: %v", host, err)
		}
	}
}
