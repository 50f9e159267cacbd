package gitea_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/gitea"
)

// A life is what the process that is to be killed does: issue and revoke.
type life struct {
	URL, Name string
	KillAt    int // point at which it dies; 0 is never
}

func TestMain(m *testing.M) {
	if text := os.Getenv("GITEA_LIFE"); text != "" {
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
	i, err := gitea.New(gitea.Config{
		URL: l.URL, User: bot, Password: give(password), Owner: owner, Scopes: []string{"read:repository", "read:user"},
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
	lease, err := i.Issue(ctx, l.Name, grant(readScope))
	if err != nil {
		return err
	}
	return i.Revoke(ctx, l.Name, lease.Handle)
}

// testKilledAtEveryPoint kills the agent between any two outside effects. The
// next life knows the name and nothing else.
func testKilledAtEveryPoint(t *testing.T, w *world) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var points []string
	for n := 0; n <= len(points); n++ {
		l := life{w.URL(), fmt.Sprintf("crash-%d", n), n}
		text, err := json.Marshal(l)
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), exe)
		cmd.Env = append(os.Environ(), "GITEA_LIFE="+string(text))
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
		w.recoverFrom(points[n-1], l.Name)
	}
}

// recoverFrom is what the next life does, and looks at what is left.
func (w *world) recoverFrom(point, name string) {
	w.t.Helper()
	_, err := w.issuer.Probe(w.t.Context(), name, nil)
	if alive := point == "gitea.token"; errors.Is(err, creds.ErrStillValid) != alive {
		w.t.Errorf("killed at %s: Probe: got %v, alive: %v", point, err, alive)
	}
	if err := w.issuer.Revoke(w.t.Context(), name, nil); err != nil {
		w.t.Errorf("killed at %s: Revoke: %v", point, err)
	}
	p, err := w.issuer.Probe(w.t.Context(), name, nil)
	if err != nil || !strings.Contains(p.How, "no use tried") {
		w.t.Errorf("killed at %s: Probe: got %+v and %v, want a proof that says what it rests on", point, p, err)
	}
	infos, err := w.issuer.List(w.t.Context())
	if err != nil || slices.ContainsFunc(infos, func(i creds.Info) bool { return i.Name == name }) {
		w.t.Errorf("killed at %s: List: got %+v and %v, want %s not in it", point, infos, err, name)
	}
}
