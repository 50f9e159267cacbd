package containerd

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/mayfly-ci/mayfly/test/dockertest"
)

// The one account of the registry.
const (
	registryUser     = "robot"
	registryPassword = "registry-pass-1"
)

// A testRegistry listens on loopback, wants a password, and keeps blobs on
// another server, to which it redirects.
type testRegistry struct {
	host string

	mu      sync.Mutex
	asked   int               // requests
	strange []string          // Authorization headers that reached the other server
	greedy  bool              // the other server asks for a password
	instead map[string]string // what a path answers instead
}

func startRegistry(t *testing.T) *testRegistry {
	t.Helper()
	r := &testRegistry{instead: map[string]string{}}
	store := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	blobs := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		r.mu.Lock()
		if a := req.Header.Get("Authorization"); a != "" {
			r.strange = append(r.strange, a)
		}
		greedy := r.greedy
		r.mu.Unlock()
		if greedy {
			w.Header().Set("WWW-Authenticate", `Basic realm="more"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		store.ServeHTTP(w, req)
	}))
	t.Cleanup(blobs.Close)
	// Of another name, so that it is another host.
	elsewhere := strings.Replace(blobs.URL, "127.0.0.1", "localhost", 1)
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		r.mu.Lock()
		r.asked++
		lie, lies := r.instead[req.URL.Path]
		r.mu.Unlock()
		if user, password, _ := req.BasicAuth(); user != registryUser || password != registryPassword {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		switch {
		case lies:
			_, _ = io.WriteString(w, lie) // the client looks at it
		case req.Method == http.MethodGet && strings.Contains(req.URL.Path, "/blobs/"):
			http.Redirect(w, req, elsewhere+req.URL.Path, http.StatusTemporaryRedirect)
		default:
			store.ServeHTTP(w, req)
		}
	}))
	t.Cleanup(front.Close)
	r.host = strings.TrimPrefix(front.URL, "http://")
	return r
}

// requests since the last call.
func (r *testRegistry) requests() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.asked
	r.asked = 0
	return n
}

func (r *testRegistry) setGreedy(yes bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.greedy = yes
}

// lie answers a path with something else from now on.
func (r *testRegistry) lie(path, text string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.instead[path] = text
}

// ownBytes is how much of such an image no other has.
const ownBytes = 500_000

// busybox is an image of Busybox with that architecture, a variable whose value
// is said, and a layer that only images of that value have.
func busybox(t *testing.T, arch, value string) v1.Image {
	t.Helper()
	var own bytes.Buffer
	noise := make([]byte, ownBytes)
	_, err := rand.NewChaCha8(sha256.Sum256([]byte(value))).Read(noise)
	w := tar.NewWriter(&own)
	err = errors.Join(err, w.WriteHeader(&tar.Header{Name: "own", Size: ownBytes, Mode: 0o644, Typeflag: tar.TypeReg}))
	_, writeErr := w.Write(noise)
	if err := errors.Join(err, writeErr, w.Close()); err != nil {
		t.Fatal(err)
	}
	img := withLayer(t, empty.Image, func() (io.ReadCloser, error) { root, err := dockertest.BusyboxRoot(); return io.NopCloser(root), err })
	img = withLayer(t, img, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(own.Bytes())), nil })
	file, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	file = file.DeepCopy()
	file.OS, file.Architecture = "linux", arch
	file.Config = v1.Config{
		Env: []string{"PATH=/bin", "VALUE=" + value}, Entrypoint: []string{"/bin/sh"}, Cmd: []string{"-c", "true"},
		User: "nobody", WorkingDir: "/root",
	}
	if img, err = mutate.ConfigFile(img, file); err != nil {
		t.Fatal(err)
	}
	return img
}

func withLayer(t *testing.T, img v1.Image, open tarball.Opener) v1.Image {
	t.Helper()
	layer, err := tarball.LayerFromOpener(open)
	if err == nil {
		img, err = mutate.AppendLayers(img, layer)
	}
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// push stores an image or an index and returns its whole name.
func (r *testRegistry) push(t *testing.T, repository string, what remote.Taggable) string {
	t.Helper()
	ref, err := name.ParseReference(r.host+"/"+repository, name.Insecure)
	if err == nil {
		err = remote.Push(ref, what, remote.WithAuth(&authn.Basic{Username: registryUser, Password: registryPassword}))
	}
	if err != nil {
		t.Fatal(err)
	}
	r.requests()
	return ref.Name()
}

func digestOf(t *testing.T, what interface{ Digest() (v1.Hash, error) }) string {
	t.Helper()
	d, err := what.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d.String()
}
