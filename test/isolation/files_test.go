package isolation

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
)

// Files of the host. Off: a process of the host reads them.
func TestFilesOfTheHost(t *testing.T) {
	t.Parallel()
	b := newBox(t, sandbox.Limits{})
	var made []string
	for _, dir := range []string{"/root", "/home", "/usr/local/etc", "/etc", "/var/lib", "/var/tmp", "/opt", "/srv", "/mnt", "/run", "/dev/shm", t.TempDir(), state} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		file, content := canaryFile(t, dir)
		twoSided(t, file, child(t, nil, "read", file, content), b.probe(t, "read", file, content))
		made = append(made, content)
	}
	for _, content := range made {
		if r := b.probe(t, "find", content); !r.refused() {
			t.Errorf("%s is found somewhere in the box: %+v", content, r)
		}
	}
	// A box that is made while the files are there has them as little.
	late := newBox(t, sandbox.Limits{})
	for _, content := range made {
		if r := late.probe(t, "find", content); !r.refused() {
			t.Errorf("%s is found somewhere in a box made later: %+v", content, r)
		}
	}
	shadow, err := os.ReadFile("/etc/shadow")
	if err != nil {
		t.Fatal(err)
	}
	line, _, _ := strings.Cut(string(shadow), "\n")
	twoSided(t, "/etc/shadow", child(t, nil, "read", "/etc/shadow", line), b.probe(t, "read", "/etc/shadow", line))
	for _, p := range []string{"/var/run/docker.sock", "/run/docker.sock", "/run/containerd/containerd.sock", "/root/.ssh", "/root/.config", "/boot", "/lost+found", "/dev/loop-control", "/dev/kmsg", "/dev/mem", "/dev/vda", "/dev/kvm"} {
		if r := b.probe(t, "link", p); !strings.Contains(r.out, "no such file") {
			t.Errorf("%s in a box: got %+v, want absent", p, r)
		}
	}
	// A kernel of the box's own has a /sys of its own, which is all made up.
	if r := b.probe(t, "link", "/sys/kernel"); wall == sandbox.Kernel && !strings.Contains(r.out, "no such file") {
		t.Errorf("/sys/kernel in a box: got %+v, want absent", r)
	}
}

// The workspace of another job. Off: another process of the same job.
func TestWorkspaceOfAnotherJob(t *testing.T) {
	t.Parallel()
	first, second := newBox(t, sandbox.Limits{}), newBox(t, sandbox.Limits{})
	for _, dir := range []string{sandbox.Workspace, sandbox.Run, "/tmp", "/root", "/usr/bin", "/etc", "/dev/shm", "/var/tmp"} {
		mark := token()
		if r := first.run(t, "/bin/sh", "-c", `echo "$1" > "$2/$1"`, "sh", mark, dir); !r.got() {
			t.Fatalf("write in %s: %+v", dir, r)
		}
		twoSided(t, dir, first.probe(t, "read", dir+"/"+mark, mark), second.probe(t, "read", dir+"/"+mark, mark))
		twoSided(t, dir+" anywhere", first.probe(t, "find", mark), second.probe(t, "find", mark))
		if _, err := os.Stat(dir + "/" + mark); err == nil {
			t.Errorf("what the box wrote to %s is on the host", dir)
		}
	}
}

// A program that is setuid root. Off: the same where programs may gain
// privileges.
func TestSetuid(t *testing.T) {
	t.Parallel()
	b := newBox(t, sandbox.Limits{})
	dir := filepath.Dir(probePath)
	program, file := filepath.Join(dir, "su"), filepath.Join(dir, "roots")
	if r := child(t, nil, "copy", program, file); !r.got() {
		t.Fatalf("copy: %+v", r)
	}
	if r := b.probe(t, "copy", "/workspace/su", "/workspace/roots"); !r.got() {
		t.Fatalf("copy in a box: %+v", r)
	}
	twoSided(t, "setuid", child(t, nil, "setuid", program, file, "root's own"), b.probe(t, "setuid", "/workspace/su", "/workspace/roots", "root's own"))
	// It is not for want of running: nobody may run it, and read what is public.
	if r := b.probe(t, "setuid", "/workspace/su", "/etc/passwd", "root"); !r.got() {
		t.Errorf("the same program and a public file: got %+v, want it to work", r)
	}
	if r := b.run(t, "/bin/sh", "-c", "su nobody -s /bin/sh -c '/usr/bin/passwd -S root; /usr/bin/mount -t tmpfs x /mnt && echo gained'"); strings.Contains(r.out, "gained") {
		t.Errorf("setuid programs of the base: got %+v", r)
	}
}

// alone are the namespaces in which a call that is not filtered may do what it
// likes: what a box would be without the filter, as root.
func alone() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC}
}

// Calls of the kernel that a box has no use for. Off: namespaces without a
// filter and with the capabilities of root.
func TestKernel(t *testing.T) {
	t.Parallel()
	b := newBox(t, sandbox.Limits{})
	for _, call := range []string{
		"unshare", "userns", "clone", "setns", "mount", "bind", "remount", "chroot", "fsopen", "opentree", "mknod",
		"bpf", "keyctl", "io_uring", "perf", "userfaultfd", "fanotify", "modify_ldt", "hostname", "kcmp", "sysctl", "int80", "tiocsti",
	} {
		twoSided(t, call, child(t, alone(), call), b.probe(t, call))
	}
	twoSided(t, "open_by_handle_at", child(t, alone(), "handle", "/etc/passwd", "root"), b.probe(t, "handle", "/etc/passwd", "root"))
	if r := b.probe(t, "int80"); wall == sandbox.Kernel && r.signal != int(unix.SIGSYS) {
		t.Errorf("a call of i386: got %+v, want killed by SIGSYS", r)
	}
}
