package sandboxtest

import (
	"context"
	"os"
	"path/filepath"

	"github.com/mayfly-ci/mayfly/sandbox"
)

func mountMutants() []mutant {
	unmounted := func(w *world) { w.spec = func(s *sandbox.Spec) { s.Mounts = nil } }
	return []mutant{
		{"a mount shows a directory of the host", unmounted},
		{"a mount shows a directory of the host", copied},
		{"a mount cannot be written", copied},
		{"a mount cannot be made writable", copied},
		{"a setuid program in a mount gains nothing", func(w *world) { w.run = succeeds("setuid") }},
		{"a device in a mount is none", func(w *world) { w.run = succeeds("open") }},
		{"a mount follows links as the box does", func(w *world) {
			w.spec = func(s *sandbox.Spec) {
				if len(s.Mounts) > 0 {
					_ = os.Mkdir("/run/"+filepath.Base(filepath.Dir(s.Mounts[0].Target)), 0o755) // as a runtime that follows the host's
				}
			}
		}},
		{"a mount ends with its box and leaves its source", func(w *world) {
			source := ""
			w.spec = func(s *sandbox.Spec) {
				if len(s.Mounts) > 0 {
					source = s.Mounts[0].Source
				}
			}
			w.destroy = func(ctx context.Context, name string) error {
				_ = os.Remove(source + "/f")
				return w.Runtime.Destroy(ctx, name)
			}
		}},
		{"mounts that are not clean or too many are refused", unmounted},
		{"a mount may come after the box", func(w *world) {
			w.mount = func(context.Context, sandbox.Sandbox, []sandbox.Mount) error { return nil }
		}},
		{"a mount may come after the box", func(w *world) { w.mount = copyIn }},
		{"a mount that comes later follows links as the box does", func(w *world) {
			w.mount = func(ctx context.Context, b sandbox.Sandbox, mounts []sandbox.Mount) error {
				_ = os.Mkdir("/run/"+filepath.Base(filepath.Dir(mounts[0].Target)), 0o755) // as a runtime that follows the host's
				return b.(sandbox.Mounter).Mount(ctx, mounts)
			}
		}},
	}
}

// copied gives a copy in the box's own file system instead of a mount.
func copied(w *world) {
	w.create = func(ctx context.Context, name string, s sandbox.Spec) (sandbox.Sandbox, error) {
		mounts := s.Mounts
		s.Mounts = nil
		b, err := w.Runtime.Create(ctx, name, s)
		if err != nil {
			return b, err
		}
		return b, copyIn(ctx, b, mounts)
	}
}

func copyIn(ctx context.Context, b sandbox.Sandbox, mounts []sandbox.Mount) error {
	for _, m := range mounts {
		f, err := os.ReadFile(m.Source + "/f")
		if err != nil {
			return err
		}
		if err := b.Put(ctx, "/", archive(
			entry{name: m.Target[1:] + "/f", content: string(f), mode: 0o666},
			entry{name: m.Target[1:] + "/dir/g", content: string(f), mode: 0o644},
		)); err != nil {
			return err
		}
	}
	return nil
}
