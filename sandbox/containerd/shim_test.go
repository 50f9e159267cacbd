package containerd

import (
	"os/exec"
	"syscall"
	"testing"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/engine/enginetest"
	"github.com/mayfly-ci/mayfly/test/containerdtest"
)

// testForgottenShim: a shim that the daemon has forgotten goes with its box, and
// of what only looks like one nothing is touched. testHalfDeleted meets the real
// ones, if the machine is busy enough.
func testForgottenShim(t *testing.T, d *containerdtest.Daemon) {
	cfg := config(t, d)
	cfg.Image = containerdtest.Busybox
	r := newRuntime(t, cfg)
	enginetest.Create(t, r, "box", sandbox.Spec{})
	own := startShim(t, r.cfg.Namespace, r.id("box"), 0)
	others := map[string]<-chan error{
		"of another box":       startShim(t, r.cfg.Namespace, r.id("other"), 0),
		"of another namespace": startShim(t, "other", r.id("box"), 0),
		"of a job":             startShim(t, r.cfg.Namespace, r.id("box"), 1<<30),
		"which starts another": startShim(t, r.cfg.Namespace, r.id("box"), 0, "start"),
	}
	if err := r.Destroy(enginetest.Bounded(t), "box"); err != nil {
		t.Error(err)
	}
	if err := enginetest.Wait(t, "the shim ends", own); err != nil {
		t.Errorf("the shim of the box: %v, want it to end as it likes", err)
	}
	for what, ended := range others {
		select {
		case err := <-ended:
			t.Errorf("a shim %s: it ended (%v), want it untouched", what, err)
		default:
		}
	}
}

// startShim starts what looks like a shim. It ends well when it is asked to.
func startShim(t *testing.T, namespace, id string, uid uint32, more ...string) <-chan error {
	t.Helper()
	cmd := exec.Command("/bin/sh")
	cmd.Args = append([]string{"containerd-shim-test", "-c", "trap 'exit 0' TERM; echo up; i=0; while [ $i -lt 6000 ]; do i=$((i+1)); sleep 0.05; done", "-namespace", namespace, "-id", id}, more...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err == nil {
		_, err = out.Read(make([]byte, 1)) // its trap is set
	}
	if err != nil {
		t.Fatal(err)
	}
	ended, over := make(chan error, 1), make(chan struct{})
	go func() { ended <- cmd.Wait(); close(over) }()
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it has ended, or not
		<-over
	})
	return ended
}
