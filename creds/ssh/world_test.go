package ssh_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/ssh"
	"github.com/mayfly-ci/mayfly/test/sshdtest"
)

const (
	owner     = "inst-1"
	rootScope = `{"principals": ["deploy"]}`
)

// A safe keeps what is revoked in a file, so that it outlives a process.
type safe struct {
	path string
	mu   *sync.Mutex
}

func (s safe) Load() ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, err := os.ReadFile(s.path)
	if os.IsNotExist(err) {
		return nil, nil
	}
	return b, err
}

func (s safe) Save(b []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return os.WriteFile(s.path, b, 0o600)
}

// A world is an authority and an sshd that trusts it.
type world struct {
	*sshdtest.Server
	t      testing.TB
	dir    string
	issuer *ssh.Issuer
}

// keyFile makes a key with ssh-keygen, as an operator would.
func keyFile(t testing.TB, dir string, options ...string) string {
	t.Helper()
	path := filepath.Join(dir, "ca")
	out, err := exec.Command("ssh-keygen", append([]string{"-q", "-N", "", "-f", path}, options...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("ssh-keygen: %v: %s", err, out)
	}
	return path
}

func read(path string) func() (creds.Secret, error) {
	return func() (creds.Secret, error) {
		b, err := os.ReadFile(path)
		return creds.NewSecret(string(bytes.TrimRight(b, "\n"))), err
	}
}

func newWorld(t testing.TB, kind ...string) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir()}
	keyFile(t, w.dir, kind...)
	public, err := os.ReadFile(filepath.Join(w.dir, "ca.pub"))
	if err != nil {
		t.Fatal(err)
	}
	w.Server = sshdtest.Start(t, string(bytes.TrimSpace(public)), "deploy\n")
	w.issuer = w.newIssuer(w.config())
	if err := w.issuer.Published(t.Context()); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) config() ssh.Config {
	return ssh.Config{
		CA: read(filepath.Join(w.dir, "ca")), Principals: []string{"deploy", "nobody-has-this"}, Extensions: []string{"permit-pty"},
		Address: w.Address(), KnownHosts: w.KnownHosts(), User: "root", List: w.List(),
		Owner: owner, Store: safe{filepath.Join(w.dir, "revoked"), new(sync.Mutex)},
	}
}

func (w *world) newIssuer(c ssh.Config) *ssh.Issuer {
	w.t.Helper()
	i, err := ssh.New(c)
	if err != nil {
		w.t.Fatal(err)
	}
	return i
}

func grant(scope string) creds.Grant {
	return creds.Grant{
		Subject: creds.Subject{Provider: "local", Repository: "o/r", Ref: "refs/heads/main", Job: "mf-1"},
		Scope:   json.RawMessage(scope), Expires: time.Now().Add(10 * time.Minute),
	}
}

func (w *world) issue(name, scope string) creds.Lease {
	w.t.Helper()
	l, err := w.issuer.Issue(w.t.Context(), name, grant(scope))
	if err != nil {
		w.t.Fatalf("Issue: %v", err)
	}
	return l
}

// ssh runs OpenSSH's own client with the files that a job would have.
func (w *world) ssh(ctx context.Context, l creds.Lease, args ...string) (string, error) {
	dir, err := os.MkdirTemp(w.dir, "job-")
	if err != nil {
		return "", err
	}
	id := filepath.Join(dir, "id")
	if err := os.WriteFile(id, []byte(l.Values["private_key"].Reveal()), 0o600); err != nil {
		return "", err
	}
	if err := os.WriteFile(id+"-cert.pub", []byte(l.Facts["certificate"]+"\n"), 0o600); err != nil {
		return "", err
	}
	host, port, err := net.SplitHostPort(w.Address())
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, "ssh", append([]string{
		"-F", "none", "-i", id, "-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none", "-o", "BatchMode=yes",
		"-o", "UserKnownHostsFile=" + w.KnownHosts(), "-o", "StrictHostKeyChecking=yes", "-p", port, "root@" + host,
	}, args...)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("ssh: %w: %s", err, bytes.TrimSpace(out))
	}
	return string(out), nil
}

func (w *world) use(ctx context.Context, l creds.Lease) error {
	_, err := w.ssh(ctx, l, "true")
	return err
}
