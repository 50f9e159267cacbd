package native

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/kernel"
)

func TestForkBomb(t *testing.T) {
	t.Parallel()
	r := newRuntime(t, config(t))
	b := create(t, r, "bomb", sandbox.Spec{Limits: sandbox.Limits{Pids: 40}})
	out, _ := script(t, b, `for i in $(seq 200); do sleep 60 & done 2>&1; echo`)
	if !strings.Contains(out, "Cannot fork") && !strings.Contains(out, "Resource temporarily unavailable") {
		t.Errorf("200 processes with a limit of 40: got %q, want a refused fork", out)
	}
	if calm, exit := script(t, create(t, r, "calm", sandbox.Spec{}), "echo calm"); exit.Code != 0 {
		t.Errorf("its neighbour: got %q %+v", calm, exit)
	}
}

func TestMemoryHog(t *testing.T) {
	t.Parallel()
	b := create(t, newRuntime(t, config(t)), "box", sandbox.Spec{Limits: sandbox.Limits{Memory: 64 << 20}})
	hog := `/usr/bin/python3 -c 'x = bytearray(200 << 20); print(len(x))'`
	out, exit := script(t, b, "exec "+hog)
	if !exit.OOM || exit.Signal != 9 {
		t.Errorf("200 MiB in a box of 64: got %q %+v, want killed and OOM", out, exit)
	}
	out, exit = script(t, b, "echo fine")
	if exit.OOM || out != "fine\n" {
		t.Errorf("the step after: got %q %+v, want it to work, and no OOM", out, exit)
	}
	if out, exit := script(t, create(t, newRuntime(t, config(t)), "roomy", sandbox.Spec{}), hog); exit.Code != 0 {
		t.Errorf("the same in a box of 1 GiB: got %q %+v, want success", out, exit)
	}
	// What a tmpfs holds is memory, too.
	out, exit = script(t, create(t, newRuntime(t, config(t)), "shm", sandbox.Spec{Limits: sandbox.Limits{Memory: 32 << 20}}),
		"exec dd if=/dev/zero of=/dev/shm/x bs=1M count=60")
	if !exit.OOM {
		t.Errorf("60 MiB of shared memory in a box of 32: got %q %+v, want OOM", out, exit)
	}
}

func TestCPU(t *testing.T) {
	t.Parallel()
	b := create(t, newRuntime(t, config(t)), "box", sandbox.Spec{Limits: sandbox.Limits{MilliCPU: 50}})
	script(t, b, `timeout 1 sh -c 'while :; do :; done'`)
	for _, d := range b.(*box).groups.dirs("box") {
		file := filepath.Join(d, "cpu.stat")
		stat, err := os.ReadFile(file)
		if err != nil {
			continue // another controller's tree
		}
		n, err := kernel.Counter(file, "nr_throttled")
		if err != nil || n == 0 {
			t.Errorf("a twentieth of a core: got %d throttled periods, %v, want some: %s", n, err, stat)
		}
	}
}

// A box that fills its disk gets ENOSPC, wherever it writes, and its
// neighbour still writes.
func TestDisk(t *testing.T) {
	t.Parallel()
	r := newRuntime(t, config(t))
	small := sandbox.Limits{Disk: 64 << 20, Inodes: 2048}
	full := create(t, r, "full", sandbox.Spec{Limits: small})
	neighbour := create(t, r, "neighbour", sandbox.Spec{Limits: small})
	for _, dir := range []string{"/workspace", "/tmp", "/usr/lib", "/var/log", "/root", "/etc"} {
		out, _ := script(t, full, "dd if=/dev/zero of="+dir+"/fill bs=1M count=100; stat -c size=%s "+dir+"/fill; rm "+dir+"/fill; sync")
		if !strings.Contains(out, "No space left") {
			t.Errorf("100 MiB in %s of a box of 64: got %q, want ENOSPC", dir, out)
		}
		_, size, _ := strings.Cut(out, "size=")
		size, _, _ = strings.Cut(size, "\n") // what follows is dd's own
		if n, err := strconv.ParseInt(size, 10, 64); err != nil || n > small.Disk || n < small.Disk/2 {
			t.Errorf("written to %s: got %d, %v, want at most %d and not much less", dir, n, err, small.Disk)
		}
	}
	script(t, full, "dd if=/dev/zero of=/workspace/fill bs=1M count=100")
	if out, exit := script(t, neighbour, "dd if=/dev/zero of=/workspace/f bs=1M count=40 && sync"); exit.Code != 0 {
		t.Errorf("the neighbour of a full box: got %q %+v, want success", out, exit)
	}
	out, exit := script(t, neighbour, "i=0; while [ $i -lt 3000 ] && : > /workspace/n$i; do i=$((i+1)); done; ls /workspace | wc -l; : > /usr/lib/one-more")
	if exit.Code == 0 || !strings.Contains(out, "No space left") {
		t.Errorf("3000 files in a box of 2048: got %q %+v, want ENOSPC", out, exit)
	}
}

// A box may make as many files as was asked for, or a few less, never more.
func TestInodes(t *testing.T) {
	t.Parallel()
	r := newRuntime(t, config(t))
	for _, l := range []sandbox.Limits{{Disk: 16 << 20, Inodes: 50}, {Disk: 1 << 30, Inodes: 2000}} {
		b := create(t, r, "box-"+strconv.FormatInt(l.Inodes, 10), sandbox.Spec{Limits: l})
		out, _ := script(t, b, "cd /workspace; i=0; while printf '' > $i; do i=$((i+1)); done 2>/dev/null; ls | wc -l")
		slack := 16 * (l.Disk/(128<<20) + 1) // inodes come in blocks of 16 for each group of 128 MiB
		if n, err := strconv.ParseInt(strings.TrimSpace(out), 10, 64); err != nil || n > l.Inodes || n < l.Inodes-slack-8 {
			t.Errorf("files made with %+v: got %q, want at most %d and at least %d", l, out, l.Inodes, l.Inodes-slack-8)
		}
	}
}

// A disk that is too small for the default number of files holds fewer of them:
// who asks for a small disk need not know how many fit.
func TestSmallDiskHasFewerInodes(t *testing.T) {
	t.Parallel()
	r := newRuntime(t, config(t))
	b := create(t, r, "small", sandbox.Spec{Limits: sandbox.Limits{Disk: 16 << 20}})
	if out, exit := script(t, b, "for i in $(seq 1000); do echo x > /workspace/$i; done && df --output=itotal /workspace"); exit.Code != 0 {
		t.Errorf("1000 files on a disk of 16 MiB: got %q %+v, want success", out, exit)
	}
}

// Deleting many files and making as many again is what builds do. It must cost
// about the same the second time (see format).
func TestDeletedFilesCostNothing(t *testing.T) {
	t.Parallel()
	b := create(t, newRuntime(t, config(t)), "box", sandbox.Spec{})
	out, exit := script(t, b, `/usr/bin/python3 -c '
import os, time
os.mkdir("d")
def make():
    began = time.process_time()
    for i in range(8000): os.close(os.open("d/%d" % i, os.O_CREAT | os.O_WRONLY))
    return time.process_time() - began
first = make()
for i in range(8000): os.unlink("d/%d" % i)
print(make() / first)'`)
	ratio, err := strconv.ParseFloat(strings.TrimSpace(out), 64)
	if err != nil || exit.Code != 0 || ratio > 3 {
		t.Errorf("8000 files again after they were deleted: got %q %+v times the CPU, want about 1", out, exit)
	}
}
