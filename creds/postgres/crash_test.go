package postgres_test

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

	"github.com/jackc/pgx/v5"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/postgres"
)

// A life is what the process that is to be killed does: issue, work, revoke.
type life struct {
	Config   postgres.Config
	Password string
	Name     string
	Scope    string
	KillAt   int // point at which it dies; 0 is never
}

func TestMain(m *testing.M) {
	if text := os.Getenv("POSTGRES_LIFE"); text != "" {
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
	l.Config.Password, l.Config.Owner = creds.NewSecret(l.Password), owner
	l.Config.Trace = func(point string) {
		_, _ = fmt.Fprintln(os.Stdout, point)
		if points++; points == l.KillAt {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		}
	}
	i, err := postgres.New(l.Config)
	if err != nil {
		return err
	}
	defer i.Close()
	lease, err := i.Issue(ctx, l.Name, grant(l.Scope))
	if err != nil {
		return err
	}
	for _, database := range []string{"app", "other"} {
		conn, err := pgx.Connect(ctx, strings.Replace(lease.Values["url"].Reveal(), "/app?", "/"+database+"?", 1))
		if err != nil {
			return err
		}
		if _, err := conn.Exec(ctx, "CREATE TABLE left_behind (a int)"); err != nil {
			return err
		}
	}
	if err := i.Revoke(ctx, l.Name, lease.Handle); err != nil {
		return err
	}
	_, err = i.Probe(ctx, l.Name, lease.Handle)
	return err
}

// testKilledAtEveryPoint kills the agent between any two outside effects. The
// next life knows the name and nothing else.
func testKilledAtEveryPoint(t *testing.T, w *world) {
	w.run("other", "GRANT CREATE ON SCHEMA public TO PUBLIC")
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var points []string
	for n := 0; n <= len(points); n++ {
		name := fmt.Sprintf("crash-%d", n)
		text, err := json.Marshal(life{w.config(), w.Password(), name, goodScope, n})
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), exe)
		cmd.Env = append(os.Environ(), "POSTGRES_LIFE="+string(text))
		cmd.Stderr = os.Stderr
		out, err := cmd.Output()
		seen := strings.Fields(string(out))
		if n == 0 {
			if points = seen; err != nil || len(points) < 9 {
				t.Fatalf("a life without a kill: %v, points %v, want at least 9", err, points)
			}
			continue
		}
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL || len(seen) != n {
			t.Fatalf("life %d: ended with %v after %v, want a kill at %s", n, err, seen, points[n-1])
		}
		w.recoverFrom(points[n-1], name)
	}
	t.Logf("killed at %v", points)
}

// recoverFrom is what the next life does, and looks at what is left.
func (w *world) recoverFrom(point, name string) {
	w.t.Helper()
	if err := w.issuer.Revoke(w.t.Context(), name, nil); err != nil {
		w.t.Errorf("killed at %s: Revoke: %v", point, err)
	}
	p, err := w.issuer.Probe(w.t.Context(), name, nil)
	if err != nil || !strings.Contains(p.How, "no login tried") || !strings.Contains(p.Refusal, "no such role") {
		w.t.Errorf("killed at %s: Probe: got %+v and %v, want a proof that says what it rests on", point, p, err)
	}
	for _, database := range []string{"app", "other"} {
		if got := w.ask(database, "SELECT count(*)::text FROM pg_class WHERE relname = 'left_behind'"); got != "0" {
			w.t.Errorf("killed at %s: table left in %s", point, database)
		}
	}
	infos, err := w.issuer.List(w.t.Context())
	if err != nil || slices.ContainsFunc(infos, func(i creds.Info) bool { return i.Name == name }) {
		w.t.Errorf("killed at %s: List: got %+v and %v, want %s not in it", point, infos, err, name)
	}
}
