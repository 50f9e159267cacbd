// Package squidtest runs a squid of Debian, which wants a password, in a network
// namespace of the test: what listens there is reached through it, and in no
// other way.
package squidtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox/netns/netnstest"
)

// User is who the proxy knows.
const User = "agent"

// patience is for anything that takes a second on a quiet machine.
const patience = time.Minute

// inside is where it listens in its namespace, which nobody else has.
const inside = "127.0.0.1:3128"

// A Squid is one proxy.
type Squid struct {
	Net      *netnstest.Net // where it is
	Address  string         // of a forwarder in the test's own namespace: HOST:PORT
	Password string
	dir      string
	cmd      *exec.Cmd
	ended    chan struct{}
	said     bytes.Buffer // when it has ended
	once     sync.Once
}

const settings = `http_port ` + inside + `
visible_hostname proxy.test
pid_filename none
pinger_enable off
cache deny all
cache_mem 0
memory_cache_shared off
cache_effective_user proxy
shutdown_lifetime 0 seconds
hosts_file %[1]s/hosts
dns_nameservers 127.0.0.1
logformat mayfly %%rm %%ru %%un %%>Hs
access_log stdio:%[1]s/access.log logformat=mayfly
logfile_rotate 0
cache_log %[1]s/cache.log
coredump_dir %[1]s
auth_param basic program /usr/lib/squid/basic_ncsa_auth %[1]s/users
auth_param basic children 1
acl known proxy_auth REQUIRED
http_access deny !known
http_access allow known
`

// Start runs one. hosts are the names that it knows: "ADDRESS NAME…" lines.
func Start(tb testing.TB, hosts string) *Squid {
	tb.Helper()
	s := &Squid{Net: netnstest.Empty(tb), Password: "p4ss-of-the-proxy", ended: make(chan struct{})}
	if out, err := s.Net.Run(tb.Context(), exec.Command("ip", "link", "set", "lo", "up")); err != nil {
		tb.Fatalf("ip: %v: %s", err, out)
	}
	if err := s.prepare(tb, hosts); err != nil {
		tb.Fatal(err)
	}
	program, err := exec.LookPath("squid")
	if err != nil {
		tb.Fatalf("%v; make deps installs it", err)
	}
	s.cmd = exec.Command(program, "-N", "-f", filepath.Join(s.dir, "squid.conf"), "-n", "mf"+strconv.Itoa(os.Getpid()))
	s.cmd.Stdout, s.cmd.Stderr = &s.said, &s.said
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := s.Net.Do(s.cmd.Start); err != nil {
		tb.Fatalf("squid: %v", err)
	}
	go func() {
		defer close(s.ended)
		_ = s.cmd.Wait() // killed
	}()
	tb.Cleanup(s.Stop)
	s.await(tb)
	s.forward(tb)
	return s
}

// prepare writes its files, where its user can read them.
func (s *Squid) prepare(tb testing.TB, hosts string) error {
	who, err := user.Lookup("proxy")
	if err != nil {
		return err
	}
	uid, err := strconv.Atoi(who.Uid)
	if err != nil {
		return err
	}
	if s.dir, err = os.MkdirTemp("", "squid"); err != nil {
		return err
	}
	tb.Cleanup(func() { _ = os.RemoveAll(s.dir) })
	hash, err := exec.Command("openssl", "passwd", "-apr1", s.Password).Output()
	if err != nil {
		return fmt.Errorf("openssl: %w", err)
	}
	errs := []error{os.Chown(s.dir, uid, -1), os.Chmod(s.dir, 0o755)}
	for name, content := range map[string]string{
		"squid.conf": fmt.Sprintf(settings, s.dir), "hosts": hosts, "users": User + ":" + string(hash),
	} {
		errs = append(errs, os.WriteFile(filepath.Join(s.dir, name), []byte(content), 0o644))
	}
	return errors.Join(errs...)
}

func (s *Squid) await(tb testing.TB) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), patience)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		conn, err := s.Net.Dial("tcp", inside)
		if err == nil {
			_ = conn.Close() // it listens
			return
		}
		select {
		case <-tick.C:
		case <-s.ended:
			said, _ := os.ReadFile(filepath.Join(s.dir, "cache.log"))
			tb.Fatalf("squid ended: %s%s", &s.said, said)
		case <-ctx.Done():
			tb.Fatalf("squid does not listen: %v", err)
		}
	}
}

// forward lets the test's own namespace in.
func (s *Squid) forward(tb testing.TB) {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	s.Address = l.Addr().String()
	var all sync.WaitGroup
	all.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer conn.Close()
				up, err := s.Net.Dial("tcp", inside)
				if err != nil {
					return
				}
				defer up.Close()
				stop := context.AfterFunc(tb.Context(), func() { _ = errors.Join(up.Close(), conn.Close()) })
				defer stop()
				var both sync.WaitGroup
				both.Go(func() { _, _ = io.Copy(up, conn); _ = up.(*net.TCPConn).CloseWrite() })
				both.Go(func() { _, _ = io.Copy(conn, up); _ = conn.(*net.TCPConn).CloseWrite() })
				both.Wait()
			})
		}
	})
	tb.Cleanup(func() {
		_ = l.Close()
		all.Wait()
	})
}

// Stop kills it. What is asked of it then fails.
func (s *Squid) Stop() {
	s.once.Do(func() {
		_ = syscall.Kill(-s.cmd.Process.Pid, syscall.SIGKILL) // the group: it has children
		<-s.ended
	})
}

// Await waits until it has logged a request: "CONNECT name:port user status". A
// tunnel is logged when it ends.
func (s *Squid) Await(tb testing.TB, request string) {
	tb.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(patience); ; <-tick.C {
		b, err := os.ReadFile(filepath.Join(s.dir, "access.log"))
		if err != nil {
			tb.Fatal(err)
		}
		if strings.Contains(string(b), request+"\n") {
			return
		}
		if time.Now().After(end) {
			tb.Fatalf("squid logged %q, want %q", b, request)
		}
	}
}
