package sandboxtest

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
)

// A mutant breaks a harness so that one clause does not hold. What it breaks it
// with never runs anything outside of a box.
type mutant struct {
	clause string
	mutate func(w *world)
}

// A world is a runtime, and the parts of it that a mutant may replace.
type world struct {
	sandbox.Runtime
	harness *Harness

	spec    func(s *sandbox.Spec)
	create  func(ctx context.Context, name string, s sandbox.Spec) (sandbox.Sandbox, error)
	destroy func(ctx context.Context, name string) error
	list    func(ctx context.Context) ([]sandbox.Info, error)
	check   func(ctx context.Context) ([]sandbox.Claim, error)
	attach  func(ctx context.Context, b sandbox.Sandbox) (sandbox.Sockets, error)
	mount   func(ctx context.Context, b sandbox.Sandbox, mounts []sandbox.Mount) error
	probed  func([]sandbox.Outcome)
	run     func(ctx context.Context, b sandbox.Sandbox, p sandbox.Process) (sandbox.Exit, error)
	put     func(ctx context.Context, b sandbox.Sandbox, dir string, r io.Reader) error
	get     func(ctx context.Context, b sandbox.Sandbox, name string, limit int64) ([]byte, error)
}

func (w *world) Create(ctx context.Context, name string, s sandbox.Spec) (sandbox.Sandbox, error) {
	if w.spec != nil {
		w.spec(&s)
	}
	create := w.Runtime.Create
	if w.create != nil {
		create = w.create
	}
	b, err := create(ctx, name, s)
	if err != nil {
		return nil, err
	}
	return &worldBox{b, w}, nil
}

func (w *world) Destroy(ctx context.Context, name string) error {
	if w.destroy != nil {
		return w.destroy(ctx, name)
	}
	return w.Runtime.Destroy(ctx, name)
}

func (w *world) List(ctx context.Context) ([]sandbox.Info, error) {
	if w.list != nil {
		return w.list(ctx)
	}
	return w.Runtime.List(ctx)
}

func (w *world) Check(ctx context.Context) ([]sandbox.Claim, error) {
	if w.check != nil {
		return w.check(ctx)
	}
	return w.Runtime.Check(ctx)
}

type worldBox struct {
	sandbox.Sandbox
	world *world
}

func (b *worldBox) Attach(ctx context.Context) (sandbox.Sockets, error) {
	if b.world.attach != nil {
		return b.world.attach(ctx, b.Sandbox)
	}
	return b.Sandbox.Attach(ctx)
}

func (b *worldBox) Mount(ctx context.Context, mounts []sandbox.Mount) error {
	m, ok := b.Sandbox.(sandbox.Mounter)
	switch {
	case !ok:
		return sandbox.ErrUnsupported
	case b.world.mount != nil && len(mounts) > 0:
		return b.world.mount(ctx, b.Sandbox, mounts)
	}
	return m.Mount(ctx, mounts)
}

func (b *worldBox) Probe(ctx context.Context, attempts []sandbox.Attempt) ([]sandbox.Outcome, error) {
	outcomes, err := b.Sandbox.(sandbox.Prober).Probe(ctx, attempts)
	if b.world.probed != nil {
		b.world.probed(outcomes)
	}
	return outcomes, err
}

func (b *worldBox) Run(ctx context.Context, p sandbox.Process) (sandbox.Exit, error) {
	if b.world.run != nil {
		return b.world.run(ctx, b.Sandbox, p)
	}
	return b.Sandbox.Run(ctx, p)
}

func (b *worldBox) Put(ctx context.Context, dir string, r io.Reader) error {
	if b.world.put != nil {
		return b.world.put(ctx, b.Sandbox, dir, r)
	}
	return b.Sandbox.Put(ctx, dir, r)
}

func (b *worldBox) Get(ctx context.Context, name string, limit int64) ([]byte, error) {
	if b.world.get != nil {
		return b.world.get(ctx, b.Sandbox, name, limit)
	}
	return b.Sandbox.Get(ctx, name, limit)
}

// RunMutants is TestSuite: a check that cannot fail proves nothing, so each
// clause must say red for a runtime that breaks it. It is exported for the
// tests outside of the package, which know a runtime.
func RunMutants(t *testing.T, factory func(t *testing.T) Harness) {
	t.Helper()
	hit := map[string]bool{}
	byName := map[string]clause{}
	for _, c := range clauses() {
		byName[c.name] = c
	}
	for _, m := range slices.Concat(lifeMutants(), endMutants(), runMutants(), inputMutants(), transferMutants(), limitMutants(), isolationMutants(), mountMutants()) {
		c, ok := byName[m.clause]
		if !ok {
			t.Errorf("mutant of %q, which is no clause", m.clause)
			continue
		}
		hit[m.clause] = true
		t.Run(m.clause, func(t *testing.T) {
			t.Parallel()
			h := factory(t)
			w := &world{Runtime: h.Runtime, harness: &h}
			m.mutate(w)
			h.Runtime = w
			ctx, cancel := context.WithTimeout(t.Context(), clauseTimeout)
			defer cancel()
			err := c.check(ctx, h)
			if err == nil {
				t.Errorf("clause %q is green for a runtime that breaks it", c.name)
			}
			if ctx.Err() != nil {
				t.Errorf("clause %q needed all of its time to say red: %v", c.name, err)
			}
		})
	}
	for name := range byName {
		if !hit[name] {
			t.Errorf("no mutant breaks %q", name)
		}
	}
}

// once calls first the first time and then the other.
func once[T any](first, then func(ctx context.Context, in T) error) func(ctx context.Context, in T) error {
	var mu sync.Mutex
	done := false
	return func(ctx context.Context, in T) error {
		mu.Lock()
		f := then
		if !done {
			done, f = true, first
		}
		mu.Unlock()
		return f(ctx, in)
	}
}

var errBroken = errors.New("broken on purpose")

// rewrite lets a process print something else than it did.
func rewrite(f func(p sandbox.Process, out []byte) []byte) func(context.Context, sandbox.Sandbox, sandbox.Process) (sandbox.Exit, error) {
	return func(ctx context.Context, b sandbox.Sandbox, p sandbox.Process) (sandbox.Exit, error) {
		var all bytes.Buffer
		out := p.Stdout
		p.Stdout = func(_ time.Time, b []byte) error { all.Write(b); return nil }
		exit, err := b.Run(ctx, p)
		if err == nil && out != nil {
			err = out(time.Now(), f(p, all.Bytes()))
		}
		return exit, err
	}
}

// replace is rewrite of one text.
func replace(old, with string) func(context.Context, sandbox.Sandbox, sandbox.Process) (sandbox.Exit, error) {
	return rewrite(func(_ sandbox.Process, out []byte) []byte {
		return bytes.ReplaceAll(out, []byte(old), []byte(with))
	})
}

// exits changes how processes end.
func exits(f func(p sandbox.Process, e *sandbox.Exit) error) func(context.Context, sandbox.Sandbox, sandbox.Process) (sandbox.Exit, error) {
	return func(ctx context.Context, b sandbox.Sandbox, p sandbox.Process) (sandbox.Exit, error) {
		exit, err := b.Run(ctx, p)
		if err != nil {
			return exit, err
		}
		return exit, f(p, &exit)
	}
}

// succeeds lets a probe get what it is after.
func succeeds(name string) func(context.Context, sandbox.Sandbox, sandbox.Process) (sandbox.Exit, error) {
	return func(ctx context.Context, b sandbox.Sandbox, p sandbox.Process) (sandbox.Exit, error) {
		exit, err := b.Run(ctx, p)
		if len(p.Args) > 1 && p.Args[1] == name {
			return sandbox.Exit{}, nil
		}
		return exit, err
	}
}

// before runs a script in front of each process, in the same process.
func before(script string) func(context.Context, sandbox.Sandbox, sandbox.Process) (sandbox.Exit, error) {
	return processes(func(p *sandbox.Process) {
		p.Args = append([]string{"/bin/sh", "-c", script + `; exec "$@"`, "sh"}, p.Args...)
	})
}

// processes changes what is run.
func processes(f func(p *sandbox.Process)) func(context.Context, sandbox.Sandbox, sandbox.Process) (sandbox.Exit, error) {
	return func(ctx context.Context, b sandbox.Sandbox, p sandbox.Process) (sandbox.Exit, error) {
		f(&p)
		return b.Run(ctx, p)
	}
}

// repack changes the entries of an archive.
func repack(f func(h *tar.Header)) func(context.Context, sandbox.Sandbox, string, io.Reader) error {
	return func(ctx context.Context, b sandbox.Sandbox, dir string, r io.Reader) error {
		var out bytes.Buffer
		in, w := tar.NewReader(r), tar.NewWriter(&out)
		for {
			h, err := in.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return err
			}
			f(h)
			if err := w.WriteHeader(h); err != nil {
				return err
			}
			if _, err := io.Copy(w, in); err != nil {
				return err
			}
		}
		return errors.Join(w.Close(), b.Put(ctx, dir, &out))
	}
}
