package sandboxtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/mayfly-ci/mayfly/sandbox"
)

func mountClauses() []clause {
	return []clause{
		{"a mount shows a directory of the host", "", checkMount},
		{"a mount cannot be written", "", checkMountWrite},
		{"a mount cannot be made writable", "", checkMountChange},
		{"a setuid program in a mount gains nothing", "user id range", checkMountSetuid},
		{"a device in a mount is none", "user id range", checkMountDevice},
		{"a mount follows links as the box does", "", checkMountLinks},
		{"a mount ends with its box and leaves its source", "", checkMountEnd},
		{"mounts that are not clean or too many are refused", "", checkMountRefused},
		{"a mount may come after the box", "", checkMountLater},
		{"a mount that comes later follows links as the box does", "", checkMountLaterLinks},
	}
}

// mountTarget has no parent in a box.
const mountTarget = "/opt/mayfly-suite/in"

// A source is a directory of the host to mount: the file f and dir/g.
type source struct{ dir, content string }

// mounted makes a box that sees a source at target. The source is removed after
// the box, and must be what it was.
func (h Harness) mounted(ctx context.Context, target string, do func(b *box, s source) error) error {
	return h.mountedBy(ctx, target, nil, do)
}

// mountedBy is mounted with mounts that are made by put, if that is not nil.
func (h Harness) mountedBy(ctx context.Context, target string, put func(b *box, m []sandbox.Mount) error, do func(b *box, s source) error) (err error) {
	parent, err := os.MkdirTemp("", "mayfly-mount-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(parent)) }()
	s := source{filepath.Join(parent, "source"), token()}
	err = errors.Join(os.Chmod(parent, 0o755), os.MkdirAll(filepath.Join(s.dir, "dir"), 0o755),
		os.WriteFile(filepath.Join(s.dir, "f"), []byte(s.content), 0o666), os.Chmod(filepath.Join(s.dir, "f"), 0o666),
		os.WriteFile(filepath.Join(s.dir, "dir", "g"), []byte(s.content), 0o644))
	if err != nil {
		return err
	}
	spec := h.spec(sandbox.Limits{})
	spec.Mounts = []sandbox.Mount{{Source: s.dir, Target: target}}
	later := spec.Mounts
	if put != nil {
		spec.Mounts = nil
	}
	err = h.with(ctx, spec, func(b *box) error {
		if put != nil {
			if err := put(b, later); err != nil {
				return err
			}
		}
		// What the following refuses must be there to begin with.
		if err := b.run(ctx, shell(`cat "$1/f" "$1/dir/g"`, target)).printed(s.content + s.content); err != nil {
			return fmt.Errorf("read: %w", err)
		}
		return do(b, s)
	})
	return errors.Join(err, s.untouched())
}

// untouched says what became of a source.
func (s source) untouched() error {
	var found []string
	err := filepath.WalkDir(s.dir, func(p string, _ os.DirEntry, err error) error {
		found = append(found, strings.TrimPrefix(p, s.dir))
		return err
	})
	if list := strings.Join(found, " "); err != nil || !strings.HasPrefix(list, " /dir /dir/g /f") || strings.Contains(list, "new") {
		return fmt.Errorf("the source of the mount has %q, %w", list, err)
	}
	for _, f := range []string{"f", "dir/g"} {
		if b, err := os.ReadFile(filepath.Join(s.dir, f)); err != nil || string(b) != s.content {
			return fmt.Errorf("%s in the source of the mount is %.100q, %w, want %q", f, b, err, s.content)
		}
	}
	return nil
}

func checkMount(ctx context.Context, h Harness) error {
	return h.mounted(ctx, mountTarget, func(b *box, s source) error {
		// What the agent adds later is seen.
		late := filepath.Join(s.dir, "later")
		if err := os.WriteFile(late, []byte("later"), 0o644); err != nil {
			return err
		}
		return wrap("what came later", b.run(ctx, shell(`cat "$1/later"`, mountTarget)).printed("later"))
	})
}

func checkMountWrite(ctx context.Context, h Harness) error {
	return h.mounted(ctx, mountTarget, func(b *box, _ source) error {
		for _, attempt := range []string{
			`: > "$1/new"`, `echo x >> "$1/f"`, `echo x > "$1/dir/g"`, `rm "$1/f"`, `mv "$1/f" "$1/new"`,
			`mkdir "$1/new"`, `chmod 777 "$1/f"`, `ln "$1/f" "$1/new"`, `touch "$1/f"`, `rm -r "$1/dir"`,
		} {
			if r := b.run(ctx, shell(attempt, mountTarget)); r.err != nil || r.exit.Code == 0 {
				return fmt.Errorf("%s: got %v, want refused", attempt, r)
			}
		}
		return nil
	})
}

func checkMountChange(ctx context.Context, h Harness) error {
	return h.mounted(ctx, mountTarget, func(b *box, _ source) error {
		return b.probe(ctx, "writable", mountTarget).refused()
	})
}

func checkMountSetuid(ctx context.Context, h Harness) error {
	return h.mounted(ctx, mountTarget, func(b *box, s source) error {
		program := filepath.Join(s.dir, "su")
		if err := errors.Join(os.WriteFile(program, h.Probe, 0o755), os.Chmod(program, 0o755|os.ModeSetuid)); err != nil {
			return err
		}
		const file = sandbox.Workspace + "/roots"
		if err := b.run(ctx, shell(`umask 077; printf "root's own" > "$1"`, file)).succeeded(); err != nil {
			return err
		}
		if err := b.probe(ctx, "setuid", mountTarget+"/su", "/etc/passwd", "root").succeeded(); err != nil {
			return fmt.Errorf("run it at all: %w", err)
		}
		return b.probe(ctx, "setuid", mountTarget+"/su", file, "root's own").refused()
	})
}

func checkMountDevice(ctx context.Context, h Harness) error {
	return h.mounted(ctx, mountTarget, func(b *box, s source) error {
		device := filepath.Join(s.dir, "zero")
		number := 1<<8 | 5 // major 1, minor 5: /dev/zero
		if h.Kernel != nil {
			number = 1<<8 | 11 // /dev/kmsg: the kernel of the box has a zero of its own, by the same number
		}
		if err := errors.Join(syscall.Mknod(device, syscall.S_IFCHR|0o666, number), os.Chmod(device, 0o666)); err != nil {
			return fmt.Errorf("a device, which needs root: %w", err)
		}
		if f, err := os.Open(device); err != nil {
			return fmt.Errorf("the host itself does not open it, so this clause would say nothing: %w", err)
		} else if err := f.Close(); err != nil {
			return err
		}
		return b.probe(ctx, "open", mountTarget+"/zero").refused()
	})
}

// checkMountLinks mounts behind /var/run, which is a link to /run in most
// images: the host's /run is not where it leads.
func checkMountLinks(ctx context.Context, h Harness) error {
	name := "mayfly-mount-" + token()
	return h.mounted(ctx, "/var/run/"+name+"/in", func(*box, source) error {
		if _, err := os.Lstat("/run/" + name); !errors.Is(err, os.ErrNotExist) {
			return errors.Join(fmt.Errorf("the target was made on the host: /run/%s, %w", name, err), os.RemoveAll("/run/"+name))
		}
		return nil
	})
}

func checkMountEnd(ctx context.Context, h Harness) error {
	var s source
	if err := h.mounted(ctx, mountTarget, func(_ *box, is source) error { s = is; return nil }); err != nil {
		return err
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(b), filepath.Base(filepath.Dir(s.dir))) {
		return fmt.Errorf("the host's mounts still name %s, %w", s.dir, err)
	}
	return h.within(ctx, func(b *box) error {
		return wrap("the mount of another box", b.run(ctx, shell(`cat "$1/f"`, mountTarget)).fails())
	})
}

func (r result) fails() error {
	if r.err != nil || r.exit.Code == 0 {
		return fmt.Errorf("got %v, want a failure", r)
	}
	return nil
}

func checkMountRefused(ctx context.Context, h Harness) error {
	dir := os.TempDir()
	for why, mounts := range map[string][]sandbox.Mount{
		"a relative source":     {{Source: "tmp", Target: mountTarget}},
		"a relative target":     {{Source: dir, Target: "opt/x"}},
		"a source with ..":      {{Source: dir + "/../etc", Target: mountTarget}},
		"a target with ..":      {{Source: dir, Target: "/opt/../etc"}},
		"the root as target":    {{Source: dir, Target: "/"}},
		"no target":             {{Source: dir}},
		"a target over /proc":   {{Source: dir, Target: "/proc"}},
		"a target over secrets": {{Source: dir, Target: filepath.Dir(sandbox.Run)}},
		"a target twice":        {{Source: dir, Target: mountTarget}, {Source: dir, Target: mountTarget}},
		"five": {
			{Source: dir, Target: "/opt/1"},
			{Source: dir, Target: "/opt/2"},
			{Source: dir, Target: "/opt/3"},
			{Source: dir, Target: "/opt/4"},
			{Source: dir, Target: "/opt/5"},
		},
	} {
		name, s := newName(), h.spec(sandbox.Limits{})
		s.Mounts = mounts
		_, err := h.Runtime.Create(ctx, name, s)
		if destroyed := h.destroy(ctx, name); destroyed != nil || !errors.Is(err, sandbox.ErrUnsupported) {
			return fmt.Errorf("%s: Create: got error %w, want ErrUnsupported; Destroy: %w", why, err, destroyed)
		}
	}
	return nil
}

// later puts mounts into a box that is there. One that could have none says so
// before, and refuses them too: that is all that is asked of it.
func later(ctx context.Context, b *box, mounts []sandbox.Mount) error {
	m, ok := b.Sandbox.(sandbox.Mounter)
	if !ok {
		return errNoMounter
	}
	if err := m.Mount(ctx, nil); errors.Is(err, sandbox.ErrUnsupported) {
		if err := m.Mount(ctx, mounts); !errors.Is(err, sandbox.ErrUnsupported) {
			return fmt.Errorf("a box that could have none got mounts: %w", err)
		}
		return errNoMounter
	} else if err != nil {
		return err
	}
	return m.Mount(ctx, mounts)
}

var errNoMounter = errors.New("it can be shown nothing later")

func checkMountLater(ctx context.Context, h Harness) error {
	bad := []sandbox.Mount{{Source: os.TempDir(), Target: "/proc"}}
	err := h.within(ctx, func(b *box) error {
		if err := later(ctx, b, bad); !errors.Is(err, sandbox.ErrUnsupported) && !errors.Is(err, errNoMounter) {
			return fmt.Errorf("a target over /proc: got error %w, want ErrUnsupported", err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return h.may(h.mountedBy(ctx, mountTarget, func(b *box, m []sandbox.Mount) error {
		return later(ctx, b, m)
	}, func(b *box, s source) error {
		for _, attempt := range []string{`: > "$1/new"`, `echo x >> "$1/f"`, `rm "$1/f"`, `chmod 777 "$1/f"`} {
			if r := b.run(ctx, shell(attempt, mountTarget)); r.err != nil || r.exit.Code == 0 {
				return fmt.Errorf("%s: got %v, want refused", attempt, r)
			}
		}
		if err := b.probe(ctx, "writable", mountTarget).refused(); err != nil {
			return err
		}
		if err := b.run(ctx, shell(`touch "$1/.."/beside`, mountTarget)).succeeded(); err != nil {
			return fmt.Errorf("root of the box does not own what was made on the way: %w", err)
		}
		info, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil || strings.Contains(string(info), filepath.Base(filepath.Dir(s.dir))) {
			return fmt.Errorf("the host's mounts name %s, %w", s.dir, err)
		}
		return nil
	}))
}

func checkMountLaterLinks(ctx context.Context, h Harness) error {
	name := "mayfly-mount-" + token()
	return h.may(h.mountedBy(ctx, "/var/run/"+name+"/in", func(b *box, m []sandbox.Mount) error { return later(ctx, b, m) }, func(*box, source) error {
		if _, err := os.Lstat("/run/" + name); !errors.Is(err, os.ErrNotExist) {
			return errors.Join(fmt.Errorf("the target was made on the host: /run/%s, %w", name, err), os.RemoveAll("/run/"+name))
		}
		return nil
	}))
}

// may takes a box that can be shown nothing later for one that keeps the contract,
// if that is one which nobody can enter from outside.
func (h Harness) may(err error) error {
	if errors.Is(err, errNoMounter) && (h.Kernel != nil || os.Geteuid() != 0) {
		return nil
	}
	return err
}
