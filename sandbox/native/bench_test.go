package native

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/test/imagetest"
)

// BenchmarkCreateDestroy makes, uses and destroys one box after the other. It
// reports the median of each part in microseconds, a part being named after
// the trace point that ends it; the fastest Create and Destroy, which other
// work on the machine disturbs least; and the memory of the idle guest.
func BenchmarkCreateDestroy(b *testing.B) {
	createDestroy(b, func(*Runtime) sandbox.Spec { return sandbox.Spec{} })
}

// BenchmarkCreateDestroyImage is the same with boxes of an image of ten layers,
// which is here already.
func BenchmarkCreateDestroyImage(b *testing.B) {
	layers := [][]byte{busyboxLayer(b)}
	for i := range 9 {
		layers = append(layers, imagetest.Layer(b, imagetest.File("count", strings.Repeat("x", i))))
	}
	archive := imagetest.Layout(b, imagetest.Of(b, layers...))
	createDestroy(b, func(r *Runtime) sandbox.Spec {
		img, err := r.Images().Import(b.Context(), archive, "test/image")
		if err != nil {
			b.Fatal(err)
		}
		return sandbox.Spec{Image: img.Ref}
	})
}

func createDestroy(b *testing.B, spec func(r *Runtime) sandbox.Spec) {
	b.Helper()
	parts := map[string][]time.Duration{}
	last := time.Now()
	mark := func(point string) {
		now := time.Now()
		parts[point] = append(parts[point], now.Sub(last))
		last = now
	}
	cfg := config(b)
	cfg.Limits.Disk, cfg.Limits.Inodes = 0, 0 // the default, which is the largest
	cfg.Trace = mark
	r := newRuntime(b, cfg)
	if _, err := r.Check(b.Context()); err != nil {
		b.Fatal(err)
	}
	of := spec(r)
	clear(parts)
	var memory string
	for i := 0; b.Loop(); i++ {
		name := fmt.Sprintf("bench-%d", i)
		last = time.Now()
		began := last
		s, err := r.Create(b.Context(), name, of)
		if err != nil {
			b.Fatal(err)
		}
		mark("hello")
		parts["create"] = append(parts["create"], time.Since(began))
		if i == 0 {
			memory = idle(b, s)
			last = time.Now()
		}
		if _, err := s.Run(b.Context(), sandbox.Process{Args: []string{"/bin/true"}}); err != nil {
			b.Fatal(err)
		}
		mark("run")
		began = last
		if err := r.Destroy(b.Context(), name); err != nil {
			b.Fatal(err)
		}
		mark("removed")
		parts["destroy"] = append(parts["destroy"], time.Since(began))
	}
	for name, d := range parts {
		slices.Sort(d)
		b.ReportMetric(float64(d[len(d)/2].Microseconds()), strings.TrimPrefix(name, "native.")+"-µs")
	}
	b.ReportMetric(float64(parts["create"][0].Microseconds()), "fastest-create-µs")
	b.ReportMetric(float64(parts["destroy"][0].Microseconds()), "fastest-destroy-µs")
	b.Logf("memory of an idle box: %s", memory)
}

// idle is the memory that an idle box is charged for, and its guest's own part.
func idle(b *testing.B, s sandbox.Sandbox) string {
	b.Helper()
	native, ok := s.(*box)
	if !ok {
		b.Fatalf("got %T, want a box", s)
	}
	var out []string
	for _, file := range []string{native.groups.dirs(native.name)[0] + "/memory.usage_in_bytes", native.groups.dirs(native.name)[0] + "/memory.current"} {
		if n, err := os.ReadFile(file); err == nil {
			out = append(out, "control group "+strings.TrimSpace(string(n)))
		}
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", native.process.Pid))
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if strings.HasPrefix(line, "RssAnon") || strings.HasPrefix(line, "RssShmem") {
			out = append(out, strings.Join(strings.Fields(line), " "))
		}
	}
	return strings.Join(out, ", ")
}
