package servertest_test

import (
	"context"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/test/servertest"
)

// TestHold: a port that is held is given to nobody who asks for any, a server that
// is told it can listen there, again too, and is reached. It is alone: a child that
// another test starts has the listener for a moment.
func TestHold(t *testing.T) {
	p, err := servertest.Hold()
	if err != nil || p.Number() == 0 {
		t.Fatalf("%d, %v", p.Number(), err)
	}
	defer p.Free()
	for range 2 {
		l, err := net.Listen("tcp", p.Address())
		if err != nil {
			t.Fatal(err)
		}
		conn, err := net.Dial("tcp", p.Address())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := net.Listen("tcp", p.Address()); err == nil {
			t.Error("two listen on one port")
		}
		_, _ = conn.Close(), l.Close()
	}
	for range 2000 { // of some 28000 that there are; one that is not held comes up now and then
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		if l.Addr().String() == p.Address() {
			t.Error("somebody else was given the port")
		}
		_ = l.Close()
	}
}

// TestProcess: one that ends while it starts is told from one that is slow, and
// stopping is final.
func TestProcess(t *testing.T) {
	t.Parallel()
	log := filepath.Join(t.TempDir(), "log")
	never := func() error { return context.DeadlineExceeded }
	var p servertest.Process
	if err := p.Stop(t.Context()); err != nil {
		t.Errorf("one that never ran: %v", err)
	}
	if err := p.Run(exec.Command("sh", "-c", "echo no luck; exit 1"), log); err != nil {
		t.Fatal(err)
	}
	if err := p.Until(t.Context(), never); err == nil || !strings.Contains(err.Error(), "ended while starting") || servertest.Tail(log) != "no luck\n" {
		t.Errorf("%v, %q", err, servertest.Tail(log))
	}
	stop := p.Stop // a harness keeps it
	if err := p.Run(exec.Command("cat", "/dev/zero"), "/dev/null"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := stop(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if err := p.Until(t.Context(), never); err == nil || !strings.Contains(err.Error(), "ended") {
		t.Errorf("a process that was stopped: %v", err)
	}
	if err := p.Run(exec.Command("/nonexistent"), log); err == nil {
		t.Error("a program that is not there runs")
	}
}
