package servertest

import (
	"os/exec"
	"syscall"
	"testing"
)

// TestFreeze: a process that is busy on another processor stands when Freeze
// returns, each time.
func TestFreeze(t *testing.T) {
	cmd := exec.Command("sh", "-c", "while :; do :; done")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = cmd.Process.Kill(), cmd.Wait() })
	for range 500 {
		if err := Freeze(cmd.Process.Pid); err != nil {
			t.Fatal(err)
		}
		if pid, err := running([]int{cmd.Process.Pid}); pid != 0 || err != nil {
			t.Fatalf("it runs still: %d, %v", pid, err)
		}
		if err := cmd.Process.Signal(syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
	}
	const nobody = 1 << 22 // above the most that pid_max can be
	if err := Freeze(nobody); err != nil {
		t.Errorf("what is not there: got %v", err)
	}
}
