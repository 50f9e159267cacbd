package containerd

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/engine"
	"github.com/mayfly-ci/mayfly/sandbox/engine/enginetest"
	"github.com/mayfly-ci/mayfly/test/containerdtest"
)

// TestPull: images come from a registry on loopback, under each policy.
func TestPull(t *testing.T) {
	for _, v := range containerdtest.Versions() {
		t.Run(string(v), func(t *testing.T) {
			t.Parallel()
			d, from := containerdtest.Start(t, v), startRegistry(t)
			for _, c := range []struct {
				name string
				test func(*testing.T, *containerdtest.Daemon, *testRegistry)
			}{
				{"missing", pullMissing}, // first: its layer is in all of them
				{"always", pullAlways},
				{"never", pullNever},
				{"index", pullIndex},
				{"refused", pullRefused},
				{"secrets", pullSecrets},
				{"pruned", pullPruned},
				{"hostile", pullHostile},
			} {
				t.Run(c.name, func(t *testing.T) { c.test(t, d, from) })
			}
			nothingLeft(t, d, "/nonexistent")
		})
	}
}

// puller is a runtime with a pull policy.
func puller(t *testing.T, d *containerdtest.Daemon, when engine.When) *Runtime {
	t.Helper()
	cfg := config(t, d)
	cfg.Images = engine.Images{Pull: when, From: []string{"127.0.0.1:*/team/**"}}
	return newRuntime(t, cfg)
}

func pullOf(image string) sandbox.Pull {
	return sandbox.Pull{Image: image, User: registryUser, Password: creds.NewSecret(registryPassword)}
}

func pulled(t *testing.T, r *Runtime, image string) sandbox.Image {
	t.Helper()
	got, err := r.Pull(enginetest.Bounded(t), pullOf(image))
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func pullMissing(t *testing.T, d *containerdtest.Daemon, from *testRegistry) {
	r := puller(t, d, "")
	img := busybox(t, runtime.GOARCH, "missing")
	name := from.push(t, "team/missing:1", img)
	got := pulled(t, r, name)
	repository, _, _ := strings.Cut(name, ":1")
	want := sandbox.Image{
		Ref: name[:strings.LastIndex(name, ":")] + "@" + digestOf(t, img), Digest: digestOf(t, img), Size: got.Size,
		Env: []string{"PATH=/bin", "VALUE=missing"}, Entrypoint: []string{"/bin/sh"}, Cmd: []string{"-c", "true"}, User: "nobody", Dir: "/root",
	}
	if fmt.Sprint(got) != fmt.Sprint(want) || got.Size < ownBytes || from.requests() == 0 {
		t.Errorf("pull of %s: got %+v, want %+v and its size", repository, got, want)
	}
	// What is there asks nobody, by tag or by digest, and has no size.
	for _, again := range []string{name, got.Ref} {
		second := pulled(t, r, again)
		if n := from.requests(); n > 0 || second.Size != 0 || second.Ref != got.Ref {
			t.Errorf("pull of %s again: got %+v and %d requests, want the same for nothing", again, second, n)
		}
	}
	b := enginetest.Create(t, r, "pulled", sandbox.Spec{Image: got.Ref})
	if out, exit := enginetest.Script(t, b, "id -u; ls /bin/busybox"); exit.Code != 0 || !strings.HasPrefix(out, "0\n") {
		t.Errorf("a box of it: got %q %+v", out, exit)
	}
	// Create asks no registry.
	if n := from.requests(); n > 0 {
		t.Errorf("Create: %d requests, want none", n)
	}
}

func pullAlways(t *testing.T, d *containerdtest.Daemon, from *testRegistry) {
	r := puller(t, d, engine.Always)
	first := pulled(t, r, from.push(t, "team/always:1", busybox(t, runtime.GOARCH, "one")))
	name := from.push(t, "team/always:1", busybox(t, runtime.GOARCH, "two"))
	second := pulled(t, r, name)
	if second.Digest == first.Digest || !slices.Contains(second.Env, "VALUE=two") {
		t.Errorf("a tag that moved: got %+v after %+v, want another image", second, first)
	}
	from.requests()
	if pulled(t, r, first.Ref); from.requests() > 0 {
		t.Error("a digest that is there was asked for")
	}
	// The tag has gone on, and what was named by its digest is still there.
	collect(t, d, "none")
	enginetest.Create(t, r, "first", sandbox.Spec{Image: first.Ref})
}

func pullNever(t *testing.T, d *containerdtest.Daemon, from *testRegistry) {
	r := puller(t, d, engine.Never)
	name := from.push(t, "team/never:1", busybox(t, runtime.GOARCH, "never"))
	if _, err := r.Pull(enginetest.Bounded(t), pullOf(name)); !errors.Is(err, sandbox.ErrImage) || from.requests() > 0 {
		t.Errorf("an image that is not there: got %v, want ErrImage and no request", err)
	}
	// Nor one that is not listed.
	r = puller(t, d, engine.Missing)
	r.cfg.Images.From = []string{"registry.example/**"}
	if _, err := r.Pull(enginetest.Bounded(t), pullOf(name)); !errors.Is(err, sandbox.ErrImage) || from.requests() > 0 {
		t.Errorf("an image that is not listed: got %v, want ErrImage and no request", err)
	}
	r.cfg.Images.DigestOnly = true
	if _, err := r.Pull(enginetest.Bounded(t), pullOf(containerdtest.Busybox)); !errors.Is(err, sandbox.ErrImage) {
		t.Errorf("a tag where digests are wanted: got %v, want ErrImage", err)
	}
	r = puller(t, d, engine.Never)
	if got := pulled(t, r, containerdtest.Busybox); !strings.HasPrefix(got.Ref, "docker.io/mayfly-test/busybox@sha256:") {
		t.Errorf("an image that is there: got %+v", got)
	}
}

// pullIndex: of several images that for this machine is taken.
func pullIndex(t *testing.T, d *containerdtest.Daemon, from *testRegistry) {
	r := puller(t, d, engine.Missing)
	index := func(archs ...string) (v1.ImageIndex, v1.Image) {
		var last v1.Image
		all := v1.ImageIndex(empty.Index)
		for _, arch := range archs {
			last = busybox(t, arch, arch)
			all = mutate.AppendManifests(all, mutate.IndexAddendum{Add: last, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}}})
		}
		return all, last
	}
	all, own := index("s390x", runtime.GOARCH)
	if got := pulled(t, r, from.push(t, "team/index:1", all)); got.Digest != digestOf(t, own) || !slices.Contains(got.Env, "VALUE="+runtime.GOARCH) {
		t.Errorf("an index: got %+v, want the manifest %s", got, digestOf(t, own))
	}
	byIndex := from.push(t, "team/index:2", all)
	byIndex = byIndex[:strings.LastIndex(byIndex, ":")] + "@" + digestOf(t, all)
	if got := pulled(t, r, byIndex); got.Digest != digestOf(t, own) {
		t.Errorf("by the digest of the index: got %+v, want the manifest %s", got, digestOf(t, own))
	}
	foreign, _ := index("s390x")
	if _, err := r.Pull(enginetest.Bounded(t), pullOf(from.push(t, "team/foreign:1", foreign))); !errors.Is(err, sandbox.ErrImage) {
		t.Errorf("an index without this machine: got %v, want ErrImage", err)
	}
}

func pullRefused(t *testing.T, d *containerdtest.Daemon, from *testRegistry) {
	r := puller(t, d, engine.Missing)
	name := from.push(t, "team/refused:1", busybox(t, runtime.GOARCH, "refused"))
	digest := digestOf(t, busybox(t, runtime.GOARCH, "lie"))
	lied := from.push(t, "team/lied@"+digest, busybox(t, runtime.GOARCH, "lie"))
	from.lie("/v2/team/lied/manifests/"+digest, `{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json"}`)
	wrong := pullOf(name)
	wrong.Password = creds.NewSecret("wrong-pass-1")
	for what, c := range map[string]struct {
		p    sandbox.Pull
		want bool // ErrImage
	}{
		"no such tag":      {pullOf(from.host + "/team/refused:absent"), true},
		"no such digest":   {pullOf(from.host + "/team/refused@sha256:" + strings.Repeat("0", 64)), true},
		"no password":      {sandbox.Pull{Image: name}, true},
		"wrong password":   {wrong, true},
		"no name":          {pullOf("Not A Name"), true},
		"another manifest": {pullOf(lied), true},
		"nobody listens":   {pullOf("127.0.0.1:1/team/x:1"), false},
	} {
		_, err := r.Pull(enginetest.Bounded(t), c.p)
		if err == nil || errors.Is(err, sandbox.ErrImage) != c.want {
			t.Errorf("%s: got %v, want refused and ErrImage %v", what, err, c.want)
		}
		for _, secret := range []string{registryPassword, "wrong-pass-1"} {
			if err != nil && strings.Contains(err.Error(), secret) {
				t.Errorf("%s: the error has the password", what)
			}
		}
	}
}

// pullSecrets: whoever the registry redirects to does not hear the password, also
// if he asks; and the registry hears it, or nothing could be pulled.
func pullSecrets(t *testing.T, d *containerdtest.Daemon, from *testRegistry) {
	r := puller(t, d, engine.Missing)
	pulled(t, r, from.push(t, "team/secrets:1", busybox(t, runtime.GOARCH, "secrets")))
	if from.requests() == 0 {
		t.Error("the registry was not asked")
	}
	name := from.push(t, "team/secrets:2", busybox(t, runtime.GOARCH, "more secrets"))
	from.setGreedy(true)
	defer from.setGreedy(false)
	if _, err := r.Pull(enginetest.Bounded(t), pullOf(name)); err == nil {
		t.Error("blobs that another host wants a password for: got nil, want an error")
	}
	from.mu.Lock()
	defer from.mu.Unlock()
	if len(from.strange) > 0 {
		t.Errorf("another host got %d Authorization headers, want none", len(from.strange))
	}
}

// pullPruned: names that Pull made are let go of when they are old, and a box
// keeps what it is made of.
func pullPruned(t *testing.T, d *containerdtest.Daemon, from *testRegistry) {
	r := puller(t, d, engine.Always)
	first := pulled(t, r, from.push(t, "team/pruned:1", busybox(t, runtime.GOARCH, "old")))
	if err := r.prune(r.within(enginetest.Bounded(t)), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Create(enginetest.Bounded(t), "pruned", sandbox.Spec{Image: first.Ref}); !errors.Is(err, sandbox.ErrUnsupported) {
		t.Errorf("Create of a name that was let go of: got %v, want ErrUnsupported", err)
	}
}

// pullHostile: what an image has where the box is mounted on, or written to, leads
// nowhere.
func pullHostile(t *testing.T, d *containerdtest.Daemon, from *testRegistry) {
	cfg := config(t, d)
	cfg.Images.From = []string{"127.0.0.1:*/**"}
	r := newRuntime(t, cfg)
	for i, h := range []tar.Header{
		{Name: "dev", Typeflag: tar.TypeSymlink, Linkname: "/etc"},
		{Name: "proc", Typeflag: tar.TypeReg},
		{Name: "sys", Typeflag: tar.TypeSymlink, Linkname: "/"},
		{Name: "etc", Typeflag: tar.TypeSymlink, Linkname: "/proc/sys/kernel"},
	} {
		var layer bytes.Buffer
		w := tar.NewWriter(&layer)
		if err := errors.Join(w.WriteHeader(&h), w.Close()); err != nil {
			t.Fatal(err)
		}
		img := withLayer(t, busybox(t, runtime.GOARCH, "hostile"), func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer.Bytes())), nil })
		got := pulled(t, r, from.push(t, fmt.Sprintf("team/hostile:%d", i), img))
		name := fmt.Sprintf("hostile-%d", i)
		enginetest.DestroyAfter(t, r, name)
		if _, err := r.Create(enginetest.Bounded(t), name, sandbox.Spec{Image: got.Ref}); !errors.Is(err, sandbox.ErrImage) {
			t.Errorf("/%s of the image is %q: got %v, want ErrImage", h.Name, h.Linkname, err)
		}
	}
}
