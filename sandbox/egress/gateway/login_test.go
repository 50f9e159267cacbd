package gateway_test

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/egress/gateway"
)

// A sshWorld is a box that may do anything at a server that does what handle does
// with each command.
type sshWorld struct {
	*box
	port uint16
}

func newSSHWorld(t *testing.T, c gateway.Config, handle func(conn net.Conn, ch ssh.Channel, command string)) *sshWorld {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	host, err := ssh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(private, "")
	if err != nil {
		t.Fatal(err)
	}
	config := &ssh.ServerConfig{PublicKeyCallback: func(ssh.ConnMetadata, ssh.PublicKey) (*ssh.Permissions, error) { return nil, nil }}
	config.AddHostKey(host)
	port := server(t, func(conn net.Conn) {
		_ = conn.SetDeadline(time.Time{}) // so much takes what it takes
		_, channels, requests, err := ssh.NewServerConn(conn, config)
		if err != nil {
			return
		}
		go ssh.DiscardRequests(requests) // ends with the connection
		for offer := range channels {
			ch, requests, err := offer.Accept()
			if err != nil {
				return
			}
			go func() { // ends with the connection
				for r := range requests {
					_ = r.Reply(true, nil)
					if r.Type == "exec" {
						go handle(conn, ch, string(r.Payload[4:])) // as the above
					}
				}
			}()
		}
	})
	r := tcpRule("git.example", port)
	r.Protocol = egress.SSH
	r.Inject = &egress.Injection{Lease: "deploy", As: egress.SSHKey, User: "git", Value: creds.NewSecret(string(pem.EncodeToMemory(block))), Placeholder: "placeholder-of-tests"}
	r.Session = &egress.Session{HostKeys: []string{strings.TrimSpace(string(ssh.MarshalAuthorizedKey(host.PublicKey())))}, Commands: []string{"*"}, Shell: true}
	return &sshWorld{newBox(t, c, r), port}
}

// client is one of the job's.
func (w *sshWorld) client() *ssh.Client {
	w.tb.Helper()
	conn, err := w.connect("git.example", w.port)
	if err != nil {
		w.tb.Fatal(err)
	}
	_ = conn.SetDeadline(time.Time{}) // as above
	c, channels, requests, err := ssh.NewClientConn(conn, "git.example", &ssh.ClientConfig{User: "git", HostKeyCallback: ssh.InsecureIgnoreHostKey()})
	if err != nil {
		w.tb.Fatal(err)
	}
	client := ssh.NewClient(c, channels, requests)
	w.tb.Cleanup(func() { client.Close() })
	return client
}

// session starts a command.
func (w *sshWorld) session(client *ssh.Client, command string) (*ssh.Session, io.WriteCloser, io.Reader) {
	w.tb.Helper()
	s, err := client.NewSession()
	if err != nil {
		w.tb.Fatal(err)
	}
	in, err := s.StdinPipe()
	if err != nil {
		w.tb.Fatal(err)
	}
	out, err := s.StdoutPipe()
	if err != nil {
		w.tb.Fatal(err)
	}
	if err := s.Start(command); err != nil {
		w.tb.Fatal(err)
	}
	return s, in, out
}

func exit(ch ssh.Channel, status uint32) {
	_, _ = ch.SendRequest("exit-status", false, ssh.Marshal(struct{ Status uint32 }{status}))
	_ = ch.Close()
}

// TestSSHStream: half a gigabyte passes, half of it each way, without being kept.
func TestSSHStream(t *testing.T) {
	const size = 1 << 28
	w := newSSHWorld(t, gateway.Config{}, func(_ net.Conn, ch ssh.Channel, command string) {
		if command == "send" {
			_, _ = io.CopyN(ch, zeros{}, size)
		} else {
			_, _ = io.Copy(io.Discard, ch)
		}
		exit(ch, 0)
	})
	peak := uint64(0)
	look := func() {
		var m runtime.MemStats
		runtime.GC() // what is held, and not what lies about
		runtime.ReadMemStats(&m)
		peak = max(peak, m.HeapAlloc)
	}
	look()
	before := peak
	c := w.client()
	s, _, out := w.session(c, "send")
	n := int64(0)
	for range 64 {
		part, err := io.CopyN(io.Discard, out, size/64)
		if n += part; err != nil {
			t.Fatalf("after %d bytes: %v", n, err)
		}
		look()
	}
	if err := s.Wait(); err != nil {
		t.Errorf("send: %v", err)
	}
	s, in, _ := w.session(c, "take")
	for range 64 {
		if _, err := io.CopyN(in, zeros{}, size/64); err != nil {
			t.Fatal(err)
		}
		look()
	}
	if err := errors.Join(in.Close(), s.Wait()); err != nil {
		t.Errorf("take: %v", err)
	}
	// Four windows of 2 MiB and what is not collected yet, of both ends too.
	if grown := peak - before; grown > 64<<20 {
		t.Errorf("%d MiB were held while 512 MiB passed", grown>>20)
	}
	w.await("line of what was sent", has(func(l egress.Line) bool { return l.Verdict == egress.Ended && l.Received == size }))
	w.await("line of what was taken", has(func(l egress.Line) bool { return l.Verdict == egress.Ended && l.Sent == size }))
}

// TestSSHEnds: each end is told of the other's as it was.
func TestSSHEnds(t *testing.T) {
	gone := make(chan struct{}, 1)
	w := newSSHWorld(t, gateway.Config{}, func(conn net.Conn, ch ssh.Channel, command string) {
		switch command {
		case "half": // says all, and then reads
			fmt.Fprint(ch, "said")
			_ = ch.CloseWrite()
			b, _ := io.ReadAll(ch)
			exit(ch, uint32(len(b)))
		case "die":
			fmt.Fprint(ch, "part")
			_ = conn.Close()
		case "signal":
			_, _ = ch.SendRequest("exit-signal", false, ssh.Marshal(struct {
				Signal, Message, Language string
				Core                      bool
			}{"KILL", "", "", false}))
			_ = ch.Close()
		case "wait":
			fmt.Fprint(ch, "here")
			_, _ = io.Copy(io.Discard, ch)
			gone <- struct{}{}
		}
	})
	s, in, out := w.session(w.client(), "half")
	b, err := io.ReadAll(out)
	if err != nil || string(b) != "said" {
		t.Fatalf("half: got %q %v", b, err)
	}
	fmt.Fprint(in, "12345")
	in.Close()
	if e := (*ssh.ExitError)(nil); !errors.As(s.Wait(), &e) || e.ExitStatus() != 5 {
		t.Errorf("half: got %v, want exit status 5", e)
	}
	s, _, out = w.session(w.client(), "die")
	b, _ = io.ReadAll(out)
	if e := (*ssh.ExitMissingError)(nil); !errors.As(s.Wait(), &e) || string(b) != "part" {
		t.Errorf("die: got %q, and an exit status", b)
	}
	w.await("line of what died", has(func(l egress.Line) bool {
		return l.Verdict == egress.Ended && l.Request.Path == "die" && l.Reason == "ended without an exit status"
	}))
	s, _, _ = w.session(w.client(), "signal")
	if e := (*ssh.ExitError)(nil); !errors.As(s.Wait(), &e) || e.Signal() != "KILL" {
		t.Errorf("signal: got %v", e)
	}
	c := w.client()
	_, _, out = w.session(c, "wait")
	if _, err := io.ReadFull(out, make([]byte, 4)); err != nil {
		t.Fatal(err)
	}
	c.Close()
	select {
	case <-gone:
	case <-time.After(patience):
		t.Error("the destination is not told that the job went")
	}
}

// TestSSHTerminal: what a terminal needs passes where the rule says so.
func TestSSHTerminal(t *testing.T) {
	w := newSSHWorld(t, gateway.Config{}, func(_ net.Conn, ch ssh.Channel, _ string) {
		_, _ = io.Copy(io.Discard, ch)
		exit(ch, 0)
	})
	s, err := w.client().NewSession()
	if err != nil {
		t.Fatal(err)
	}
	in, err := s.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.RequestPty("xterm", 24, 80, nil), s.Start("x"), s.WindowChange(50, 100), s.Signal(ssh.SIGINT), in.Close(), s.Wait()); err != nil {
		t.Error(err)
	}
}

// TestSSHStrangers: what is no SSH, is too slow, or is not written down, is not
// served.
func TestSSHStrangers(t *testing.T) {
	w := newSSHWorld(t, gateway.Config{Hello: time.Second}, func(_ net.Conn, ch ssh.Channel, _ string) { exit(ch, 0) })
	for _, text := range []string{"GET / HTTP/1.1\r\n\r\n", "SSH-2.0-x\r\n" + strings.Repeat("x", 1<<16), ""} {
		conn, err := w.connect("git.example", w.port)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(conn, text)
		_ = conn.SetReadDeadline(time.Now().Add(patience))
		if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%.20q: the connection is open still", text)
		}
	}
	lines := w.await("three refusals", func(all []egress.Line) bool {
		n := 0
		for _, l := range all {
			if l.Verdict == egress.Refused && strings.HasPrefix(l.Reason, "no SSH with the job") {
				n++
			}
		}
		return n == 3
	})
	for _, l := range lines {
		if l.Dialled != "" {
			t.Errorf("dialled for %+v", l)
		}
	}
}
