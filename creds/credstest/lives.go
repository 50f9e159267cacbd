package credstest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
)

// envLife is set in the environment of a process that is to be killed.
const envLife = "MAYFLY_CREDSTEST_LIFE"

// lifeTimeout bounds a life, which takes a second at most on a quiet machine.
const lifeTimeout = 3 * time.Minute

// A life is what the process that is to be killed does: issue, keep the handle as
// the journal does, and revoke.
type life struct {
	World         json.RawMessage
	Name, Journal string
	KillAt        int // point at which it dies; 0 is never
}

// Main is the TestMain of a package that uses KilledAtEveryPoint. start makes the
// issuer of a life out of what KilledAtEveryPoint was given, with trace as its
// Trace, and what the lease is for.
func Main[W any](m *testing.M, start func(w W, trace func(point string)) (creds.Issuer, creds.Grant, error)) {
	text := os.Getenv(envLife)
	if text == "" {
		os.Exit(m.Run())
	}
	if err := live(text, start); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func live[W any](text string, start func(W, func(string)) (creds.Issuer, creds.Grant, error)) error {
	ctx, cancel := context.WithTimeout(context.Background(), lifeTimeout)
	defer cancel()
	var l life
	var w W
	if err := json.Unmarshal([]byte(text), &l); err != nil {
		return err
	}
	if err := json.Unmarshal(l.World, &w); err != nil {
		return err
	}
	points := 0
	i, g, err := start(w, func(point string) {
		_, _ = fmt.Fprintln(os.Stdout, point)
		if points++; points == l.KillAt {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		}
	})
	if err != nil {
		return err
	}
	lease, err := i.Issue(ctx, l.Name, g)
	if err != nil {
		return err
	}
	if err := os.WriteFile(l.Journal, lease.Handle, 0o600); err != nil {
		return err
	}
	return i.Revoke(ctx, l.Name, lease.Handle)
}

// KilledAtEveryPoint kills the agent between any two outside effects of a lease, of
// which there must be that many at least. After each, recovered does what the next life
// does, and looks at what is left: it gets the name of the lease, and its handle if
// that was kept.
func KilledAtEveryPoint(t *testing.T, world any, points int, recovered func(point, name string, handle []byte)) {
	t.Helper()
	w, err := json.Marshal(world)
	if err != nil {
		t.Fatal(err)
	}
	var seen []string
	for n := 0; n <= len(seen); n++ {
		l := life{w, fmt.Sprintf("crash-%d", n), filepath.Join(t.TempDir(), "journal"), n}
		before, err := l.run(t)
		if n == 0 {
			if seen = before; err != nil || len(seen) < points {
				t.Fatalf("a life without a kill: %v, points %v, want %d at least", err, seen, points)
			}
			continue
		}
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL || len(before) != n {
			t.Fatalf("life %d: ended with %v after %v, want a kill at %s", n, err, before, seen[n-1])
		}
		handle, err := os.ReadFile(l.Journal)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		recovered(seen[n-1], l.Name, handle)
	}
}

// run starts the life and returns the points that it came to.
func (l life) run(t *testing.T) ([]string, error) {
	text, err := json.Marshal(l)
	if err != nil {
		return nil, err
	}
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(t.Context(), exe)
	cmd.Env, cmd.Stderr = append(os.Environ(), envLife+"="+string(text)), os.Stderr
	out, err := cmd.Output()
	return strings.Fields(string(out)), err
}
