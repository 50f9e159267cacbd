package image

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/test/imagetest"
)

func small(t *testing.T, content string) v1.Image {
	t.Helper()
	return imagetest.Of(t, imagetest.Layer(t, imagetest.Dir("d"), imagetest.File("d/f", content)), imagetest.Layer(t, imagetest.File("g", content)))
}

// TestFiles: an image from each kind of file is the same image, by each way to
// name it.
func TestFiles(t *testing.T) {
	t.Parallel()
	img := small(t, "content")
	digest := imagetest.Digest(t, img)
	layout := imagetest.Layout(t, img)
	for _, c := range []struct{ what, path, digest string }{
		{"layout", layout, digest},
		{"archive of a layout", packed(t, layout), digest},
		{"saved", savedArchive(t, img, `"app:1"`), must(img.ConfigName())(t).String()},
	} {
		s := open(t, func(c2 *Config) { c2.Sources = map[string]string{"app:1": c.path} })
		for _, name := range []string{"app:1", "docker.io/library/app:1", "app@" + c.digest} {
			got, err := s.get(t, name)
			if err != nil || got.Digest != c.digest || got.Ref != c.digest {
				t.Errorf("%s, %s: got %+v, %v, want %s", c.what, name, got, err, c.digest)
				continue
			}
			if got.User != "nobody" || got.Dir != "/srv" || len(got.Env) != 2 || got.Entrypoint[0] != "/bin/sh" || got.Cmd[0] != "-l" {
				t.Errorf("%s, %s: got %+v, want what the image asks for", c.what, name, got)
			}
		}
		dirs := s.dirs(t, c.digest)
		b, err := os.ReadFile(filepath.Join(dirs[1], "d", "f"))
		if len(dirs) != 2 || err != nil || string(b) != "content" {
			t.Errorf("%s: got %v, %q, %v, want the lower layer last", c.what, dirs, b, err)
		}
		_, err = s.get(t, "app@sha256:"+strings.Repeat("0", 64))
		refused(t, c.what+": another digest", err, "not this one")
		_, err = s.get(t, "app:2")
		refused(t, c.what+": another tag", err, "images.from")
	}
}

// TestImport: what an operator brings needs no line of the configuration, and
// stays.
func TestImport(t *testing.T) {
	t.Parallel()
	img := small(t, "x")
	s := open(t, func(c *Config) { c.Pull = Never; c.KeepAge = time.Nanosecond })
	_, err := s.Import(bounded(t), imagetest.Layout(t, img), "")
	refused(t, "no name", err, "give it a name")
	got := must(s.Import(bounded(t), savedArchive(t, img, `"registry.example/team/app:1"`), ""))(t)
	if _, err := s.get(t, "registry.example/team/app:1"); err != nil {
		t.Error(err)
	}
	if _, err := s.get(t, "registry.example/team/app@"+got.Digest); err != nil {
		t.Error(err)
	}
	_, err = s.get(t, "registry.example/other/app@"+got.Digest)
	refused(t, "the digest in a repository that nobody vouches for", err, "images.from")
	if gone := must(s.prune(bounded(t), time.Now().Add(48*time.Hour)))(t); len(gone) > 0 {
		t.Errorf("pruned %v, want what was imported kept", gone)
	}
	if err := s.Remove(bounded(t), "registry.example/team/app:1"); err != nil {
		t.Fatal(err)
	}
	if gone := must(s.prune(bounded(t), time.Now().Add(48*time.Hour)))(t); len(gone) != 1 {
		t.Errorf("pruned %v, want the image that was removed", gone)
	}
	s.empty(t)
}

// TestRegistry: from a real registry, over TLS, with a user.
func TestRegistry(t *testing.T) {
	t.Parallel()
	r := imagetest.StartRegistry(t)
	one, two := small(t, "one"), small(t, "two")
	r.Push(t, "team/app:1", one)
	index := mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: small(t, "other"), Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "s390x"}}},
		mutate.IndexAddendum{Add: two, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: must(two.ConfigFile())(t).Architecture}}})
	r.Push(t, "team/many:1", index)
	s := open(t, func(c *Config) { c.From, c.CAFile = []string{r.Host + "/team/*"}, r.CAFile })
	as := func(name string) (sandbox.Image, error) {
		return s.Pull(bounded(t), sandbox.Pull{Image: r.Host + "/" + name, User: r.User, Password: creds.NewSecret(r.Password)})
	}
	if _, err := s.get(t, r.Host+"/team/app:1"); err == nil || !strings.Contains(err.Error(), "UNAUTHORIZED") {
		t.Errorf("without credentials: got %v, want refused by the registry", err)
	}
	got, err := as("team/app:1")
	if err != nil || got.Digest != imagetest.Digest(t, one) || got.Size == 0 {
		t.Fatalf("got %+v, %v, want %s transferred", got, err, imagetest.Digest(t, one))
	}
	if got, err := as("team/many:1"); err != nil || got.Digest != imagetest.Digest(t, two) {
		t.Errorf("index: got %+v, %v, want the one for this machine, %s", got, err, imagetest.Digest(t, two))
	}
	pin := "team/many@" + must(index.Digest())(t).String()
	if got, err := as(pin); err != nil || got.Digest != imagetest.Digest(t, two) || got.Size != 0 {
		t.Errorf("digest of an index: got %+v, %v, want %s and nothing transferred", got, err, imagetest.Digest(t, two))
	}
	_, err = as("other/app:1")
	refused(t, "a name that no pattern allows", err, "images.from")

	r.Push(t, "team/app:1", two) // the tag moves
	if got, err := as("team/app:1"); err != nil || got.Digest != imagetest.Digest(t, one) {
		t.Errorf("missing: got %+v, %v, want what the tag meant at first", got, err)
	}
	s.cfg.Pull = Always
	if got, err := as("team/app:1"); err != nil || got.Digest != imagetest.Digest(t, two) {
		t.Errorf("always: got %+v, %v, want what the tag means now", got, err)
	}
	r.Stop()
	for _, name := range []string{pin, "team/app@" + imagetest.Digest(t, one)} {
		if _, err := as(name); err != nil {
			t.Errorf("%s, with the registry away: got %v, want it, since it is here", name, err)
		}
	}
	if _, err := as("team/app:1"); err == nil || errors.Is(err, sandbox.ErrImage) || !strings.Contains(err.Error(), "images.sources") {
		t.Errorf("always, with the registry away: got %v, want an error that is no refusal and says what to do", err)
	}
	s.cfg.Pull = Never
	if _, err := as("team/app:1"); err != nil {
		t.Error(err)
	}
	_, err = as("team/app:9")
	refused(t, "never", err, "images.pull is never")
	s.cfg.DigestOnly = true
	_, err = as("team/app:1")
	refused(t, "a tag, where digests are wanted", err, "images.digest_only")
}

// TestOnce: however many jobs ask at once, each layer is read once.
func TestOnce(t *testing.T) {
	t.Parallel()
	img := small(t, "x")
	var mu sync.Mutex
	unpacked := 0
	s := open(t, func(c *Config) {
		c.Sources = map[string]string{"app:1": imagetest.Layout(t, img), "same:1": savedArchive(t, img, `"same:1"`)}
		c.Trace = func(point string) {
			mu.Lock()
			defer mu.Unlock()
			if point == "image.layer.unpacked" {
				unpacked++
			}
		}
	})
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			if _, err := s.get(t, []string{"app:1", "same:1"}[i%2]); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if unpacked != 2 {
		t.Errorf("unpacked %d layers, want each of the two once", unpacked)
	}
}

// TestPrune: by age and by size; never what a box is made of, and no layer that
// another image has.
func TestPrune(t *testing.T) {
	t.Parallel()
	base := imagetest.Layer(t, imagetest.File("base", strings.Repeat("b", 1000)))
	sources, digests := map[string]string{}, map[string]string{}
	for _, name := range []string{"a", "b", "c"} {
		img := imagetest.Of(t, base, imagetest.Layer(t, imagetest.File(name, strings.Repeat(name, 1000))))
		sources[name+":1"], digests[name] = imagetest.Layout(t, img), imagetest.Digest(t, img)
	}
	var used []string
	s := open(t, func(c *Config) {
		c.Sources, c.KeepAge = sources, 30*24*time.Hour
		c.InUse = func() ([]string, error) { return used, nil }
	})
	begin := time.Now()
	for i, name := range []string{"a", "b", "c"} {
		must(s.get(t, name+":1"))(t)
		at := begin.Add(time.Duration(i-10) * time.Hour)
		if err := os.Chtimes(s.recordPath(digests[name]), at, at); err != nil {
			t.Fatal(err)
		}
	}
	used, s.cfg.KeepBytes = []string{digests["a"]}, 4500
	if gone := must(s.prune(bounded(t), begin.Add(10*time.Hour)))(t); len(gone) != 1 || gone[0] != digests["b"] {
		t.Fatalf("by size: got %v, want b, which is older than c; a is in use", gone)
	}
	for _, d := range []string{digests["a"], digests["c"]} {
		for _, dir := range s.dirs(t, d) {
			if _, err := os.Stat(dir); err != nil {
				t.Error(err)
			}
		}
	}
	s.dirs(t, digests["a"]) // uses it
	if gone := must(s.prune(bounded(t), begin.Add(60*24*time.Hour)))(t); len(gone) != 1 || gone[0] != digests["c"] {
		t.Errorf("by age: got %v, want c", gone)
	}
	used = nil
	must(s.prune(bounded(t), begin.Add(60*24*time.Hour)))(t)
	s.empty(t)
	s.cfg.InUse = func() ([]string, error) { return nil, errors.New("unreadable") }
	if _, err := s.Prune(bounded(t)); err == nil {
		t.Error("pruned although nobody knows what is in use")
	}
}
