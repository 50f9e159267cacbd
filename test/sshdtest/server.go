// Package sshdtest runs Debian's sshd for tests: one process for each connection
// to a loopback address, which logs root in by certificates of an authority.
package sshdtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
)

const program = "/usr/sbin/sshd"

// A Server is a listener with an sshd behind it.
type Server struct {
	dir      string
	listener net.Listener

	mu     sync.Mutex
	down   bool
	frozen []net.Conn // nil unless it is frozen; accepted and not answered
	freeze bool
}

// Start makes a server that trusts authority, a line of a public key, and lets
// certificates for one of the principals be root. It reads RevokedKeys from List,
// which does not exist yet. It ends with tb. What goes wrong is fatal.
func Start(tb testing.TB, authority string, principals string) *Server {
	tb.Helper()
	s := &Server{dir: tb.TempDir()}
	err := errors.Join(
		os.MkdirAll("/run/sshd", 0o755), // where it separates privileges
		os.WriteFile(s.path("ca.pub"), []byte(authority+"\n"), 0o600),
		os.WriteFile(s.path("principals"), []byte(principals), 0o600),
		os.WriteFile(s.path("config"), fmt.Appendf(nil, config, s.dir), 0o600))
	if err == nil {
		var out []byte
		if out, err = exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", s.path("host")).CombinedOutput(); err != nil {
			err = fmt.Errorf("ssh-keygen: %w: %s", err, out)
		}
	}
	if err == nil {
		s.listener, err = net.Listen("tcp", "127.0.0.1:0")
	}
	if err == nil {
		var key []byte
		key, err = os.ReadFile(s.path("host.pub"))
		_, port, _ := net.SplitHostPort(s.Address())
		err = errors.Join(err, os.WriteFile(s.KnownHosts(), fmt.Appendf(nil, "[127.0.0.1]:%s %s", port, key), 0o600))
	}
	if err == nil {
		var out []byte
		if out, err = exec.Command(program, "-t", "-f", s.path("config")).CombinedOutput(); err != nil {
			err = fmt.Errorf("%s (Debian's openssh-server): %w: %s", program, err, bytes.TrimSpace(out))
		}
	}
	if err != nil {
		tb.Fatalf("sshdtest: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var serving sync.WaitGroup
	serving.Go(func() { s.serve(ctx, &serving) })
	tb.Cleanup(func() {
		_ = s.listener.Close()
		_ = s.Thaw(context.Background())
		cancel()
		serving.Wait()
		if tb.Failed() {
			tb.Logf("sshd said:\n%s", s.Log())
		}
	})
	return s
}

// config is all that sshd is told. Nothing of the machine's is used.
const config = `HostKey %[1]s/host
TrustedUserCAKeys %[1]s/ca.pub
RevokedKeys %[1]s/list
AuthorizedPrincipalsFile %[1]s/principals
AuthorizedKeysFile none
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
KexAlgorithms curve25519-sha256
StrictModes no
LogLevel VERBOSE
`

func (s *Server) path(name string) string { return filepath.Join(s.dir, name) }

// Address is HOST:PORT.
func (s *Server) Address() string { return s.listener.Addr().String() }

// KnownHosts is a file with the server's key.
func (s *Server) KnownHosts() string { return s.path("known_hosts") }

// List is where the server reads which keys are revoked. Without it, it refuses
// all.
func (s *Server) List() string { return s.path("list") }

// Log is what the server has written so far.
func (s *Server) Log() string {
	b, err := os.ReadFile(s.path("log"))
	if err != nil {
		return err.Error()
	}
	return string(b)
}

func (s *Server) serve(ctx context.Context, serving *sync.WaitGroup) {
	for {
		conn, err := s.listener.Accept()
		if err != nil {
			return
		}
		s.mu.Lock()
		switch {
		case s.freeze:
			s.frozen = append(s.frozen, conn)
		case s.down:
			_ = conn.Close()
		default:
			serving.Go(func() { s.one(ctx, conn) })
		}
		s.mu.Unlock()
	}
}

// one has sshd serve a connection, as inetd does.
func (s *Server) one(ctx context.Context, conn net.Conn) {
	f, err := conn.(*net.TCPConn).File()
	_ = conn.Close() // the file is another descriptor of it
	if err != nil {
		return
	}
	defer func() { _ = f.Close() }()
	log, err := os.OpenFile(s.path("log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return
	}
	defer func() { _ = log.Close() }()
	cmd := exec.CommandContext(ctx, program, "-i", "-e", "-f", s.path("config"))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = f, f, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	_ = cmd.Run() // how it ended is in its log
}

// Down makes the server drop every new connection. Up ends that.
func (s *Server) Down(context.Context) error { return s.set(func() { s.down = true }) }

// Up undoes Down.
func (s *Server) Up(context.Context) error { return s.set(func() { s.down = false }) }

// Freeze makes the server accept connections and not answer them. Thaw ends that.
func (s *Server) Freeze(context.Context) error { return s.set(func() { s.freeze = true }) }

// Thaw undoes Freeze, and drops those that waited.
func (s *Server) Thaw(context.Context) error {
	return s.set(func() {
		s.freeze = false
		for _, c := range s.frozen {
			_ = c.Close()
		}
		s.frozen = nil
	})
}

func (s *Server) set(change func()) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
	return nil
}
