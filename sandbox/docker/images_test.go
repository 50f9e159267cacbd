package docker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/docker/docker/api/types/image"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/engine"
	"github.com/mayfly-ci/mayfly/sandbox/engine/enginetest"
)

func digestNumber(n int) string { return fmt.Sprintf("sha256:%064x", n) }

// An image is what its name says, and for this machine, or is refused.
func TestDescribe(t *testing.T) {
	t.Parallel()
	good := func() (found image.InspectResponse) {
		text := fmt.Sprintf(`{"Id": %q, "Os": "linux", "Architecture": %q, "RepoDigests": ["debian@%s", "other@%s"], "Config": {"Env": ["A=b"]}}`,
			digestNumber(1), runtime.GOARCH, digestNumber(2), digestNumber(3))
		if err := json.Unmarshal([]byte(text), &found); err != nil {
			t.Fatal(err)
		}
		return found
	}
	for _, c := range []struct {
		name   string
		change func(*image.InspectResponse)
		digest string // "" is refused
	}{
		{"debian", func(*image.InspectResponse) {}, digestNumber(2)},
		{"debian@" + digestNumber(2), func(*image.InspectResponse) {}, digestNumber(2)},
		{"debian@" + digestNumber(3), func(*image.InspectResponse) {}, ""}, // of another repository
		{"loaded", func(*image.InspectResponse) {}, digestNumber(1)},
		{digestNumber(1), func(*image.InspectResponse) {}, digestNumber(1)},
		{digestNumber(4), func(*image.InspectResponse) {}, ""},
		{"debian", func(i *image.InspectResponse) { i.ID = "debian:latest" }, ""},
		{"debian", func(i *image.InspectResponse) { i.ID = "" }, ""},
		{"debian", func(i *image.InspectResponse) { i.Architecture = "s390x" }, ""},
		{"debian", func(i *image.InspectResponse) { i.Os = "windows" }, ""},
		{"debian", func(i *image.InspectResponse) { i.RepoDigests = []string{"debian@latest", "@", "", digestNumber(5)} }, digestNumber(1)},
		{"debian", func(i *image.InspectResponse) { i.Config.Env = []string{"A=b\x00C=d"} }, ""},
		{"debian", func(i *image.InspectResponse) { i.Config = nil }, digestNumber(2)},
	} {
		n, err := engine.ParseName(c.name)
		if err != nil {
			t.Fatal(err)
		}
		found := good()
		c.change(&found)
		got, err := describe(found, n)
		if c.digest == "" && !errors.Is(err, sandbox.ErrImage) || c.digest != "" && (err != nil || got.Digest != c.digest || got.Ref != digestNumber(1)) {
			t.Errorf("%s of %+v: got %+v, %v, want %q", c.name, found, got, err, c.digest)
		}
	}
}

// What a daemon says about a pull is not believed before it makes sense.
func TestFollow(t *testing.T) {
	t.Parallel()
	digest := `{"status":"Digest: ` + digestNumber(1) + `"}` + "\r\n"
	layers := `{"status":"Downloading","progressDetail":{"current":10,"total":100},"id":"a"}
{"status":"Downloading","progressDetail":{"current":100,"total":100},"id":"a"}
{"status":"Download complete","id":"a"}
{"status":"Downloading","progressDetail":{"current":7},"id":"b"}
{"status":"Already exists","id":"c"}
{"status":"Extracting","progressDetail":{"current":1000,"total":1000},"id":"a"}
`
	p, err := follow(strings.NewReader(layers + digest))
	if err != nil || p.size() != 107 || p.digest != digestNumber(1) || p.silent {
		t.Errorf("got %+v, %v, want 107 bytes", p, err)
	}
	if p, err := follow(strings.NewReader(`{"status":"Download complete","id":"a"}` + digest)); err == nil {
		t.Errorf("two objects in a line: got %+v, want an error", p)
	}
	if p, err := follow(strings.NewReader(`{"status":"Download complete","id":"a"}` + "\n" + digest)); err != nil || !p.silent {
		t.Errorf("a layer without a size: got %+v, %v", p, err)
	}
	many := strings.Repeat("x", maxLayers*2)
	var b strings.Builder
	for i := range many {
		fmt.Fprintf(&b, `{"status":"Downloading","progressDetail":{"current":1},"id":"%d"}`+"\n", i)
	}
	if p, err := follow(strings.NewReader(b.String() + digest)); err != nil || len(p.layers) > maxLayers {
		t.Errorf("many layers: got %d, %v, want at most %d", len(p.layers), err, maxLayers)
	}
	for _, c := range []struct{ text, want string }{
		{"", "without a digest"},
		{`{"status":"Digest: sha256:1"}`, "without a digest"},
		{`garbage`, "answer"},
		{`{"status":5}`, "answer"},
		{digest + `{"error":"no","errorDetail":{"message":"no space left"}}`, "no space left"},
		{digest + `{"error":"old words"}`, "old words"},
		{`{"status":"` + strings.Repeat("a", maxProgress) + `"}`, "more than"},
	} {
		if p, err := follow(strings.NewReader(c.text)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%.60q: got %+v, %v, want %q", c.text, p, err, c.want)
		}
	}
	if _, err := follow(strings.NewReader(`{"errorDetail":{"message":"context canceled"}}`)); !errors.Is(err, errCut) {
		t.Errorf("a daemon that ends: got %v, want another try", err)
	}
}

// A liar is a daemon that answers as it is told to.
type liar struct {
	mu    sync.Mutex
	known bool // inspect finds the image
	found image.InspectResponse
	pull  func(http.ResponseWriter, *http.Request)
	auth  string
}

func (l *liar) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("API-Version", "1.41")
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case strings.HasSuffix(r.URL.Path, "/_ping"):
	case strings.HasSuffix(r.URL.Path, "/images/create"):
		l.auth, l.known = r.Header.Get("X-Registry-Auth"), true
		l.pull(w, r)
	case !l.known:
		w.WriteHeader(http.StatusNotFound)
	default:
		_ = json.NewEncoder(w).Encode(l.found) // the client may be gone
	}
}

func TestLyingDaemon(t *testing.T) {
	needRoot(t)
	const user, password = "robot", "correct-horse-battery"
	says := func(lines ...string) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, strings.Join(lines, "\n")) }
	}
	digest := `{"status":"Digest: ` + digestNumber(2) + `"}`
	honest := image.InspectResponse{ID: digestNumber(1), RepoDigests: []string{"a.example/b@" + digestNumber(2)}}
	for _, c := range []struct {
		name, image string
		found       image.InspectResponse
		pull        func(http.ResponseWriter, *http.Request)
		want        string // "" is success
	}{
		{"honest", "a.example/b:1", honest, says(digest), ""},
		{"another digest", "a.example/b@" + digestNumber(3), honest, says(digest), "instead"},
		{"another image", "a.example/b:1", image.InspectResponse{ID: digestNumber(1)}, says(digest), "under that digest"},
		{"no id", "a.example/b:1", image.InspectResponse{}, says(digest), "no id"},
		{"no digest", "a.example/b:1", honest, says(`{"status":"done"}`), "without a digest"},
		{"garbage", "a.example/b:1", honest, says("<html>"), "answer"},
		{"repeats what it was given", "a.example/b:1", honest, func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusInternalServerError)
			fmt.Fprintf(w, `{"message":"no: %s %s"}`, password, r.Header.Get("X-Registry-Auth"))
		}, "***"},
		{"says much", "a.example/b:1", honest, says(`{"error":"` + strings.Repeat("x", 100_000) + `"}`), "…"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := &liar{found: c.found, pull: c.pull}
			cfg, err := testConfig(t.TempDir(), "unix://"+serveUnix(t, l))
			if err != nil {
				t.Fatal(err)
			}
			cfg.Images = engine.Images{From: []string{"a.example/b"}}
			got, err := newRuntime(t, cfg).Pull(enginetest.Bounded(t), sandbox.Pull{Image: c.image, User: user, Password: creds.NewSecret(password)})
			if c.want == "" && (err != nil || got.Ref != digestNumber(1)) || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("got %+v, %.500v, want %q", got, err, c.want)
			}
			if err != nil && (strings.Contains(err.Error(), password) || strings.Contains(err.Error(), l.auth) || len(err.Error()) > 2*maxSaid) {
				t.Errorf("got %.3000v, want a short error without the password", err)
			}
			if l.auth == "" {
				t.Error("the daemon got no credentials")
			}
		})
	}
}

// serveUnix serves a socket until the end of the test, and returns its path.
func serveUnix(t *testing.T, h http.Handler) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := (&net.ListenConfig{}).Listen(context.WithoutCancel(t.Context()), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: h, ReadHeaderTimeout: time.Minute}
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(l) }) // until it is closed
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
		serving.Wait()
	})
	return path
}
