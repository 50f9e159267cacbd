package aws_test

import (
	"bytes"
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
	"github.com/mayfly-ci/mayfly/creds/aws"
	"github.com/mayfly-ci/mayfly/creds/oidc"
)

// A life is what the process that is to be killed does: issue, keep the handle as
// the journal does, and revoke.
type life struct {
	Service, Endpoint, Region, Role, CAFile string
	RevokerKey, RevokerSecret               string
	URL                                     string // of the identity
	Keys                                    []byte
	Name, Journal                           string
	KillAt                                  int // point at which it dies; 0 is never
}

func TestMain(m *testing.M) {
	if text := os.Getenv("AWS_LIFE"); text != "" {
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
	signer, err := oidc.New(oidc.Config{URL: l.URL, Owner: owner, Store: &safe{l.Keys}})
	if err != nil {
		return err
	}
	points := 0
	c := aws.Config{
		Service: l.Service, Endpoint: l.Endpoint, Region: l.Region, Role: l.Role, CAFile: l.CAFile, RevokerKey: l.RevokerKey,
		Sign: (&identity{Issuer: signer}).sign,
		Trace: func(point string) {
			_, _ = fmt.Fprintln(os.Stdout, point)
			if points++; points == l.KillAt {
				_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			}
		},
	}
	if l.RevokerKey != "" {
		c.RevokerSecret = func() (creds.Secret, error) { return creds.NewSecret(l.RevokerSecret), nil }
	}
	i, err := aws.New(c)
	if err != nil {
		return err
	}
	defer i.Close()
	lease, err := i.Issue(ctx, l.Name, grant(mainScope))
	if err != nil {
		return err
	}
	if err := os.WriteFile(l.Journal, lease.Handle, 0o600); err != nil {
		return err
	}
	return i.Revoke(ctx, l.Name, lease.Handle)
}

// killAtEveryPoint kills the agent between any two outside effects. recover gets
// what the journal has.
func killAtEveryPoint(t *testing.T, l life, recovered func(point, name string, handle []byte)) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var points []string
	for n := 0; n <= len(points); n++ {
		l.Name, l.KillAt, l.Journal = fmt.Sprintf("crash-%d", n), n, filepath.Join(t.TempDir(), "journal")
		text, err := json.Marshal(l)
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), exe)
		cmd.Env = append(os.Environ(), "AWS_LIFE="+string(text))
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
		handle, err := os.ReadFile(l.Journal)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		recovered(points[n-1], l.Name, bytes.TrimSpace(handle))
	}
}

// testKilledAtMinIO: what is in the journal is taken back; what is not is in nobody's
// hands and ends by itself, which is said.
func testKilledAtMinIO(t *testing.T, w *world) {
	c := w.config()
	l := life{Service: c.Service, Endpoint: c.Endpoint, Role: c.Role, CAFile: c.CAFile, URL: w.identity.url, Keys: w.identity.keys.b}
	killAtEveryPoint(t, l, func(point, name string, handle []byte) {
		err := w.issuer.Revoke(t.Context(), name, handle)
		if handle == nil {
			if point != "aws.session" || !errors.Is(err, creds.ErrNotRevocable) {
				t.Errorf("killed at %s, no handle: Revoke: got %v, want ErrNotRevocable", point, err)
			}
			return
		}
		if err != nil {
			t.Errorf("killed at %s: Revoke: %v", point, err)
		}
		if _, err := w.issuer.Probe(t.Context(), name, handle); err != nil {
			t.Errorf("killed at %s: Probe: %v", point, err)
		}
	})
}
