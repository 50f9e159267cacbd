package ssh_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds/ssh"
)

// A life is what the process that is to be killed does: issue and revoke.
type life struct {
	Dir, Address, KnownHosts, List, Name string
	KillAt                               int // point at which it dies; 0 is never
}

func TestMain(m *testing.M) {
	if text := os.Getenv("SSH_LIFE"); text != "" {
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
	i, err := ssh.New(ssh.Config{
		CA: read(filepath.Join(l.Dir, "ca")), Principals: []string{"deploy"}, Address: l.Address, KnownHosts: l.KnownHosts, User: "root",
		List: l.List, Owner: owner, Store: safe{filepath.Join(l.Dir, "revoked"), new(sync.Mutex)},
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
	lease, err := i.Issue(ctx, l.Name, grant(rootScope))
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
		name := fmt.Sprintf("crash-%d", n)
		text, err := json.Marshal(life{w.dir, w.Address(), w.KnownHosts(), w.List(), name, n})
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), exe)
		cmd.Env = append(os.Environ(), "SSH_LIFE="+string(text))
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
		if err := w.issuer.Revoke(t.Context(), name, nil); err != nil {
			t.Errorf("killed at %s: Revoke: %v", points[n-1], err)
		}
		p, err := w.issuer.Probe(t.Context(), name, nil)
		if err != nil || !strings.Contains(p.How, "its own key is not known") {
			t.Errorf("killed at %s: Probe: got %+v and %v, want a proof that says what it rests on", points[n-1], p, err)
		}
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	good := ssh.Config{
		CA: read("ca"), Principals: []string{"deploy"}, Address: "a.example:22", KnownHosts: "k", List: "l",
		Owner: owner, Store: safe{"s", new(sync.Mutex)}, Longest: time.Hour,
	}
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	for want, change := range map[string]func(*ssh.Config){
		"ca_private_key_file":  func(c *ssh.Config) { c.CA = nil },
		"principals: missing":  func(c *ssh.Config) { c.Principals = nil },
		`principals: "a,b"`:    func(c *ssh.Config) { c.Principals = []string{"a,b"} },
		`extensions: "permit"`: func(c *ssh.Config) { c.Extensions = []string{"permit"} },
		`address ""`:           func(c *ssh.Config) { c.Address = "" },
		"known_hosts":          func(c *ssh.Config) { c.KnownHosts = "" },
		"user":                 func(c *ssh.Config) { c.User = "a b" },
		"krl_file":             func(c *ssh.Config) { c.List = "" },
		"publish":              func(c *ssh.Config) { c.Publish = []string{"scp"} },
		"longest":              func(c *ssh.Config) { c.Longest = time.Second },
		"owner":                func(c *ssh.Config) { c.Owner = "" },
		"store":                func(c *ssh.Config) { c.Store = nil },
	} {
		c := good
		change(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v", want, err)
		}
	}
}
