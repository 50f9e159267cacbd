package native

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
)

// BenchmarkGVisor makes, uses and destroys boxes with a kernel of their own and,
// in turn with it, has runsc run a program as anybody would: over the host's
// root, read-only, without network, limits and ids. It reports medians in
// microseconds, and the memory of an idle box.
func BenchmarkGVisor(b *testing.B) {
	r := newRuntime(b, config(b))
	if _, err := r.Check(b.Context()); err != nil {
		b.Fatal(err)
	}
	plain := bundleOf(b)
	took := map[string][]time.Duration{}
	measure := func(what string, do func() error) {
		began := time.Now()
		if err := do(); err != nil {
			b.Fatalf("%s: %v", what, err)
		}
		took[what] = append(took[what], time.Since(began))
	}
	ctx := b.Context()
	memory := ""
	for i := 0; b.Loop(); i++ {
		name := fmt.Sprintf("bench-%d", i)
		var s sandbox.Sandbox
		measure("create", func() (err error) {
			s, err = r.Create(ctx, name, sandbox.Spec{Isolation: sandbox.GVisor})
			return err
		})
		if i == 0 {
			memory = idle(b, s)
		}
		measure("step", func() error {
			_, err := s.Run(ctx, sandbox.Process{Args: []string{"/bin/true"}})
			return err
		})
		measure("destroy", func() error { return r.Destroy(ctx, name) })
		measure("runsc-run", func() error {
			cmd := exec.CommandContext(ctx, os.Getenv(runscEnv), "--root="+plain, "--platform=systrap", "--network=none", "--ignore-cgroups",
				"run", "--bundle="+plain, name)
			out, err := cmd.CombinedOutput()
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})
	}
	for what, all := range took {
		slices.Sort(all)
		b.ReportMetric(float64(all[len(all)/2].Microseconds()), what+"-µs")
		b.ReportMetric(float64(all[0].Microseconds()), "fastest-"+what+"-µs")
	}
	b.Logf("memory of an idle box: %s", memory)
}

// bundleOf is a bundle of /bin/true.
func bundleOf(b *testing.B) string {
	b.Helper()
	dir := b.TempDir()
	text, err := json.Marshal(map[string]any{
		"ociVersion": "1.2.0",
		"root":       map[string]any{"path": "/", "readonly": true},
		"process":    map[string]any{"args": []string{"/bin/true"}, "cwd": "/", "user": map[string]any{"uid": 0, "gid": 0}},
	})
	if err := errors.Join(err, os.WriteFile(filepath.Join(dir, "config.json"), text, 0o600)); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = unix.Unmount(filepath.Join(dir, "null-netns"), unix.MNT_DETACH) // runsc leaves it mounted
	})
	return dir
}
