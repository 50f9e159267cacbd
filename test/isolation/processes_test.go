package isolation

import (
	"bufio"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
)

// newVictim starts a process of the host that holds a token.
func newVictim(t *testing.T) (pid, held string) {
	t.Helper()
	held = token()
	cmd := exec.CommandContext(bounded(t), probePath, "victim", held)
	cmd.Env = []string{"TOKEN=" + held}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(unix.SIGTERM) // it may have ended
		if err := cmd.Wait(); err != nil {
			t.Errorf("victim: %v", err)
		}
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatalf("victim: %q, %v", line, err)
	}
	return strconv.Itoa(cmd.Process.Pid), held
}

// A process of the host, by its number there. Off: a process beside it.
func TestProcessOfTheHost(t *testing.T) {
	t.Parallel()
	b := newBox(t, sandbox.Limits{})
	pid, held := newVictim(t)
	for _, attack := range []string{"kill", "environ", "mem", "vmread", "ptrace", "pidfd", "exe"} {
		off := child(t, nil, attack, pid, held)
		twoSided(t, attack, off, b.probe(t, attack, pid, held))
		if off.out != "" {
			t.Errorf("%s with the control off: got %q, want the token found", attack, off.out)
		}
	}
	twoSided(t, "arguments and environment", child(t, nil, "command", held), b.probe(t, "command", held))
}

// Process 1 of the box, which is the guest. Off: the same against a process 1
// that hides nothing, in namespaces like those of a box.
func TestProcessOne(t *testing.T) {
	t.Parallel()
	b := newBox(t, sandbox.Limits{})
	for _, attack := range []string{"environ", "mem", "vmread", "ptrace", "pidfd", "exe"} {
		held := token()
		cmd := exec.CommandContext(bounded(t), probePath, "init", attack, "1", held)
		cmd.Env = []string{"TOKEN=" + held}
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:   unix.CLONE_NEWUSER | unix.CLONE_NEWPID,
			Unshareflags: unix.CLONE_NEWNS,
			UidMappings:  []syscall.SysProcIDMap{{HostID: 0, Size: 1}}, GidMappings: []syscall.SysProcIDMap{{HostID: 0, Size: 1}},
		}
		out, err := cmd.CombinedOutput()
		off := result{out: string(out)}
		if err != nil {
			off.code, off.out = 1, off.out+err.Error()
		}
		if off.out != "" {
			t.Errorf("%s with the control off: got %q, want the token found", attack, off.out)
		}
		// The box's own token is unknown; an empty one is in any memory.
		twoSided(t, attack+" of process 1", off, b.probe(t, attack, "1", ""))
	}
	for _, p := range []string{"/proc/1/maps", "/proc/1/fd/3", "/proc/1/cwd/etc/passwd", "/proc/1/root/etc/passwd", "/proc/1/mem", "/proc/1/auxv"} {
		own := strings.Replace(p, "/1/", "/self/", 1)
		if strings.Contains(p, "/cwd/") {
			own = "/proc/self/root/etc/passwd"
		}
		if strings.HasSuffix(p, "fd/3") || strings.HasSuffix(p, "mem") {
			own = "/proc/self/maps"
		}
		twoSided(t, p, b.probe(t, "open", own), b.probe(t, "open", p))
	}
}

// What kills the processes of the box does not kill the guest.
func TestKillProcessOne(t *testing.T) {
	t.Parallel()
	b := newBox(t, sandbox.Limits{})
	for _, script := range []string{"kill -9 1", "kill -QUIT 1; kill -ABRT 1; kill -SEGV 1", "kill -STOP 1", "for s in $(seq 1 64); do kill -$s 1; done"} {
		if r := b.run(t, "/bin/sh", "-c", script+"; true"); !r.got() {
			t.Errorf("%s: got %+v", script, r)
		}
		if r := b.run(t, "/bin/sh", "-c", "echo alive"); r.out != "alive\n" {
			t.Errorf("after %s: got %+v, want the guest alive", script, r)
		}
	}
}

// A process of another job. Off: a process of the same one.
func TestProcessOfAnotherJob(t *testing.T) {
	t.Parallel()
	first, second := newBox(t, sandbox.Limits{}), newBox(t, sandbox.Limits{})
	held := token()
	if r := first.run(t, "/bin/sh", "-c", `TOKEN="$1" setsid /run/mayfly/probe victim "$1" </dev/null >/workspace/ready 2>&1 & until grep -q ready /workspace/ready; do sleep 0.01; done`, "sh", held); !r.got() {
		t.Fatalf("a process in a box: %+v", r)
	}
	twoSided(t, "arguments and environment", first.probe(t, "command", held), second.probe(t, "command", held))
}

// A descriptor that the agent has open and did not mark to be closed. Off: a
// child of the same agent.
func TestDescriptors(t *testing.T) { // not parallel: others would inherit it
	file, content := canaryFile(t, t.TempDir())
	fd, err := unix.Open(file, unix.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	b := newBox(t, sandbox.Limits{})
	off, on := child(t, nil, "fds"), b.probe(t, "fds")
	twoSided(t, "descriptors beside 0, 1 and 2", off, on)
	if !strings.Contains(off.out, content) {
		t.Errorf("a child of the agent has %q, want the canary", off.out)
	}
	if r := b.run(t, "/bin/sh", "-c", "readlink /proc/self/fd/0; ls /proc/self/fd | tr '\\n' ' '"); r.out != "/dev/null\n0 1 2 3 " { // 3 is of ls
		t.Errorf("a step has %+v, want 0, 1, 2 and that of ls", r)
	}
}

// The environment of the agent. Off: a child of it.
func TestEnvironment(t *testing.T) {
	t.Parallel()
	b := newBox(t, sandbox.Limits{})
	if os.Getenv(insideEnv) == "" {
		t.Fatal("the environment of the tests lacks its mark")
	}
	off := child(t, nil, "read", "/proc/self/environ", insideEnv)
	twoSided(t, "the agent's variables", off, b.probe(t, "read", "/proc/self/environ", insideEnv))
	twoSided(t, "the agent's variables anywhere", off, b.probe(t, "command", insideEnv+"="))
}
