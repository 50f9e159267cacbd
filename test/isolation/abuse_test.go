package isolation

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
)

// An abuse uses up a machine. It must be stopped at a limit; below the limit it
// must work, or the limit was not what stopped it.
type abuse struct {
	limits  sandbox.Limits
	args    []string            // of the probe
	honest  []string            // the same, and within the limits
	stopped func(r result) bool // at the limit
}

func abuses() map[string]abuse {
	const mib = 1 << 20
	size := func(n int) string { return strconv.Itoa(n) }
	// stoppedAt is a probe that got as far as n, a quarter less at most.
	stoppedAt := func(n int) func(r result) bool {
		return func(r result) bool {
			first, _, _ := strings.Cut(r.out, "\n")
			reached, err := strconv.Atoi(first)
			return err == nil && r.code == 1 && reached <= n && reached >= n*3/4
		}
	}
	killed := func(r result) bool { return r.oom && r.signal == int(unix.SIGKILL) }
	return map[string]abuse{
		"memory hog": {
			sandbox.Limits{Memory: 96 * mib},
			[]string{"memory", size(300 * mib)},
			[]string{"memory", size(40 * mib)},
			killed,
		},
		"processes": {
			sandbox.Limits{Pids: 64},
			[]string{"forks", "200"},
			[]string{"forks", "3"},
			func(r result) bool { return r.code == 1 },
		},
		"thread bomb": {
			sandbox.Limits{Pids: 128},
			[]string{"threads", "400"},
			[]string{"threads", "50"},
			func(r result) bool { return !r.got() && !strings.Contains(r.out, "\n150\n") },
		},
		"disk filler": {
			sandbox.Limits{Disk: 64 * mib},
			[]string{"fill", "/workspace/big", size(200 * mib)},
			[]string{"fill", "/tmp/small", size(mib)},
			stoppedAt(64 * mib),
		},
		"disk filler in the base": {
			sandbox.Limits{Disk: 64 * mib},
			[]string{"fill", "/usr/lib/big", size(200 * mib)},
			[]string{"fill", "/usr/lib/small", size(mib)},
			stoppedAt(64 * mib),
		},
		"inode filler": {
			sandbox.Limits{Inodes: 2000, Disk: 64 * mib},
			[]string{"inodes", "/workspace", "9000"},
			[]string{"inodes", "/tmp", "10"},
			stoppedAt(2000),
		},
		"descriptors": {
			sandbox.Limits{},
			[]string{"files", "100000"},
			[]string{"files", "1000"},
			func(r result) bool { return r.code == 1 },
		},
	}
}

// ends reports an abuse that may take down a box with a kernel of its own: all of
// its processes are few of the machine's (ADR 0016).
func ends(name string) bool { return name == "memory hog" || name == "processes" }

// Each abuse is made beside the job of a neighbour.
func TestAbuse(t *testing.T) {
	t.Parallel()
	table := abuses()
	for _, name := range names(table) {
		a := table[name]
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			unharmed(t, func() {
				b := newBox(t, a.limits)
				if r := b.probe(t, a.honest...); !r.got() {
					t.Errorf("%q: got %+v, want it to work", a.honest, r)
				}
				r, err := b.try(t, append([]string{"/run/mayfly/probe"}, a.args...)...)
				if wall == sandbox.GVisor && ends(name) && errors.Is(err, sandbox.ErrDied) {
					return // the box is what was stopped there, and the neighbour is looked at
				}
				if err != nil {
					t.Fatalf("%q: %v: %s", a.args, err, r.out)
				}
				if !a.stopped(r) {
					t.Errorf("%q with %+v: got %.500v, want it stopped there", a.args, a.limits, r)
				}
				if !strings.HasSuffix(name, "filler") { // the next step of a box that is not full
					if r := b.probe(t, a.honest...); !r.got() {
						t.Errorf("%q after it: got %+v, want it to work", a.honest, r)
					}
				}
			})
		})
	}
}

// unharmed wants the job of a neighbour to write files all the time and to end
// in time while attack goes on.
func unharmed(t *testing.T, attack func()) {
	t.Helper()
	calm := newBox(t, sandbox.Limits{})
	started, ended := make(chan struct{}), make(chan error, 1)
	began := time.Now()
	go func() {
		lines, oom := 0, false
		exit, err := calm.Run(bounded(t), sandbox.Process{
			Args: []string{"/bin/sh", "-c", `i=0; while [ $i -lt 60 ]; do echo $i > /workspace/f$i && cat /workspace/f$i && sleep 0.02 || exit 1; i=$((i+1)); done`},
			Env:  []string{"PATH=/usr/bin"},
			Stdout: func(_ time.Time, b []byte) error {
				if lines == 0 {
					close(started)
				}
				lines += strings.Count(string(b), "\n")
				return nil
			},
		})
		oom = exit.OOM
		if err != nil || exit.Code != 0 || oom || lines != 60 {
			err = fmt.Errorf("got %d lines of 60, %+v, error %w", lines, exit, err)
		}
		ended <- err
	}()
	select {
	case <-started:
	case err := <-ended:
		t.Fatalf("the neighbour: %v", err)
	}
	attack()
	if err := <-ended; err != nil {
		t.Errorf("the neighbour: %v", err)
	}
	if took := time.Since(began); took > time.Minute {
		t.Errorf("the neighbour needed %v for a second's work", took)
	}
}

// A fork bomb that nothing ends but the agent.
func TestForkBomb(t *testing.T) {
	t.Parallel()
	unharmed(t, func() {
		b := newBox(t, sandbox.Limits{Pids: 80})
		over := errors.New("the test has seen enough")
		ctx, cancel := context.WithTimeoutCause(bounded(t), 1500*time.Millisecond, over)
		defer cancel()
		exit, err := b.Run(ctx, sandbox.Process{
			Args: []string{"/bin/bash", "-c", `f() { f | f & }; f; while :; do :; done`}, Env: []string{"PATH=/usr/bin"}, Grace: 100 * time.Millisecond,
		})
		if !errors.Is(err, over) {
			t.Errorf("got %+v, %v, want it to run until it was stopped", exit, err)
		}
		began := time.Now()
		if err := runtimeOfTests.Destroy(bounded(t), b.name); err != nil {
			t.Errorf("destroy: %v", err)
		}
		if took := time.Since(began); took > time.Minute {
			t.Errorf("destroy took %v", took)
		}
	})
}

// A step that kills all that it can reaches its own box only, and not the guest.
func TestKillAll(t *testing.T) {
	t.Parallel()
	pid, held := newVictim(t) // ended by its cleanup, which wants it alive
	unharmed(t, func() {
		b := newBox(t, sandbox.Limits{})
		if r := b.run(t, "/bin/sh", "-c", "sleep 1000 & /run/mayfly/probe killall; echo $?; jobs"); r.signal == 0 && !strings.Contains(r.out, "0") {
			t.Errorf("kill -9 -1: got %+v", r)
		}
		if r := b.run(t, "/bin/sh", "-c", "echo alive; ls -d /proc/[0-9]* | wc -l"); !strings.HasPrefix(r.out, "alive\n") {
			t.Errorf("the step after: got %+v", r)
		}
	})
	if r := child(t, nil, "environ", pid, held); !r.got() {
		t.Errorf("a process of the host after it: got %+v, want it alive", r)
	}
}

// A step that prints more than the agent reads: the agent's memory stays flat,
// and all of it arrives.
func TestLogFlood(t *testing.T) { // not parallel: memory is measured
	const size = 256 << 20
	unharmed(t, func() {
		b := newBox(t, sandbox.Limits{})
		before, most := heap(), uint64(0)
		total, calls := 0, 0
		slow := time.NewTicker(2 * time.Millisecond)
		defer slow.Stop()
		exit, err := b.Run(bounded(t), sandbox.Process{
			Args: []string{"/run/mayfly/probe", "flood", strconv.Itoa(size)},
			Stdout: func(_ time.Time, p []byte) error {
				total += len(p)
				if calls++; calls < 500 {
					<-slow.C
				}
				if calls%100 == 0 {
					most = max(most, heap())
				}
				return nil
			},
		})
		if err != nil || exit.Code != 0 || total != size {
			t.Errorf("got %d bytes of %d, %+v, %v", total, size, exit, err)
		}
		if most > before+16<<20 {
			t.Errorf("the heap grew from %d to %d MiB while %d MiB were printed, want it flat", before>>20, most>>20, size>>20)
		}
		t.Logf("heap before %d KiB, at most %d KiB", before>>10, most>>10)
	})
}

func heap() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapInuse
}
