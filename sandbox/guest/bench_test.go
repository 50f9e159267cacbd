package guest_test

import (
	"archive/tar"
	"bytes"
	"os"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
)

// BenchmarkStep is what a step costs in a running box: two small files in,
// /bin/true, two small files out.
func BenchmarkStep(b *testing.B) {
	box := newBox(b, "")
	dir, err := os.MkdirTemp("/dev/shm", "mayfly-bench") // a tmpfs, as sandbox.Run is
	if err != nil {
		b.Fatal(err)
	}
	defer os.RemoveAll(dir)
	archive := tarOf(b, file("env", "A=1\n"), file("output", "x=y\n")).Bytes()
	p := sandbox.Process{Args: []string{"/bin/true"}, Dir: "/", Env: []string{"PATH=/bin"}}
	for b.Loop() {
		if err := box.Put(b.Context(), dir, bytes.NewReader(archive)); err != nil {
			b.Fatal(err)
		}
		if exit, err := box.Run(b.Context(), p); err != nil || exit.Code != 0 {
			b.Fatal(exit, err)
		}
		for _, name := range []string{"/env", "/output"} {
			if _, err := box.Get(b.Context(), dir+name, 1<<20); err != nil {
				b.Fatal(err)
			}
		}
	}
}

// BenchmarkRun is the /bin/true of BenchmarkStep alone.
func BenchmarkRun(b *testing.B) {
	box := newBox(b, "")
	p := sandbox.Process{Args: []string{"/bin/true"}, Dir: "/", Env: []string{"PATH=/bin"}}
	for b.Loop() {
		if exit, err := box.Run(b.Context(), p); err != nil || exit.Code != 0 {
			b.Fatal(exit, err)
		}
	}
}

// BenchmarkThroughput is how fast output reaches the agent.
func BenchmarkThroughput(b *testing.B) {
	box := newBox(b, "")
	const chunk = 64 << 20
	b.SetBytes(chunk)
	for b.Loop() {
		n := 0
		p := sh("head -c 67108864 /dev/zero")
		p.Stdout = func(_ time.Time, data []byte) error { n += len(data); return nil }
		if exit, err := box.Run(b.Context(), p); err != nil || exit.Code != 0 || n != chunk {
			b.Fatal(exit, err, n)
		}
	}
}

// BenchmarkPut is how fast one large file gets into the box.
func BenchmarkPut(b *testing.B) {
	box := newBox(b, "")
	dir := b.TempDir()
	h := tar.Header{Name: "large", Linkname: string(make([]byte, 32<<20))}
	archive := tarOf(b, h).Bytes()
	b.SetBytes(int64(len(archive)))
	for b.Loop() {
		if err := box.Put(b.Context(), dir, bytes.NewReader(archive)); err != nil {
			b.Fatal(err)
		}
	}
}
