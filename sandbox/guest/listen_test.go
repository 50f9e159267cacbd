package guest_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/guest"
	"github.com/mayfly-ci/mayfly/sandbox/guest/wire"
	"github.com/mayfly-ci/mayfly/sandbox/kernel"
)

// A listener is a guest that waits for its stream in a network namespace.
type listener struct {
	cmd    *exec.Cmd
	stderr *bytes.Buffer
	net    string // path of the namespace
}

// listen starts one as process 1 of a box, or beside us.
func listen(t *testing.T, inBox bool) *listener {
	t.Helper()
	program, err := guest.Binary()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "mayfly-guest")
	if err := os.WriteFile(path, program, 0o755); err != nil {
		t.Fatal(err)
	}
	args := []string{"--net"}
	if inBox {
		args = append(args, "--pid", "--fork", "--kill-child", "--mount-proc")
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
	t.Cleanup(cancel)
	l := &listener{cmd: exec.CommandContext(ctx, "unshare", append(args, path, "listen")...), stderr: &bytes.Buffer{}}
	l.cmd.Stderr = l.stderr
	// No death signal: it comes with the end of the thread, and threads end here.
	if err := l.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = l.cmd.Process.Kill() // it has ended if the test went well
		_ = l.cmd.Wait()
	})
	l.net = "/proc/" + strconv.Itoa(l.cmd.Process.Pid) + "/ns/net"
	return l
}

// dial connects to the guest, from a thread in its network namespace.
func (l *listener) dial() (net.Conn, error) {
	fd := -1
	err := kernel.OnThread(func() error {
		ns, err := os.Open(l.net)
		if err != nil {
			return err
		}
		defer ns.Close() // it was only entered
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		if err := unix.Connect(s, &unix.SockaddrUnix{Name: wire.Address}); err != nil {
			return errors.Join(err, unix.Close(s))
		}
		fd = s
		return nil
	})
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "stream")
	defer f.Close() // the connection has a copy
	return net.FileConn(f)
}

// connected dials until the guest listens.
func (l *listener) connected(t *testing.T) net.Conn {
	t.Helper()
	var conn net.Conn
	eventually(t, "the guest listens", func() bool {
		var err error
		conn, err = l.dial()
		return err == nil
	})
	t.Cleanup(func() { _ = conn.Close() }) // the client closes it too
	return conn
}

func TestListenerServesOneStranger(t *testing.T) {
	t.Parallel()
	l := listen(t, true)
	conn := l.connected(t)
	if _, err := conn.Write([]byte{0}); err != nil {
		t.Fatal(err)
	}
	c, err := guest.New(t.Context(), conn, guest.Config{})
	if err != nil {
		t.Fatalf("hello: %v; the guest says %s", err, l.stderr)
	}
	if second, err := l.dial(); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("second connection: got %v, %v, want refused", second, err)
	}
	exit, err := c.Run(t.Context(), sandbox.Process{Args: []string{"/bin/true"}, Dir: "/"})
	if err != nil || exit.Code != 0 {
		t.Errorf("Run: got %+v, %v", exit, err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := l.cmd.Wait(); err != nil {
		t.Errorf("after the end of the stream: got %v, want a guest that ends well", err)
	}
}

// What has a process id in the box is not the agent.
func TestListenerRefusesItsOwnBox(t *testing.T) {
	t.Parallel()
	l := listen(t, false) // we have an id where it is
	l.connected(t)
	err := l.cmd.Wait()
	if exit := new(exec.ExitError); !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(l.stderr.String(), "somebody in the box has connected") {
		t.Errorf("got %v and %q, want the guest to end", err, l.stderr)
	}
}

// An agent that dies before it has finished the box leaves none.
func TestListenerEndsWithoutTheWord(t *testing.T) {
	t.Parallel()
	l := listen(t, true)
	if err := l.connected(t).Close(); err != nil {
		t.Fatal(err)
	}
	err := l.cmd.Wait()
	if exit := new(exec.ExitError); !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(l.stderr.String(), "has not finished the box") {
		t.Errorf("got %v and %q, want the guest to end", err, l.stderr)
	}
}
