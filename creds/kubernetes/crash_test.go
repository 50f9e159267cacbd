package kubernetes_test

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/kubernetes"
)

// A life is what the process that is to be killed does: issue and revoke.
type life struct {
	Address, CAFile, Token, Name string
	KillAt                       int // point at which it dies; 0 is never
}

func TestMain(m *testing.M) {
	if text := os.Getenv("KUBERNETES_LIFE"); text != "" {
		if err := live(text); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	flag.Parse()
	// They wait, and do not compute.
	if err := flag.Set("test.parallel", "32"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
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
	i, err := kubernetes.New(kubernetes.Config{
		Address: l.Address, CAFile: l.CAFile, Namespace: namespace, Account: "job", Owner: owner,
		Token: func() (creds.Secret, error) { return creds.NewSecret(l.Token), nil },
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
	lease, err := i.Issue(ctx, l.Name, grant(`{}`))
	if err != nil {
		return err
	}
	return i.Revoke(ctx, l.Name, lease.Handle)
}

// testKilledAtEveryPoint kills the agent between any two outside effects. The next
// life knows the name and nothing else, or only what the cluster lists.
func testKilledAtEveryPoint(t *testing.T, w *world) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var points []string
	for n := 0; n <= len(points); n++ {
		l := life{w.Address(), w.CAFile(), w.token, fmt.Sprintf("crash-%d", n), n}
		text, err := json.Marshal(l)
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), exe)
		cmd.Env = append(os.Environ(), "KUBERNETES_LIFE="+string(text))
		cmd.Stderr = os.Stderr
		out, err := cmd.Output()
		seen := strings.Fields(string(out))
		if n == 0 {
			if points = seen; err != nil || len(points) != 3 {
				t.Fatalf("a life without a kill: %v, points %v, want 3", err, points)
			}
			continue
		}
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL || len(seen) != n {
			t.Fatalf("life %d: ended with %v after %v, want a kill at %s", n, err, seen, points[n-1])
		}
		there := func() bool {
			infos, err := w.issuer.List(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			return slices.ContainsFunc(infos, func(i creds.Info) bool { return i.Name == l.Name })
		}
		if got, want := there(), points[n-1] != "kubernetes.revoke"; got != want {
			t.Errorf("killed at %s: listed %v, want %v", points[n-1], got, want)
		}
		if err := w.issuer.Revoke(t.Context(), l.Name, nil); err != nil {
			t.Errorf("killed at %s: Revoke: %v", points[n-1], err)
		}
		p, err := w.issuer.Probe(t.Context(), l.Name, nil)
		if err != nil || !strings.Contains(p.How, "was not tried") || there() {
			t.Errorf("killed at %s: Probe: got %+v and %v, want a proof that says what it rests on", points[n-1], p, err)
		}
	}
}
