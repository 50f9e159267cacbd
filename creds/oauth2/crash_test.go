package oauth2_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/oauth2"
)

// A life is what the process that is to be killed does: issue and revoke.
type life struct {
	URL, Name string
	KillAt    int // point at which it dies; 0 is never
}

func TestMain(m *testing.M) {
	if text := os.Getenv("OAUTH2_LIFE"); text != "" {
		if err := live(text); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func live(text string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var l life
	if err := json.Unmarshal([]byte(text), &l); err != nil {
		return err
	}
	points := 0
	c := config(l.URL)
	c.Trace = func(point string) {
		_, _ = fmt.Fprintln(os.Stdout, point)
		if points++; points == l.KillAt {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		}
	}
	i, err := oauth2.New(c)
	if err != nil {
		return err
	}
	defer i.Close()
	lease, err := i.Issue(ctx, l.Name, grant(`{"scopes": ["api:read", "brief"]}`))
	if err != nil {
		return err
	}
	return i.Revoke(ctx, l.Name, lease.Handle)
}

// testKilledAtEveryPoint kills the agent between any two outside effects. The
// next life knows the name and nothing else, and claims nothing: the token ends
// when the server said.
func testKilledAtEveryPoint(t *testing.T, w *world) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var points []string
	for n := 0; n <= len(points); n++ {
		text, err := json.Marshal(life{w.URL(), name(n), n})
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), exe)
		cmd.Env = append(os.Environ(), "OAUTH2_LIFE="+string(text))
		cmd.Stderr = os.Stderr
		out, err := cmd.Output()
		seen := strings.Fields(string(out))
		if n == 0 {
			if points = seen; err != nil || len(points) != 2 {
				t.Fatalf("a life without a kill: %v, points %v, want 2", err, points)
			}
			continue
		}
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL || len(seen) != n {
			t.Fatalf("life %d: ended with %v after %v, want a kill at %s", n, err, seen, points[n-1])
		}
		if err := w.issuer.Revoke(t.Context(), name(n), nil); !errors.Is(err, creds.ErrNotRevocable) {
			t.Errorf("killed at %s: Revoke: got %v, want ErrNotRevocable", points[n-1], err)
		}
		if p, err := w.issuer.Probe(t.Context(), name(n), nil); err == nil || errors.Is(err, creds.ErrStillValid) {
			t.Errorf("killed at %s: Probe: got %+v and %v, want that nobody can say", points[n-1], p, err)
		}
	}
}
