// Package gitsshtest starts Debian's OpenSSH server for tests: one process for each
// connection, with a user "git" of its own that the machine does not have.
package gitsshtest

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/crypto/ssh"
)

// User is who may log in.
const User = "git"

// uid is that of nobody: the server's user owns nothing else.
const uid = 65534

// A Server listens on loopback.
type Server struct {
	// Port is where it listens.
	Port int
	// HostKey is its key, as in authorized_keys, and Key what User logs in with, as
	// PEM.
	HostKey, Key string
	// Home is the directory of User. What is put there must be given to it: Own.
	Home string

	dir string
	mu  sync.Mutex
	log bytes.Buffer
}

// Start makes a server that ends with tb. Further lines of sshd_config come first,
// so that they count. Only root can: the user exists in a mount namespace.
func Start(tb testing.TB, config ...string) *Server {
	tb.Helper()
	dir, err := os.MkdirTemp("", "mayfly-sshd-")
	must(tb, err)
	tb.Cleanup(func() { must(tb, os.RemoveAll(dir)) })
	s := &Server{dir: dir, Home: filepath.Join(dir, "home")}
	must(tb, os.Chmod(dir, 0o711))
	must(tb, os.Mkdir(s.Home, 0o755))
	must(tb, os.Chown(s.Home, uid, uid))
	host, hostPublic := newKey(tb)
	key, public := newKey(tb)
	s.Key, s.HostKey = key, hostPublic
	passwd, err := os.ReadFile("/etc/passwd")
	must(tb, err)
	account := fmt.Sprintf("%s:*:%d:%d::%s:/bin/sh\n", User, uid, uid, s.Home)
	for name, content := range map[string]string{
		"host": host, "keys": public + "\n", "passwd": account + string(passwd),
		"config": strings.Join(append(config,
			"HostKey "+dir+"/host", "AuthorizedKeysFile "+dir+"/keys", "StrictModes no", "UsePAM no", "PasswordAuthentication no",
			"KbdInteractiveAuthentication no", "PidFile none", "LogLevel VERBOSE", "Subsystem sftp internal-sftp", "PrintMotd no",
		), "\n") + "\n",
	} {
		must(tb, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600))
	}
	must(tb, os.Chmod(filepath.Join(dir, "passwd"), 0o644))
	must(tb, os.Chmod(filepath.Join(dir, "keys"), 0o644))
	must(tb, os.MkdirAll("/run/sshd", 0o755)) // the server's empty directory, which only its init script makes
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(tb, err)
	s.Port = l.Addr().(*net.TCPAddr).Port
	s.listen(tb, l)
	return s
}

// listen starts a process for each connection.
func (s *Server) listen(tb testing.TB, l net.Listener) {
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			f, err := conn.(*net.TCPConn).File()
			conn.Close()
			if err != nil {
				continue
			}
			cmd := exec.Command("unshare", "-m", "sh", "-c", `mount --bind "$0/passwd" /etc/passwd && exec /usr/sbin/sshd -i -e -f "$0/config"`, s.dir)
			cmd.Stdin, cmd.Stdout, cmd.Stderr = f, f, s
			if err := cmd.Start(); err != nil {
				f.Close()
				continue
			}
			f.Close()
			wg.Go(func() { _ = cmd.Wait() })
		}
	})
	tb.Cleanup(func() {
		l.Close()
		wg.Wait() // each process ends with its connection
	})
}

// Write keeps what the server says.
func (s *Server) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.log.Write(b)
}

// Log is what the server has said so far.
func (s *Server) Log() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.log.String()
}

// Repository makes a bare git repository at a path below Home, with one commit.
func (s *Server) Repository(tb testing.TB, path string) {
	tb.Helper()
	script := `set -e; d=$(mktemp -d); trap 'rm -rf $d' EXIT
git init -q -b main "$d"; cd "$d"; echo hello >file; git add file
git -c user.name=a -c user.email=a@b.c commit -qm first; git clone -q --bare . "$0"`
	if out, err := exec.Command("sh", "-c", script, filepath.Join(s.Home, path)).CombinedOutput(); err != nil {
		tb.Fatalf("gitsshtest: repository: %v: %s", err, out)
	}
	s.Own(tb)
}

// Own gives all below Home to User.
func (s *Server) Own(tb testing.TB) {
	tb.Helper()
	if out, err := exec.Command("chown", "-R", fmt.Sprintf("%d:%d", uid, uid), s.Home).CombinedOutput(); err != nil {
		tb.Fatalf("gitsshtest: %v: %s", err, out)
	}
}

// newKey makes a key, as PEM, and its public half, as in authorized_keys.
func newKey(tb testing.TB) (private, public string) {
	tb.Helper()
	p, key, err := ed25519.GenerateKey(rand.Reader)
	must(tb, err)
	block, err := ssh.MarshalPrivateKey(key, "")
	must(tb, err)
	half, err := ssh.NewPublicKey(p)
	must(tb, err)
	return string(pem.EncodeToMemory(block)), strings.TrimSpace(string(ssh.MarshalAuthorizedKey(half)))
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatalf("gitsshtest: %v", err)
	}
}

// Direct runs a command with the key, by ssh and without a gateway.
func (s *Server) Direct(tb testing.TB, command string) (string, error) {
	tb.Helper()
	key, hosts := filepath.Join(tb.TempDir(), "key"), filepath.Join(tb.TempDir(), "hosts")
	must(tb, os.WriteFile(key, []byte(s.Key), 0o600))
	must(tb, os.WriteFile(hosts, fmt.Appendf(nil, "[127.0.0.1]:%d %s\n", s.Port, s.HostKey), 0o600))
	out, err := exec.Command("ssh", "-F", "none", "-i", key, "-o", "UserKnownHostsFile="+hosts, "-p", fmt.Sprint(s.Port), User+"@127.0.0.1", command).CombinedOutput()
	return string(out), err
}
