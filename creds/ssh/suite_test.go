package ssh_test

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/credstest"
	"github.com/mayfly-ci/mayfly/creds/ssh"
)

// TestOneServer runs, one after the other, all that can share a server.
func TestOneServer(t *testing.T) {
	w := newWorld(t, "-t", "ed25519")
	for _, test := range []struct {
		name string
		run  func(*testing.T, *world)
	}{
		{"Narrowed", testNarrowed},
		{"NotTrusted", testNotTrusted},
		{"WrongHostKey", testWrongHostKey},
		{"BrokenServerIsNoProof", testBrokenServerIsNoProof},
		{"PublishedByACommand", testPublishedByACommand},
		{"ListForgets", testListForgets},
		{"KilledAtEveryPoint", testKilledAtEveryPoint},
		{"Down", testDown},
		{"Conformance", testConformance},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, &world{w.Server, t, w.dir, w.issuer}) })
	}
}

func testConformance(t *testing.T, w *world) {
	var bad []json.RawMessage
	for _, s := range []string{
		`{}`, `[]`, `{"principals": []}`, `{"principals": ["deploy"]} {}`, `{"principals": ["root"]}`, `{"principals": ["deploy", "root"]}`,
		`{"principals": ["deploy"], "extensions": ["permit-port-forwarding"]}`, `{"principals": ["deploy"], "sources": ["example.com"]}`,
		`{"principals": ["deploy"], "sources": ["10.0.0.0/40"]}`, `{"principals": ["deploy"], "command": "a\nb"}`,
	} {
		bad = append(bad, json.RawMessage(s))
	}
	// What is down is the server, and the way that the list takes to it.
	fault := filepath.Join(t.TempDir(), "fault")
	away := func(kind string, server func(context.Context) error) func(context.Context) error {
		return func(ctx context.Context) error {
			return errors.Join(os.WriteFile(fault, []byte(kind), 0o600), server(ctx))
		}
	}
	back := func(server func(context.Context) error) func(context.Context) error {
		return func(ctx context.Context) error { return errors.Join(os.Remove(fault), server(ctx)) }
	}
	c := w.config()
	c.List, c.Publish = "", []string{"/bin/sh", "-c", `
		while test "$(cat "$1" 2>/dev/null)" = frozen; do sleep 0.05; done
		test ! -e "$1" && cat >"$2.new" && mv "$2.new" "$2"`, "publish", fault, w.List()}
	h := credstest.Harness{
		Issuer: w.newIssuer(c), Owner: owner, Scope: json.RawMessage(rootScope), BadScopes: bad, Use: w.use,
		Down: away("down", w.Down), Up: back(w.Up), Freeze: away("frozen", w.Freeze), Thaw: back(w.Thaw),
	}
	credstest.Run(t, func(*testing.T) credstest.Harness { return h })
}

// testNarrowed: the certificate is what the grant says, to a client and a server
// that others wrote.
func testNarrowed(t *testing.T, w *world) {
	l := w.issue("narrow", `{"principals": ["deploy"], "command": "echo forced", "sources": ["127.0.0.0/8"]}`)
	if out, err := w.ssh(t.Context(), l, "echo", "asked"); err != nil || out != "forced\n" {
		t.Errorf("a command of the job's own: got %q and %v, want the forced one", out, err)
	}
	if _, err := w.ssh(t.Context(), l, "-tt", "true"); err == nil {
		t.Log("a terminal was refused softly") // the client goes on without one
	}
	file := filepath.Join(t.TempDir(), "cert.pub")
	if err := os.WriteFile(file, []byte(l.Facts["certificate"]), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("ssh-keygen", "-L", "-f", file).CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"user certificate", "Serial: " + l.Facts["serial"], "force-command echo forced", "source-address 127.0.0.0/8",
		"Extensions: (none)", `Key ID: "mayfly inst-1 narrow o/r refs/heads/main mf-1"`, "deploy",
	} {
		if !strings.Contains(string(out), want) {
			t.Errorf("certificate: want %q in\n%s", want, out)
		}
	}
	w.wantDead("narrow", l)
	if !strings.Contains(w.Log(), "narrow o/r refs/heads/main mf-1") {
		t.Error("the server's log does not say whose login it was")
	}
	// From elsewhere it is worth nothing, and the issuer says so at once.
	if _, err := w.issuer.Issue(t.Context(), "elsewhere", grant(`{"principals": ["deploy"], "sources": ["192.0.2.0/24"]}`)); err == nil || !strings.Contains(err.Error(), "sources") {
		t.Errorf("Issue for another network: got %v", err)
	}
	long := grant(rootScope)
	long.Expires = time.Now().Add(100 * time.Hour)
	l, err = w.issuer.Issue(t.Context(), "long", long)
	if err != nil || time.Until(l.ExpiresAt) > ssh.DefaultLongest {
		t.Errorf("a grant of 100 hours: got %v, until %v, want a day at most", err, l.ExpiresAt)
	}
	w.wantDead("long", l)
}

// wantDead revokes and wants a proof by login, with and without the handle.
func (w *world) wantDead(name string, l creds.Lease) {
	w.t.Helper()
	if err := w.issuer.Revoke(w.t.Context(), name, l.Handle); err != nil {
		w.t.Fatalf("Revoke: %v", err)
	}
	for _, h := range [][]byte{l.Handle, nil} {
		p, err := w.issuer.Probe(w.t.Context(), name, h)
		if err != nil || !strings.Contains(p.How, "login as root") || !strings.Contains(p.How, l.Facts["serial"]) || !strings.Contains(p.Refusal, "unable to authenticate") {
			w.t.Errorf("Probe, with a handle: %v: got %+v and %v, want the refusal of a login", h != nil, p, err)
		}
	}
	if err := w.use(w.t.Context(), l); err == nil {
		w.t.Error("the certificate still works")
	}
}

// testNotTrusted: a server that does not know the authority is heard at once, and
// its refusal is never taken for a proof.
func testNotTrusted(t *testing.T, w *world) {
	c := w.config()
	c.CA = read(keyFile(t, t.TempDir(), "-t", "ed25519"))
	i := w.newIssuer(c)
	l, err := i.Issue(t.Context(), "stranger", grant(rootScope))
	if err == nil || !strings.Contains(err.Error(), "TrustedUserCAKeys") || len(l.Values) > 0 {
		t.Errorf("Issue: got %v, want to hear what is missing", err)
	}
	if p, err := i.Probe(t.Context(), "stranger", l.Handle); err == nil || errors.Is(err, creds.ErrStillValid) {
		t.Errorf("Probe: got %+v and %v, want that nobody can say", p, err)
	}
	if _, err := w.issuer.Issue(t.Context(), "principal", grant(`{"principals": ["nobody-has-this"]}`)); err == nil {
		t.Error("a principal that the server does not know gets in")
	}
}

func testWrongHostKey(t *testing.T, w *world) {
	other := filepath.Join(t.TempDir(), "known_hosts")
	key, err := os.ReadFile(filepath.Join(w.dir, "ca.pub"))
	if err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(w.Address())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(other, []byte("[127.0.0.1]:"+port+" "+string(key)), 0o600); err != nil {
		t.Fatal(err)
	}
	c := w.config()
	c.KnownHosts = other
	if _, err := w.newIssuer(c).Issue(t.Context(), "host", grant(rootScope)); err == nil || !strings.Contains(err.Error(), "key mismatch") {
		t.Errorf("Issue at a server with another key: got %v", err)
	}
}

// testBrokenServerIsNoProof: an sshd that cannot read its list refuses everybody.
// That says nothing of one certificate.
func testBrokenServerIsNoProof(t *testing.T, w *world) {
	l := w.issue("broken", rootScope)
	if err := os.Rename(w.List(), w.List()+".away"); err != nil {
		t.Fatal(err)
	}
	if err := w.use(t.Context(), l); err == nil {
		t.Fatal("harness: the server lets somebody in without its list")
	}
	p, err := w.issuer.Probe(t.Context(), "broken", l.Handle)
	if err == nil || errors.Is(err, creds.ErrStillValid) || !strings.Contains(err.Error(), "RevokedKeys") {
		t.Errorf("Probe: got %+v and %v, want that nobody can say", p, err)
	}
	w.wantDead("broken", l) // publishes it again
}

// testPublishedByACommand: what a command does with the list, and that its
// failure is one.
func testPublishedByACommand(t *testing.T, w *world) {
	c := w.config()
	c.List, c.Publish = "", []string{"/bin/sh", "-c", "cat > " + w.List() + ".new && mv " + w.List() + ".new " + w.List()}
	w.issuer = w.newIssuer(c)
	w.wantDead("command", w.issue("command", rootScope))
	c.Publish = []string{"/bin/sh", "-c", "echo no route >&2; exit 3"}
	if err := w.newIssuer(c).Revoke(t.Context(), "other", nil); err == nil || !strings.Contains(err.Error(), "no route") {
		t.Errorf("Revoke that is not published: got %v", err)
	}
}

// testListForgets: a serial stays for as long as its certificate would have been
// valid, and an hour; then it goes.
func testListForgets(t *testing.T, w *world) {
	c := w.config()
	c.List = filepath.Join(t.TempDir(), "list")
	c.Store = safe{filepath.Join(t.TempDir(), "revoked"), new(sync.Mutex)}
	now := time.Now()
	c.Now = func() time.Time { return now }
	i := w.newIssuer(c)
	size := func(name string) int64 {
		if err := i.Revoke(t.Context(), name, nil); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(c.List)
		if err != nil {
			t.Fatal(err)
		}
		return info.Size()
	}
	one, two := size("one"), size("two")
	if again := size("two"); two-one != 8 || again != two {
		t.Errorf("list of one, two and again two: %d, %d, %d bytes, want 8 more and no more", one, two, again)
	}
	now = now.Add(ssh.DefaultLongest + 2*time.Hour)
	if later := size("three"); later != one {
		t.Errorf("list of one, after all have expired: %d bytes, want %d", later, one)
	}
}

// testDown: the server is away while the job ends. The list is written, and
// nothing is called dead until it is seen.
func testDown(t *testing.T, w *world) {
	l := w.issue("down", rootScope)
	if err := w.Down(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := w.issuer.Revoke(t.Context(), "down", l.Handle); err != nil {
		t.Error(err)
	}
	if p, err := w.issuer.Probe(t.Context(), "down", l.Handle); err == nil {
		t.Errorf("Probe while the server is down: got %+v", p)
	}
	if err := w.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.issuer = w.newIssuer(w.config()) // another life
	w.wantDead("down", l)
}
