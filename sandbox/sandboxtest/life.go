package sandboxtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

func lifeClauses() []clause {
	return []clause{
		{"a name in use is ErrExists", "", checkExists},
		{"names that the agent would not choose are refused", "", checkNames},
		{"what cannot be enforced is ErrUnsupported", "", checkUnsupported},
		{"destroying what never was is success", "", checkAbsent},
		{"destroy ends what runs and frees the name", "", checkDestroy},
		{"destroy leaves no process of the box", "", checkDaemons},
		{"list shows name labels and expiry", "", checkList},
		{"a later life lists the boxes of this one", "", checkAgain},
		{"a later life destroys the box of a dead one", "", checkOrphan},
		{"a box ends by itself when it expires", "", checkExpires},
		{"a box whose process 1 dies is ErrDied", "", checkDied},
		{"boxes do not disturb each other", "", checkConcurrent},
		{"a context that has ended is honoured", "", checkCancelled},
		{"check says what is enforced and leaves nothing", "", checkClaims},
		{"attach gives sockets of the network of the box", "", checkAttach},
	}
}

func checkExists(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		if _, err := h.Runtime.Create(ctx, b.name, h.spec(sandbox.Limits{})); !errors.Is(err, sandbox.ErrExists) {
			return fmt.Errorf("second Create: got error %w, want ErrExists", err)
		}
		return wrap("the box after a refused Create", b.script(ctx, "echo here").printed("here\n"))
	})
}

func checkNames(ctx context.Context, h Harness) error {
	for _, name := range []string{"", ".", "..", "a/b", "A", "a b", "a\n", strings.Repeat("a", 41)} {
		if _, err := h.Runtime.Create(ctx, name, h.spec(sandbox.Limits{})); err == nil {
			return errors.Join(fmt.Errorf("Create(%q): got nil, want an error", name), h.destroy(ctx, name))
		}
	}
	return nil
}

func checkUnsupported(ctx context.Context, h Harness) error {
	for _, l := range []sandbox.Limits{{Memory: -1}, {Pids: -1}, {MilliCPU: -1}, {Disk: -1}, {Inodes: -1}} {
		name := newName()
		_, err := h.Runtime.Create(ctx, name, h.spec(l))
		if destroyed := h.destroy(ctx, name); destroyed != nil || !errors.Is(err, sandbox.ErrUnsupported) {
			return fmt.Errorf("Create with %+v: got error %w, want ErrUnsupported; Destroy: %w", l, err, destroyed)
		}
	}
	return nil
}

func checkAbsent(ctx context.Context, h Harness) error { return h.Runtime.Destroy(ctx, newName()) }

func checkDestroy(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		up, ended := make(chan struct{}), make(chan error, 1)
		go func() {
			p := shell("echo up; exec sleep 1000")
			p.Stdout = func(time.Time, []byte) error { close(up); return nil }
			_, err := b.Run(ctx, p)
			ended <- err
		}()
		select {
		case <-up:
		case err := <-ended:
			return fmt.Errorf("a process that sleeps: %w", err)
		}
		for n := range 3 {
			if err := h.Runtime.Destroy(ctx, b.name); err != nil {
				return fmt.Errorf("Destroy number %d: %w", n+1, err)
			}
		}
		if err := <-ended; !errors.Is(err, sandbox.ErrDied) {
			return fmt.Errorf("the Run that was under way: got error %w, want ErrDied", err)
		}
		if r := b.script(ctx, "true"); !errors.Is(r.err, sandbox.ErrDied) {
			return fmt.Errorf("Run after Destroy: got error %w, want ErrDied", r.err)
		}
		if infos, err := h.Runtime.List(ctx); err != nil || find(infos, b.name) != nil {
			return fmt.Errorf("List after Destroy: got %+v, %w", infos, err)
		}
		again, err := h.Runtime.Create(ctx, b.name, h.spec(sandbox.Limits{}))
		if err != nil {
			return fmt.Errorf("Create of the same name: %w", err)
		}
		return (&box{Sandbox: again}).script(ctx, "ls -A /workspace").printed("")
	})
}

func find(infos []sandbox.Info, name string) *sandbox.Info {
	if i := slices.IndexFunc(infos, func(i sandbox.Info) bool { return i.Name == name }); i >= 0 {
		return &infos[i]
	}
	return nil
}

// daemons leaves two processes behind: a child, and one that has left family,
// session and terminal. Both have the first argument among theirs.
const daemons = `sh -c 'while :; do sleep 1; done' sh "$1" </dev/null >/dev/null 2>&1 &
(setsid sh -c 'while :; do sleep 1; done' sh "$1" </dev/null >/dev/null 2>&1 &)
while [ "$(grep -lsF "$1" /proc/[0-9]*/cmdline | wc -l)" -lt 3 ]; do :; done`

func checkDaemons(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		mark := token()
		if err := b.run(ctx, shell(daemons, mark)).succeeded(); err != nil {
			return err
		}
		// One that has just begun has its parent's arguments, or none for a moment.
		if err := eventually(ctx, time.Minute, "two processes of the box can be seen, so that the next look means something", func() bool { return b.running(ctx, mark) >= 2 }); err != nil {
			return err
		}
		if err := h.Runtime.Destroy(ctx, b.name); err != nil {
			return fmt.Errorf("Destroy: %w", err)
		}
		if n := b.running(ctx, mark); n > 0 {
			return fmt.Errorf("after Destroy %d still run", n)
		}
		return nil
	})
}

// hostPids are the processes of the host that have mark among their arguments.
func hostPids(mark string) []int {
	var pids []int
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline") // the pattern is well formed
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil || !slices.Contains(strings.Split(string(b), "\x00"), mark) {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file))); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

func checkList(ctx context.Context, h Harness) error {
	s := h.spec(sandbox.Limits{})
	s.Expires = s.Expires.Truncate(time.Second)
	return h.with(ctx, s, func(b *box) error { return listed(ctx, h.Runtime, b.name, s) })
}

func listed(ctx context.Context, r sandbox.Runtime, name string, s sandbox.Spec) error {
	infos, err := r.List(ctx)
	if err != nil {
		return fmt.Errorf("List: %w", err)
	}
	if got := find(infos, name); got == nil || got.Labels != s.Labels || !got.Expires.Equal(s.Expires) {
		return fmt.Errorf("List: got %+v, want %s with %+v until %v", infos, name, s.Labels, s.Expires)
	}
	return nil
}

func checkAgain(ctx context.Context, h Harness) error {
	s := h.spec(sandbox.Limits{})
	s.Labels.Generation = 3
	return h.with(ctx, s, func(b *box) error {
		again, err := h.Again()
		if err != nil {
			return fmt.Errorf("harness: %w", err)
		}
		if _, err := again.Create(ctx, b.name, s); !errors.Is(err, sandbox.ErrExists) {
			return fmt.Errorf("Create of the same name: got error %w, want ErrExists", err)
		}
		return listed(ctx, again, b.name, s)
	})
}

func checkOrphan(ctx context.Context, h Harness) (err error) {
	name, s := newName(), h.spec(sandbox.Limits{})
	s.Labels.Generation = 3
	defer func() { err = errors.Join(err, h.destroy(ctx, name)) }()
	if err := h.Orphan(ctx, name, s); err != nil {
		return fmt.Errorf("harness: %w", err)
	}
	if err := listed(ctx, h.Runtime, name, s); err != nil {
		return err
	}
	if err := h.Runtime.Destroy(ctx, name); err != nil {
		return fmt.Errorf("Destroy: %w", err)
	}
	if infos, err := h.Runtime.List(ctx); err != nil || find(infos, name) != nil {
		return fmt.Errorf("List after Destroy: got %+v, %w", infos, err)
	}
	return nil
}

// lifetime is long enough to make a box on a busy machine.
const lifetime = 6 * time.Second

func checkExpires(ctx context.Context, h Harness) error {
	s := h.spec(sandbox.Limits{})
	s.Expires = time.Now().Add(lifetime)
	return h.with(ctx, s, func(b *box) error {
		mark := token()
		late, cancel := context.WithDeadline(ctx, s.Expires.Add(time.Minute))
		defer cancel()
		r := b.run(late, shell("setsid sleep 1000 & while :; do sleep 1; done", mark))
		switch {
		case !errors.Is(r.err, sandbox.ErrDied):
			return fmt.Errorf("Run across the expiry: got %v, want ErrDied", r)
		case time.Now().Before(s.Expires.Add(-time.Second)):
			return fmt.Errorf("the box died %v before its time", time.Until(s.Expires))
		}
		return eventually(ctx, time.Minute, "the end of what ran", func() bool { return b.running(ctx, mark) == 0 })
	})
}

func checkDied(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		mark := token()
		var killed error
		p := shell("echo up; while :; do sleep 1; done", mark)
		p.Stdout = func(time.Time, []byte) error { killed = b.killInit(mark); return nil }
		if _, err := b.Run(ctx, p); killed != nil || !errors.Is(err, sandbox.ErrDied) {
			return fmt.Errorf("Run: got error %w, want ErrDied; kill process 1: %w", err, killed)
		}
		if _, err := b.Get(ctx, "/etc/hosts", 1<<16); !errors.Is(err, sandbox.ErrDied) {
			return fmt.Errorf("Get: got error %w, want ErrDied", err)
		}
		if err := b.Put(ctx, sandbox.Workspace, archive(entry{name: "f"})); !errors.Is(err, sandbox.ErrDied) {
			return fmt.Errorf("Put: got error %w, want ErrDied", err)
		}
		return eventually(ctx, time.Minute, "the end of what ran", func() bool { return b.running(ctx, mark) == 0 })
	})
}

// killInit kills process 1 of the box in which a process with that mark runs,
// from the host, where it has another id.
func (b *box) killInit(mark string) error {
	if kernel := b.harness.Kernel; kernel != nil {
		return killKernel(kernel(b.name))
	}
	pids := hostPids(mark)
	if len(pids) == 0 {
		return errors.New("the host does not see the process of the box")
	}
	for pid := pids[0]; pid > 1; {
		b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
		if err != nil {
			return err
		}
		parent := 0
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			if len(f) > 2 && f[0] == "NSpid:" && f[len(f)-1] == "1" {
				return syscall.Kill(pid, syscall.SIGKILL)
			}
			if len(f) == 2 && f[0] == "PPid:" {
				parent, _ = strconv.Atoi(f[1]) // the kernel writes a number
			}
		}
		pid = parent
	}
	return errors.New("the process has no process 1 above it")
}

func checkConcurrent(ctx context.Context, h Harness) error {
	var all [4]error
	var wait sync.WaitGroup
	for i := range all {
		wait.Go(func() {
			all[i] = h.within(ctx, func(b *box) error {
				for n := range 5 {
					text := fmt.Sprintf("%d %d", i, n)
					if err := b.run(ctx, shell(`test ! -e /tmp/other && echo "$1" > /workspace/mine && cat /workspace/mine`, text)).printed(text + "\n"); err != nil {
						return err
					}
				}
				return b.script(ctx, "ls -A /workspace; echo $$ > /tmp/other").printed("mine\n")
			})
		})
	}
	wait.Wait()
	return errors.Join(all[:]...)
}

func checkCancelled(ctx context.Context, h Harness) error {
	cause := errors.New("of the suite")
	ended, cancel := context.WithCancelCause(ctx)
	cancel(cause)
	name := newName()
	_, err := h.Runtime.Create(ended, name, h.spec(sandbox.Limits{}))
	if destroyed := h.destroy(ctx, name); err == nil || destroyed != nil {
		return fmt.Errorf("Create: got error %w, want one; Destroy: %w", err, destroyed)
	}
	return h.within(ctx, func(b *box) error {
		if _, err := b.Run(ended, shell("true")); !errors.Is(err, cause) {
			return fmt.Errorf("Run: got error %w, want the cause", err)
		}
		if _, err := b.Get(ended, "/etc/hosts", 1<<16); !errors.Is(err, cause) {
			return fmt.Errorf("Get: got error %w, want the cause", err)
		}
		if err := b.Put(ended, sandbox.Workspace, archive(entry{name: "f"})); !errors.Is(err, cause) {
			return fmt.Errorf("Put: got error %w, want the cause", err)
		}
		return b.script(ctx, "ls -A /workspace").printed("")
	})
}

func checkClaims(ctx context.Context, h Harness) error {
	claims, err := h.Runtime.Check(ctx)
	if err != nil {
		return fmt.Errorf("Check: %w", err)
	}
	var open, names []string
	for _, c := range claims {
		names = append(names, c.Name)
		if !c.Enforced {
			open = append(open, c.Name)
		}
		if c.Name == "" || c.Detail == "" {
			return fmt.Errorf("claim %+v: want a name and a detail", c)
		}
	}
	want := slices.Sorted(slices.Values(h.Unenforced))
	if slices.Sort(open); !slices.Equal(open, want) {
		return fmt.Errorf("not enforced: got %q, want %q", open, want)
	}
	for _, c := range clauses() {
		if c.needs != "" && !slices.Contains(names, c.needs) {
			return fmt.Errorf("Check says nothing about %q", c.needs)
		}
	}
	infos, err := h.Runtime.List(ctx)
	if err != nil || slices.ContainsFunc(infos, func(i sandbox.Info) bool { return !strings.HasPrefix(i.Name, "st-") }) {
		return fmt.Errorf("List after Check: got %+v, %w", infos, err)
	}
	return nil
}

// checkAttach sends something to both sockets from inside.
func checkAttach(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		if err := b.install(ctx); err != nil { // before Attach, as the agent may
			return err
		}
		s, err := b.Attach(ctx)
		if err != nil {
			return fmt.Errorf("Attach: %w", err)
		}
		if s.TCP == nil || s.DNS == nil {
			return fmt.Errorf("Attach: got %+v, want a TCP and a DNS socket", s)
		}
		word := token()
		served, err := serve(s)
		if err != nil {
			return err
		}
		defer served.Close()
		for _, to := range [][2]string{{"tcp", egress.Virtual.Addr().Next().String() + ":443"}, {"udp", egress.Resolver.String() + ":53"}} {
			mine := word + to[0]
			r := b.probe(ctx, "connect", to[0], to[1], mine)
			if err := eventually(ctx, time.Minute, "a token from "+to[0], func() bool { return served.Reached(mine) }); err != nil {
				return fmt.Errorf("%w: %v", err, r)
			}
		}
		return nil
	})
}
