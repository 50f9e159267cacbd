package ssh_test

import (
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/credstest"
	"github.com/mayfly-ci/mayfly/creds/ssh"
)

// A life is what the agent that is killed needs.
type life struct{ Dir, Address, KnownHosts, List string }

func TestMain(m *testing.M) {
	credstest.Main(m, func(l life, trace func(string)) (creds.Issuer, creds.Grant, error) {
		i, err := ssh.New(ssh.Config{
			CA: read(filepath.Join(l.Dir, "ca")), Principals: []string{"deploy"}, Address: l.Address, KnownHosts: l.KnownHosts, User: "root",
			List: l.List, Owner: owner, Store: safe{filepath.Join(l.Dir, "revoked"), new(sync.Mutex)}, Trace: trace,
		})
		return i, grant(rootScope), err
	})
}

// testKilledAtEveryPoint: the next life knows the name and nothing else.
func testKilledAtEveryPoint(t *testing.T, w *world) {
	credstest.KilledAtEveryPoint(t, life{w.dir, w.Address(), w.KnownHosts(), w.List()}, 3, func(point, name string, _ []byte) {
		if err := w.issuer.Revoke(t.Context(), name, nil); err != nil {
			t.Errorf("killed at %s: Revoke: %v", point, err)
		}
		p, err := w.issuer.Probe(t.Context(), name, nil)
		if err != nil || !strings.Contains(p.How, "its own key is not known") {
			t.Errorf("killed at %s: Probe: got %+v and %v, want a proof that says what it rests on", point, p, err)
		}
	})
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
