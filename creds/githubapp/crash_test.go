package githubapp_test

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
	"github.com/mayfly-ci/mayfly/creds/githubapp"
)

// A life is what the process that is to be killed does: issue, keep the handle as
// the journal does, and revoke.
type life struct {
	Address, Key, Name, Journal string
	KillAt                      int // point at which it dies; 0 is never
}

func TestMain(m *testing.M) {
	if text := os.Getenv("GITHUBAPP_LIFE"); text != "" {
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
	i, err := githubapp.New(githubapp.Config{
		Address: l.Address, App: clientID, Installation: installation,
		Key: func() (creds.Secret, error) { return creds.NewSecret(l.Key), nil },
		Trace: func(point string) {
			_, _ = fmt.Fprintln(os.Stdout, point)
			if points++; points == l.KillAt {
				_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			}
		},
	})
	if err != nil {
		return err
	}
	defer i.Close()
	lease, err := i.Issue(ctx, l.Name, grant(oneScope))
	if err != nil {
		return err
	}
	if err := os.WriteFile(l.Journal, lease.Handle, 0o600); err != nil {
		return err
	}
	return i.Revoke(ctx, l.Name, lease.Handle)
}

// TestKilledAtEveryPoint: what is in the journal is revoked; what is not is in
// nobody's hands and ends by itself, which is said.
func TestKilledAtEveryPoint(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	i := newIssuer(t, f.config())
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var points []string
	for n := 0; n <= len(points); n++ {
		l := life{f.URL, f.pem(), fmt.Sprintf("crash-%d", n), filepath.Join(t.TempDir(), "journal"), n}
		text, err := json.Marshal(l)
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), exe)
		cmd.Env = append(os.Environ(), "GITHUBAPP_LIFE="+string(text))
		cmd.Stderr = os.Stderr
		out, err := cmd.Output()
		seen := strings.Fields(string(out))
		if n == 0 {
			if points = seen; err != nil || len(points) != 2 || f.live() != 0 {
				t.Fatalf("a life without a kill: %v, points %v, want 2", err, points)
			}
			continue
		}
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL || len(seen) != n {
			t.Fatalf("life %d: ended with %v after %v, want a kill at %s", n, err, seen, points[n-1])
		}
		handle, err := os.ReadFile(l.Journal)
		if (err != nil) != (points[n-1] == "githubapp.token") {
			t.Fatalf("killed at %s: journal: %v", points[n-1], err)
		}
		if err != nil {
			if err := i.Revoke(t.Context(), l.Name, nil); !errors.Is(err, creds.ErrNotRevocable) {
				t.Errorf("killed at %s: Revoke: got %v, want ErrNotRevocable", points[n-1], err)
			}
			f.set(func() { clear(f.tokens) }) // it ends by itself
			continue
		}
		if err := i.Revoke(t.Context(), l.Name, handle); err != nil {
			t.Errorf("killed at %s: Revoke: %v", points[n-1], err)
		}
		if _, err := i.Probe(t.Context(), l.Name, handle); err != nil || f.live() != 0 {
			t.Errorf("killed at %s: Probe: %v, %d tokens live", points[n-1], err, f.live())
		}
	}
}
