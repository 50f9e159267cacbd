package docker

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/docker/docker/api/types/image"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/engine"
	"github.com/mayfly-ci/mayfly/sandbox/engine/enginetest"
	"github.com/mayfly-ci/mayfly/test/dockertest"
)

// TestPull: what may be pulled, and what it is then, on each engine.
func TestPull(t *testing.T) { each(t, pulls) }

func pulls(t *testing.T, e dockertest.Engine) {
	d := e.Start(t, "--debug")
	base, err := d.Engine().ImageInspect(t.Context(), dockertest.Busybox)
	if err != nil {
		t.Fatal(err)
	}
	p := &pulling{d, d.StartRegistry(t), base.ID}
	for _, test := range []struct {
		name string
		run  func(*testing.T, *pulling)
	}{
		{"tag", pullTag},
		{"digest", pullDigest},
		{"policy", pullPolicy},
		{"credentials", pullCredentials},
		{"corrupt", pullCorrupt},
		{"loaded", pullLoaded},
		{"registry away", pullAway},
		{"daemon killed", pullKilled},
	} {
		t.Run(test.name, func(t *testing.T) {
			p.registry.Front(nil)
			test.run(t, p)
		})
	}
}

// pulling is a daemon and a registry.
type pulling struct {
	*dockertest.Daemon
	registry *dockertest.Registry
	base     string // id of an image that is there
}

// runtime is one that may pull what the registry has below team/.
func (p *pulling) runtime(t *testing.T, images engine.Images) *Runtime {
	t.Helper()
	cfg := config(t, p.Daemon)
	cfg.Image = p.base
	if images.From == nil {
		images.From = []string{p.registry.Host + "/team/**"}
	}
	cfg.Images = images
	return newRuntime(t, cfg)
}

// build makes an image that no other is like, and that asks for something.
func (p *pulling) build(t *testing.T, ref string) {
	t.Helper()
	var out bytes.Buffer
	busybox, err := dockertest.BusyboxRoot()
	if err == nil {
		_, err = io.Copy(&out, busybox)
	}
	if err != nil {
		t.Fatal(err)
	}
	unique := []byte(rand.Text())
	out.Truncate(out.Len() - 1024) // the end of the archive
	w := tar.NewWriter(&out)
	err = w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "unique", Mode: 0o644, Size: int64(len(unique))})
	_, writeErr := w.Write(unique)
	made, importErr := p.Engine().ImageImport(t.Context(), image.ImportSource{Source: &out, SourceName: "-"}, ref, image.ImportOptions{
		Changes: []string{"ENV A=b PATH=/own:/bin", "USER nobody", "WORKDIR /srv", `ENTRYPOINT ["/bin/env"]`, `CMD ["true"]`},
	})
	if err := errors.Join(err, writeErr, w.Close(), importErr); err != nil {
		t.Fatal(err)
	}
	said, err := io.ReadAll(made)
	if err := errors.Join(err, made.Close()); err != nil || bytes.Contains(said, []byte("error")) {
		t.Fatalf("import: %v: %s", err, said)
	}
}

// pushed is an image that the registry has and the daemon has not.
func (p *pulling) pushed(t *testing.T, as string) (name, digest string) {
	t.Helper()
	const ref = "mayfly-test/pushed:1"
	p.build(t, ref)
	name, digest, err := p.registry.Push(enginetest.Bounded(t), ref, as)
	if err != nil {
		t.Fatal(err)
	}
	p.forget(t, ref)
	if _, err := p.Engine().ImageInspect(t.Context(), name); err == nil {
		t.Fatalf("%s is on the machine before it is pulled", name)
	}
	return name, digest
}

func (p *pulling) forget(t *testing.T, ref string) {
	t.Helper()
	if _, err := p.Engine().ImageRemove(enginetest.Bounded(t), ref, image.RemoveOptions{Force: true, PruneChildren: true}); err != nil {
		t.Error(err)
	}
}

// pull is a Pull that must succeed; the image goes with the test.
func (p *pulling) pull(t *testing.T, r *Runtime, want sandbox.Pull) sandbox.Image {
	t.Helper()
	got, err := r.Pull(enginetest.Bounded(t), want)
	if err != nil {
		t.Fatalf("pull %s: %v", want.Image, err)
	}
	return got
}

func pullTag(t *testing.T, p *pulling) {
	name, digest := p.pushed(t, "team/app:1")
	r := p.runtime(t, engine.Images{})
	first := p.pull(t, r, sandbox.Pull{Image: name})
	if !engine.IsDigest(first.Ref) || first.Digest != digest || first.Size < 100<<10 || first.Size > 10<<20 {
		t.Errorf("got %+v, want an id, the digest %s and the size of a layer", first, digest)
	}
	if !slices.Equal(first.Env, []string{"A=b", "PATH=/own:/bin"}) || first.User != "nobody" || first.Dir != "/srv" ||
		!slices.Equal(first.Entrypoint, []string{"/bin/env"}) || !slices.Equal(first.Cmd, []string{"true"}) {
		t.Errorf("got %+v, want what the image asks for", first)
	}
	b := enginetest.Create(t, r, "pulled", sandbox.Spec{Image: first.Ref})
	unique, exit := enginetest.Script(t, b, "cat /unique")
	if exit.Code != 0 || unique == "" {
		t.Errorf("in the box: got %q %+v", unique, exit)
	}
	asked := p.registry.Asked()
	if again := p.pull(t, r, sandbox.Pull{Image: name}); again.Ref != first.Ref || again.Digest != digest || again.Size != 0 || p.registry.Asked() != asked {
		t.Errorf("what is there: got %+v after %d requests, want the same and nobody asked", again, p.registry.Asked()-asked)
	}
	// The tag moves on: what was resolved stays what it was.
	const moved = "mayfly-test/moved:1"
	p.build(t, moved)
	if err := p.Engine().ImageTag(t.Context(), first.Ref, "mayfly-test/kept:1"); err != nil {
		t.Fatal(err)
	}
	_, newer, err := p.registry.Push(enginetest.Bounded(t), moved, "team/app:1")
	p.forget(t, moved)
	if err != nil || newer == digest {
		t.Fatalf("push: %s, %v", newer, err)
	}
	always := p.runtime(t, engine.Images{Pull: engine.Always})
	second := p.pull(t, always, sandbox.Pull{Image: name})
	if second.Ref == first.Ref || second.Digest != newer {
		t.Errorf("a tag that moved, pull: always: got %+v, want %s", second, newer)
	}
	if third := p.pull(t, always, sandbox.Pull{Image: name}); third.Ref != second.Ref || third.Digest != newer || third.Size != 0 {
		t.Errorf("a tag that did not move, pull: always: got %+v, want the same and no bytes", third)
	}
	b = enginetest.Create(t, r, "first", sandbox.Spec{Image: first.Ref})
	if out, _ := enginetest.Script(t, b, "cat /unique"); out != unique {
		t.Errorf("the reference of the first pull: got another content")
	}
	p.forget(t, name)
	p.forget(t, "mayfly-test/kept:1")
}

func pullDigest(t *testing.T, p *pulling) {
	name, digest := p.pushed(t, "team/app:2")
	r := p.runtime(t, engine.Images{Pull: engine.Always, DigestOnly: true, From: []string{p.registry.Host + "/team/app@" + digest}})
	repository, _, _ := strings.Cut(name, ":2")
	exact := repository + "@" + digest
	got := p.pull(t, r, sandbox.Pull{Image: repository + ":nonsense@" + digest}) // the tag means nothing
	if got.Digest != digest || got.Size == 0 {
		t.Errorf("by digest: got %+v, want %s", got, digest)
	}
	p.registry.Front(func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
		w.WriteHeader(http.StatusInternalServerError)
	})
	if again := p.pull(t, r, sandbox.Pull{Image: exact}); again.Ref != got.Ref || again.Size != 0 {
		t.Errorf("by digest and there: got %+v, want nobody asked", again)
	}
	if _, err := r.Pull(enginetest.Bounded(t), sandbox.Pull{Image: name}); !errors.Is(err, sandbox.ErrImage) || !strings.Contains(err.Error(), "digest_only") {
		t.Errorf("by tag: got %v, want ErrImage and the key", err)
	}
	byID := p.pull(t, r, sandbox.Pull{Image: got.Ref})
	if byID.Ref != got.Ref {
		t.Errorf("by id: got %+v, want %s", byID, got.Ref)
	}
	p.forget(t, exact)
	p.registry.Front(nil)
	any := p.runtime(t, engine.Images{})
	absent := repository + "@" + digestNumber(1)
	if _, err := any.Pull(enginetest.Bounded(t), sandbox.Pull{Image: absent}); !errors.Is(err, sandbox.ErrImage) {
		t.Errorf("a digest that the registry does not have: got %v, want ErrImage", err)
	}
	// A registry that gives something else under a digest: one that nothing has,
	// since an engine keeps manifests until it cares to collect them, and does not
	// ask for those that it has.
	_, other := p.pushed(t, "team/app:3")
	var lies atomic.Int32
	p.registry.Front(func(w http.ResponseWriter, req *http.Request, next http.Handler) {
		if strings.Contains(req.URL.Path, digestNumber(1)) {
			lies.Add(1)
			req.URL.Path = strings.ReplaceAll(req.URL.Path, digestNumber(1), other)
		}
		next.ServeHTTP(w, req)
	})
	if got, err := any.Pull(enginetest.Bounded(t), sandbox.Pull{Image: absent}); !errors.Is(err, sandbox.ErrImage) || lies.Load() == 0 {
		t.Errorf("another manifest under the digest: got %+v, %v after %d lies, want ErrImage and some", got, err, lies.Load())
	}
	if found, err := p.Engine().ImageInspect(enginetest.Bounded(t), absent); err == nil {
		t.Errorf("another manifest under the digest: %s is there", found.ID)
	}
}

func pullPolicy(t *testing.T, p *pulling) {
	name, _ := p.pushed(t, "other/app:1")
	for _, c := range []struct {
		images engine.Images
		image  string
		why    string
	}{
		{engine.Images{}, name, "images.from"},
		{engine.Images{Pull: engine.Always}, name, "images.from"},
		{engine.Images{Pull: engine.Never, From: []string{"**/app"}}, name, "images.pull"},
		{engine.Images{From: []string{p.registry.Host + "/*"}}, name, "images.from"},
		{engine.Images{From: []string{p.registry.Host + "/other/app:2"}}, name, "images.from"},
		{engine.Images{From: []string{"**/app"}}, "sha256:" + strings.Repeat("0", 64), "not on this machine"},
		{engine.Images{}, "Not A Name", "name"},
		{engine.Images{}, "a@sha512:" + strings.Repeat("0", 128), "sha256"},
	} {
		asked := p.registry.Asked()
		if _, err := p.runtime(t, c.images).Pull(enginetest.Bounded(t), sandbox.Pull{Image: c.image}); !errors.Is(err, sandbox.ErrImage) || !strings.Contains(err.Error(), c.why) {
			t.Errorf("%+v, %s: got %v, want ErrImage with %q", c.images, c.image, err, c.why)
		}
		if n := p.registry.Asked() - asked; n != 0 {
			t.Errorf("%+v, %s: %d requests, want nobody asked", c.images, c.image, n)
		}
	}
	// What is there needs no permission, and "" is the image of the configuration.
	if got := p.pull(t, p.runtime(t, engine.Images{Pull: engine.Never}), sandbox.Pull{}); !engine.IsDigest(got.Ref) {
		t.Errorf("the runtime's own image: got %+v", got)
	}
	if _, err := p.runtime(t, engine.Images{}).Pull(enginetest.Bounded(t), sandbox.Pull{Image: p.registry.Host + "/team/absent:1"}); !errors.Is(err, sandbox.ErrImage) {
		t.Errorf("an image that the registry does not have: got %v, want ErrImage", err)
	}
}

// pullCredentials: a registry that wants a password, hands out layers elsewhere,
// and repeats what it was given.
func pullCredentials(t *testing.T, p *pulling) {
	const user, password, wrong = "robot", "correct-horse-battery-staple", "tr0ub4dor-and-three"
	name, digest := p.pushed(t, "team/private:1")
	var mu sync.Mutex
	var leaked []string
	behind := p.registry
	elsewhere := p.Serve(t, "127.0.0.2:0", http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		mu.Lock()
		if a := req.Header.Get("Authorization"); a != "" {
			leaked = append(leaked, a)
		}
		mu.Unlock()
		req.Header.Set("Authorization", "elsewhere")
		behind.ServeHTTP(w, req)
	}))
	sent := 0
	p.registry.Front(func(w http.ResponseWriter, req *http.Request, next http.Handler) {
		u, pw, ok := req.BasicAuth()
		switch {
		case req.Header.Get("Authorization") == "elsewhere":
			next.ServeHTTP(w, req)
		case !ok || u != user || pw != password:
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			fmt.Fprintf(w, `{"errors":[{"code":"UNAUTHORIZED","message":"not %s with %s"}]}`, u, pw)
		case strings.Contains(req.URL.Path, "/blobs/"):
			mu.Lock()
			sent++
			mu.Unlock()
			http.Redirect(w, req, "http://"+elsewhere+req.URL.Path, http.StatusTemporaryRedirect)
		default:
			next.ServeHTTP(w, req)
		}
	})
	r := p.runtime(t, engine.Images{})
	for _, c := range []sandbox.Pull{
		{Image: name}, {Image: name, User: user, Password: creds.NewSecret(wrong)}, {Image: name, User: user},
	} {
		_, err := r.Pull(enginetest.Bounded(t), c)
		if !errors.Is(err, sandbox.ErrImage) || strings.Contains(err.Error(), wrong) {
			t.Errorf("user %q: got %v, want ErrImage without a password", c.User, err)
		}
	}
	got := p.pull(t, r, sandbox.Pull{Image: name, User: user, Password: creds.NewSecret(password)})
	if got.Digest != digest {
		t.Errorf("got %+v, want %s", got, digest)
	}
	mu.Lock()
	defer mu.Unlock()
	if sent == 0 || len(leaked) > 0 {
		t.Errorf("%d layers are elsewhere, where %q came with the requests, want some and nothing", sent, leaked)
	}
	// Nothing keeps the password: neither the daemon's files, nor its log, which
	// is verbose here, nor the agent's.
	basic := base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
	for _, dir := range []string{p.Dir(), r.cfg.StateDir} {
		err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() || strings.Contains(path, "/snapshots/") || strings.Contains(path, "/overlay2/") {
				return nil // what vanishes meanwhile has nothing
			}
			b, err := os.ReadFile(path)
			if err == nil && (bytes.Contains(b, []byte(password)) || bytes.Contains(b, []byte(basic))) {
				t.Errorf("%s: the password is in it", path)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
	p.registry.Front(nil)
	p.forget(t, name)
}

// pullCorrupt: layers that are not what their digest says.
func pullCorrupt(t *testing.T, p *pulling) {
	name, _ := p.pushed(t, "team/corrupt:1")
	p.registry.Front(func(w http.ResponseWriter, req *http.Request, next http.Handler) {
		if strings.Contains(req.URL.Path, "/blobs/") && req.Method == http.MethodGet {
			w = &flipping{ResponseWriter: w}
		}
		next.ServeHTTP(w, req)
	})
	r := p.runtime(t, engine.Images{})
	if got, err := r.Pull(enginetest.Bounded(t), sandbox.Pull{Image: name}); err == nil {
		t.Errorf("corrupt layers: got %+v, want an error", got)
	}
	if _, err := p.Engine().ImageInspect(t.Context(), name); err == nil {
		t.Error("corrupt layers: the image is there")
	}
}

// flipping changes the last byte of each write.
type flipping struct{ http.ResponseWriter }

func (f *flipping) Write(b []byte) (int, error) {
	b = slices.Clone(b)
	b[len(b)-1] ^= 1
	return f.ResponseWriter.Write(b)
}

// pullLoaded: an image of "docker load" or "docker build" has no digest of a
// registry.
func pullLoaded(t *testing.T, p *pulling) {
	const ref = "mayfly-test/loaded:1"
	p.build(t, ref)
	saved, err := p.Engine().ImageSave(enginetest.Bounded(t), []string{ref})
	if err != nil {
		t.Fatal(err)
	}
	archive, err := io.ReadAll(saved)
	if err := errors.Join(err, saved.Close()); err != nil {
		t.Fatal(err)
	}
	p.forget(t, ref)
	loaded, err := p.Engine().ImageLoad(enginetest.Bounded(t), bytes.NewReader(archive))
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(io.Discard, loaded.Body)
	if err := errors.Join(err, loaded.Body.Close()); err != nil {
		t.Fatal(err)
	}
	r := p.runtime(t, engine.Images{Pull: engine.Always})
	got := p.pull(t, r, sandbox.Pull{Image: ref})
	if !engine.IsDigest(got.Ref) || !engine.IsDigest(got.Digest) || got.Size != 0 || !slices.Contains(got.Env, "A=b") {
		t.Errorf("got %+v, want what was loaded", got)
	}
	b := enginetest.Create(t, r, "loaded", sandbox.Spec{Image: got.Ref})
	if out, exit := enginetest.Script(t, b, "test -s /unique && echo here"); exit.Code != 0 {
		t.Errorf("in the box: got %q %+v", out, exit)
	}
	p.forget(t, ref)
}

func pullAway(t *testing.T, p *pulling) {
	r := p.runtime(t, engine.Images{From: []string{"**/app"}})
	_, err := r.Pull(enginetest.Bounded(t), sandbox.Pull{Image: "127.0.0.1:1/team/app:1"})
	if err == nil || errors.Is(err, sandbox.ErrImage) || !strings.Contains(err.Error(), "refused") {
		t.Errorf("a registry that is away: got %v, want an error that says so, and not ErrImage", err)
	}
	// A registry that hangs, and a job that is cancelled.
	hangs, cancel := context.WithCancel(enginetest.Bounded(t))
	p.registry.Front(func(_ http.ResponseWriter, req *http.Request, _ http.Handler) {
		cancel()
		<-req.Context().Done()
	})
	_, err = r.Pull(hangs, sandbox.Pull{Image: p.registry.Host + "/team/app:1"})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("a pull that is cancelled: got %v, want the cause", err)
	}
}

// pullKilled: the daemon dies in the middle of a pull and comes back.
func pullKilled(t *testing.T, p *pulling) {
	name, digest := p.pushed(t, "team/killed:1")
	asked, back := make(chan struct{}), make(chan struct{})
	var once sync.Once
	p.registry.Front(func(w http.ResponseWriter, req *http.Request, next http.Handler) {
		if strings.Contains(req.URL.Path, "/blobs/") {
			once.Do(func() { close(asked) })
			select {
			case <-back:
			case <-req.Context().Done():
				return
			}
		}
		next.ServeHTTP(w, req)
	})
	r := p.runtime(t, engine.Images{})
	type result struct {
		image sandbox.Image
		err   error
	}
	done := make(chan result, 1)
	go func() {
		got, err := r.Pull(enginetest.Bounded(t), sandbox.Pull{Image: name})
		done <- result{got, err}
	}()
	enginetest.Wait(t, "the pull begins", asked)
	if err := errors.Join(p.Kill(enginetest.Bounded(t)), p.Restart(enginetest.Bounded(t))); err != nil {
		t.Fatal(err)
	}
	close(back)
	if got := enginetest.Wait(t, "the pull ends", done); got.err != nil || got.image.Digest != digest {
		t.Errorf("a pull across a restart: got %+v, %v, want %s", got.image, got.err, digest)
	}
	p.forget(t, name)
}
