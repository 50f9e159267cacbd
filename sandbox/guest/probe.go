package guest

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/guest/wire"
)

// probeTime is how long all attempts of a probe may take. What is refused is so
// at once, unless the box is starved.
const probeTime = 5 * time.Second

var _ sandbox.Prober = (*Client)(nil)

// Probe implements sandbox.Prober.
func (c *Client) Probe(ctx context.Context, attempts []sandbox.Attempt) ([]sandbox.Outcome, error) {
	if len(attempts) > wire.MaxAttempts {
		return nil, fmt.Errorf("probe: %d attempts, at most %d", len(attempts), wire.MaxAttempts)
	}
	var tries []wire.Attempt
	for _, a := range attempts {
		t, err := socketOf(a)
		if err != nil {
			return nil, fmt.Errorf("probe: %w", err)
		}
		tries = append(tries, t)
	}
	answer := make(chan []wire.Outcome, 1)
	if err := c.beginProbe(answer); err != nil {
		return nil, err
	}
	if err := c.send(wire.AppendProbe(nil, uint32(probeTime/time.Millisecond), tries)); err != nil {
		return nil, err
	}
	timer := time.NewTimer(probeTime + c.wait)
	defer timer.Stop()
	var got []wire.Outcome
	select {
	case got = <-answer:
	case <-c.done:
		return nil, c.Err()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-timer.C:
		c.kill(fmt.Errorf("the guest has not answered a probe for %v", probeTime+c.wait))
		return nil, c.Err()
	}
	if len(got) != len(attempts) {
		c.kill(fmt.Errorf("%w: %d outcomes of %d attempts", wire.ErrFrame, len(got), len(attempts)))
		return nil, c.Err()
	}
	outcomes := make([]sandbox.Outcome, len(got))
	for i, o := range got {
		if o.Errno != 0 {
			outcomes[i].Err = unix.Errno(o.Errno)
		}
		outcomes[i].Reply = []byte(o.Reply)
	}
	return outcomes, nil
}

func (c *Client) beginProbe(answer chan []wire.Outcome) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return c.err
	}
	if c.probed != nil {
		return fmt.Errorf("probe: %w", ErrBusy)
	}
	c.probed = answer
	return nil
}

// receiveProbed hands over the answer to a probe, also if nobody waits for it
// any more. The caller holds Client.mu.
func (c *Client) receiveProbed(p []byte) error {
	if c.probed == nil {
		return fmt.Errorf("%w: an answer, but nothing is probed", wire.ErrFrame)
	}
	outcomes, err := wire.ParseProbed(p)
	if err != nil {
		return fmt.Errorf("probe: %w", err)
	}
	c.probed <- outcomes
	c.probed = nil
	return nil
}

// socketOf says in the kernel's words what is to be tried.
func socketOf(a sandbox.Attempt) (wire.Attempt, error) {
	w := wire.Attempt{
		Domain: unix.AF_INET, Type: unix.SOCK_STREAM,
		Port: a.Address.Port(), To: string(a.Address.Addr().AsSlice()), Text: string(a.Text),
	}
	if len(w.To) == 16 {
		w.Domain = unix.AF_INET6
	}
	none := false // no address is needed
	switch a.Network {
	case "tcp":
	case "udp":
		w.Type = unix.SOCK_DGRAM
	case "raw":
		w.Type, w.Protocol, none = unix.SOCK_RAW, unix.IPPROTO_ICMP, true
	case "packet":
		w.Domain, w.Type, none = unix.AF_PACKET, unix.SOCK_RAW, true
	case "vsock":
		w.Domain, none = unix.AF_VSOCK, true
	default:
		return w, fmt.Errorf("network %q", a.Network)
	}
	if none == (w.To != "") || len(w.Text) > wire.MaxText {
		return w, fmt.Errorf("%s to %q with %d bytes to send, at most %d", a.Network, a.Address, len(w.Text), wire.MaxText)
	}
	return w, nil
}
