package guest_test

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/guest"
)

// program is the guest, built once for all tests of the package.
var program string

// filler in the environment makes the test binary a process that writes zeros to
// its output until nobody has taken any for a while, and ends. The file that
// filler names then says how many they were. How much a pipe takes is not
// assumed: it is less for a user who has many (pipe(7), pipe-user-pages-soft).
const filler = "MAYFLY_TEST_FILLER"

func TestMain(m *testing.M) {
	if count := os.Getenv(filler); count != "" {
		if err := fill(count); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(buildAndRun(m))
}

func fill(count string) error {
	if err := unix.SetNonblock(1, true); err != nil {
		return err
	}
	written, zeros := 0, make([]byte, 4096)
	for {
		n, err := unix.Write(1, zeros)
		if err == nil {
			written += n
			continue
		}
		if err != unix.EAGAIN {
			return err
		}
		ready, err := unix.Poll([]unix.PollFd{{Fd: 1, Events: unix.POLLOUT}}, 300)
		if err != nil && err != unix.EINTR {
			return err
		}
		if ready == 0 && err == nil {
			return os.WriteFile(count, []byte(strconv.Itoa(written)), 0o600)
		}
	}
}

func buildAndRun(m *testing.M) int {
	dir, err := os.MkdirTemp("", "mayfly-guest-test")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	program = filepath.Join(dir, "mayfly-guest")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", program, "github.com/mayfly-ci/mayfly/cmd/mayfly-guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build the guest: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// A box is a real guest that is process 1 of a pid namespace of its own, inside
// a user namespace, with the files of this machine.
type box struct {
	*guest.Client
	cmd    *exec.Cmd
	stderr *recorder
}

// newBox starts a guest. prefix is a shell command that becomes the guest, such
// as "exec setpriv …"; "" is "exec".
func newBox(t testing.TB, prefix string, args ...string) *box {
	t.Helper()
	b := startBox(t, prefix, args...)
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Errorf("close: got %v, want nil", err)
		}
		b.wait(t)
	})
	return b
}

func startBox(t testing.TB, prefix string, args ...string) *box {
	t.Helper()
	if prefix == "" {
		prefix = "exec"
	}
	if len(args) == 0 {
		args = []string{"serve"}
	}
	ours, theirs := socketPair(t)
	script := "mount --make-rprivate / && mount -t proc proc /proc && " + prefix + ` "$0" "$@"`
	cmd := exec.Command("sh", append([]string{"-c", script, program}, args...)...)
	var stderr recorder
	cmd.Stderr = &stderr
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWPID | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
	}
	if err := cmd.Start(); err != nil {
		t.Fatalf("start a guest: %v: needs user namespaces (sysctl user.max_user_namespaces)", err)
	}
	_ = theirs.Close()
	b := &box{cmd: cmd, stderr: &stderr}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	client, err := guest.New(ctx, ours, guest.Config{})
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		t.Fatalf("hello: %v; the guest says %q", err, stderr.String())
	}
	b.Client = client
	return b
}

// wait waits for the end of process 1.
func (b *box) wait(t testing.TB) {
	t.Helper()
	killer := time.AfterFunc(time.Minute, func() {
		t.Errorf("the guest is alive a minute after its stream has ended")
		_ = b.cmd.Process.Kill()
	})
	defer killer.Stop()
	if err := b.cmd.Wait(); err != nil && !b.cmd.ProcessState.Exited() {
		t.Errorf("guest: %v: %s", err, b.stderr.String())
	}
}

// socketPair returns a connection for the agent and a file for the guest.
func socketPair(t testing.TB) (net.Conn, *os.File) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fds[0]), "agent")
	defer f.Close()
	conn, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	return conn, os.NewFile(uintptr(fds[1]), "guest")
}

// Write makes a recorder the stderr of a guest.
func (r *recorder) Write(b []byte) (int, error) {
	return len(b), r.output(time.Now(), b)
}

// A recorder keeps what a process prints.
type recorder struct {
	mu  sync.Mutex
	all bytes.Buffer
	at  []time.Time
}

func (r *recorder) output(at time.Time, b []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all.Write(b)
	r.at = append(r.at, at)
	return nil
}

func (r *recorder) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.all.String()
}

// sh is a process that runs a script in a directory that exists everywhere.
func sh(script string, out ...*recorder) sandbox.Process {
	p := sandbox.Process{Args: []string{"/bin/sh", "-c", script}, Dir: "/", Env: []string{"PATH=/usr/bin:/bin:/usr/sbin:/sbin"}}
	if len(out) > 0 {
		p.Stdout, p.Stderr = out[0].output, out[0].output
	}
	if len(out) > 1 {
		p.Stderr = out[1].output
	}
	return p
}

// run runs a script and returns what it printed.
func (b *box) run(t testing.TB, script string) (string, sandbox.Exit) {
	t.Helper()
	var out recorder
	exit, err := b.Run(t.Context(), sh(script, &out))
	if err != nil {
		t.Fatalf("run %q: got error %v, want none", script, err)
	}
	return out.String(), exit
}

// must runs a script that must succeed.
func (b *box) must(t testing.TB, script string) string {
	t.Helper()
	out, exit := b.run(t, script)
	if exit.Code != 0 {
		t.Fatalf("run %q: got %+v and %q, want status 0", script, exit, out)
	}
	return out
}

// tarOf makes an archive.
func tarOf(t testing.TB, headers ...tar.Header) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		content := ""
		if h.Typeflag == tar.TypeReg || h.Typeflag == 0 {
			// A file's content is given where a link has its target.
			h.Typeflag, content, h.Linkname = tar.TypeReg, h.Linkname, ""
			h.Size = int64(len(content))
		}
		if h.Mode == 0 && h.Typeflag != tar.TypeXGlobalHeader {
			h.Mode = 0o644
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &b
}

// file is the header of a regular file for tarOf.
func file(name, content string) tar.Header {
	return tar.Header{Name: name, Linkname: content}
}

// eventually polls until ok, for at most a minute.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.NewTimer(time.Minute)
	defer deadline.Stop()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("%s: not within a minute", what)
		}
	}
}
