package native

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
)

// nobody is the user that plays an ordinary one.
func nobody() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
}

// stateOf makes a state directory of nobody's, reachable by nobody.
func stateOf(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for p := dir; p != os.TempDir(); p = p[:strings.LastIndex(p, "/")] {
		if err := os.Chmod(p, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(dir, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	return dir
}

// An ordinary user makes, uses and destroys a box, if he asks for it.
func TestUnprivileged(t *testing.T) {
	t.Parallel()
	needRoot(t)
	state, out := agent(t, "unprivileged", stateOf(t), nobody())
	if !state.Success() {
		t.Fatalf("got %v: %s", state, out)
	}
}

func TestUnprivilegedKilledAgent(t *testing.T) {
	t.Parallel()
	needRoot(t)
	dir := stateOf(t)
	state, out := agent(t, "run", dir, nobody())
	if !signalled(state) {
		t.Fatalf("the agent ended with %v, want killed: %s", state, out)
	}
	b, err := os.ReadFile(dir + "/boxes/box/process")
	if err != nil {
		t.Fatal(err)
	}
	word, since, _ := strings.Cut(string(b), " ")
	pid, err := strconv.Atoi(word)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "process 1 ends without help", func() bool {
		now, err := startTime(pid)
		return err != nil || now != since
	})
	state, out = agent(t, "destroy", dir, nobody())
	if !state.Success() {
		t.Fatalf("destroy: got %v: %s", state, out)
	}
	if left := leftovers(t, dir); len(left) != 0 {
		t.Errorf("after Destroy: %q is left", left)
	}
}

// Without the option an ordinary user gets nothing.
func TestUnprivilegedNeedsOption(t *testing.T) {
	t.Parallel()
	needRoot(t)
	state, out := agent(t, "option", stateOf(t), nobody())
	if !state.Success() {
		t.Fatalf("got %v: %s", state, out)
	}
}

// unprivileged is what the child of TestUnprivileged does with its box.
func unprivileged(ctx context.Context, r *Runtime, b sandbox.Sandbox) error {
	var all []error
	expect := func(text, want string) {
		var out bytes.Buffer
		print := func(_ time.Time, p []byte) error { out.Write(p); return nil }
		_, err := b.Run(ctx, sandbox.Process{
			Args: []string{"/bin/sh", "-c", text}, Env: []string{"PATH=/usr/sbin:/usr/bin"}, Stdout: print, Stderr: print,
		})
		if err != nil || !strings.Contains(out.String(), want) {
			all = append(all, fmt.Errorf("%s: got %q, %v, want %q", text, out.String(), err, want))
		}
	}
	expect("id -u; grep CapBnd /proc/self/status", "0\nCapBnd:\t00000000000004fb")
	expect("echo x > /workspace/f && cat /workspace/f; pwd", "x\n/workspace")
	expect("touch /usr/x", "Read-only file system")
	expect("cat "+r.cfg.StateDir+"/boxes/box/box.json", "No such file")
	expect("dd if=/dev/zero of=/workspace/big bs=1M count=100; rm /workspace/big", "No space left")
	expect("i=0; while [ $i -lt 5000 ] && : > /workspace/n$i; do i=$((i+1)); done", "No space left")
	expect("git --version; gcc --version | head -1", "git version")
	s, err := b.Attach(ctx)
	if err != nil || s.TCP == nil || s.DNS == nil || s.Log == nil {
		all = append(all, fmt.Errorf("attach: got %+v, %w", s, err))
	}
	// Last, because the guest itself may need a thread and be refused.
	expect("/usr/bin/python3 -c 'import os,time\nn=0\ntry:\n  while n<200:\n    if os.fork()==0: time.sleep(5); os._exit(0)\n    n+=1\nexcept OSError as e: print(e.strerror)'", "temporarily unavailable")
	claims, err := r.Check(ctx)
	if err != nil {
		all = append(all, err)
	}
	open := map[string]bool{"memory limit": true, "cpu limit": true, "user id range": true, "base": true, "gvisor": true}
	for _, c := range claims {
		if c.Enforced == open[c.Name] {
			all = append(all, fmt.Errorf("claim %+v: want enforced %v", c, !open[c.Name]))
		}
		delete(open, c.Name)
	}
	if len(open) != 0 {
		all = append(all, fmt.Errorf("no claims about %v", open))
	}
	all = append(all, r.Destroy(ctx, "box"))
	if infos, err := r.List(ctx); err != nil || len(infos) != 0 {
		all = append(all, fmt.Errorf("list after destroy: %+v, %w", infos, err))
	}
	return errors.Join(all...)
}

// withoutOption is the child of TestUnprivilegedNeedsOption.
func withoutOption(cfg Config) error {
	cfg.Unprivileged = false
	if _, err := New(cfg); !errors.Is(err, sandbox.ErrUnsupported) {
		return fmt.Errorf("New without the option: got %w, want ErrUnsupported", err)
	}
	return nil
}
