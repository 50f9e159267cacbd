package containerd

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/test/containerdtest"
)

// BenchmarkBox makes and destroys a box, and runs a step in it. It reports
// medians in microseconds.
func BenchmarkBox(b *testing.B) {
	for _, v := range containerdtest.Versions() {
		for _, wall := range []sandbox.Isolation{sandbox.Kernel, sandbox.GVisor} {
			b.Run(string(v)+string(wall), func(b *testing.B) { benchmark(b, v, wall) })
		}
	}
}

func benchmark(b *testing.B, v containerdtest.Version, wall sandbox.Isolation) {
	r := newRuntime(b, config(b, containerdtest.Start(b, v)))
	if _, err := r.Check(b.Context()); err != nil {
		b.Fatal(err)
	}
	took := map[string][]time.Duration{}
	measure := func(what string, do func() error) {
		began := time.Now()
		if err := do(); err != nil {
			b.Fatalf("%s: %v", what, err)
		}
		took[what] = append(took[what], time.Since(began))
	}
	for i := 0; b.Loop(); i++ {
		name := fmt.Sprintf("bench-%d", i)
		var box sandbox.Sandbox
		measure("create", func() (err error) { box, err = r.Create(b.Context(), name, sandbox.Spec{Isolation: wall}); return err })
		measure("step", func() error {
			_, err := box.Run(b.Context(), sandbox.Process{Args: []string{"/bin/true"}})
			return err
		})
		measure("destroy", func() error { return r.Destroy(b.Context(), name) })
	}
	for what, all := range took {
		slices.Sort(all)
		b.ReportMetric(float64(all[len(all)/2].Microseconds()), what+"-µs")
	}
}
