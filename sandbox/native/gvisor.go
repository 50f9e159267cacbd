package native

import (
	"context"
	"fmt"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/gvisor"
	"github.com/mayfly-ci/mayfly/sandbox/native/boxinit"
)

// lastWords is how long a keeper may take to say why it ends: it has to be
// scheduled, and to write.
const lastWords = time.Second

// newBox is a box of which nothing is made, with the program that its wall needs
// until it is made. Who calls it calls made.
func (r *Runtime) newBox(ctx context.Context, name string, wall sandbox.Isolation) (b *box, err error) {
	b = &box{name: name, groups: r.groups, dead: make(chan struct{})}
	switch {
	case wall == sandbox.Kernel:
	case wall == sandbox.GVisor && r.cfg.Unprivileged && r.cfg.GVisor.Runsc != "":
		err = fmt.Errorf("isolation %q: it needs a range of user ids: run the agent as root: %w", wall, sandbox.ErrUnsupported)
	case wall == sandbox.GVisor:
		b.runsc, _, err = r.runsc.Open(ctx)
	default:
		err = fmt.Errorf("isolation %q: this runtime has %q: %w", wall, sandbox.GVisor, sandbox.ErrUnsupported)
	}
	return b, err
}

// made lets go of the program.
func (b *box) made() {
	if b.runsc != nil {
		_ = b.runsc.Close() // only read from
		b.runsc = nil
	}
}

// bundle is what the kernel of a box is told.
func bundle(setup *boxinit.Setup) ([]byte, error) {
	return gvisor.Box{
		Host: boxinit.Host, Expires: setup.Expires, Filter: setup.Filter,
		RunBytes: runBytes, ShmBytes: shmBytes, Files: maxFiles,
	}.Bundle()
}

// complained is what was said of a box that could not be made.
func (b *box) complained() error {
	if b.process == nil || b.complaint == nil {
		return nil
	}
	select {
	case <-b.dead:
	case <-time.After(lastWords):
	}
	return gvisor.Said(b.complaint)
}

// checkGVisor makes a box with a kernel of its own and asks it whose it is.
func (r *Runtime) checkGVisor(ctx context.Context) sandbox.Claim {
	return r.runsc.Claim(ctx, func() (string, error) {
		return r.try(ctx, sandbox.GVisor, "/bin/cat", "/proc/version")
	})
}
