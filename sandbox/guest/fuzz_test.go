package guest_test

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/guest"
	"github.com/mayfly-ci/mayfly/sandbox/guest/wire"
)

// A script is a guest that says hello and then one part of what it has for each
// write of the agent, whatever that was, or after a while. After the last it
// hangs up.
type script struct {
	parts  chan []byte
	closed chan struct{}
	once   sync.Once
	now    []byte
	mu     sync.Mutex
	left   []byte
}

func newScript(data []byte) *script {
	return &script{parts: make(chan []byte, 1<<10), closed: make(chan struct{}), now: wire.AppendHello(nil), left: data}
}

// Write releases the next part: its length is the first byte, times eight.
func (s *script) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.left) == 0 {
		_ = s.Close()
		return len(b), nil
	}
	n := min(int(s.left[0])*8, len(s.left)-1)
	select {
	case s.parts <- s.left[1 : 1+n]:
	default:
		_ = s.Close()
	}
	s.left = s.left[1+n:]
	return len(b), nil
}

func (s *script) Read(b []byte) (int, error) {
	for len(s.now) == 0 {
		select {
		case s.now = <-s.parts:
		case <-time.After(500 * time.Microsecond):
			_, _ = s.Write(nil)
		case <-s.closed:
			select {
			case s.now = <-s.parts:
			default:
				return 0, io.EOF
			}
		}
	}
	n := copy(b, s.now)
	s.now = s.now[n:]
	return n, nil
}

func (s *script) Close() error {
	s.once.Do(func() { close(s.closed) })
	return nil
}

// part makes one part of a script out of frames.
func part(frames ...[]byte) []byte {
	var all []byte
	for _, f := range frames {
		all = append(all, f...)
	}
	for len(all)%8 != 0 { // of a stream that is at its end
		all = append(all, 0xff)
	}
	return append([]byte{byte(len(all) / 8)}, all...)
}

// FuzzClient feeds a client whatever a guest might say. Every call returns, a
// guest that breaks the protocol is dead, and no result is out of bounds.
func FuzzClient(f *testing.F) {
	f.Add([]byte{})
	f.Add(part(output(9), output(20), wire.AppendExit(nil, 0, 9)))
	f.Add(append(part(wire.AppendExit(nil, 3, 0)), part(wire.AppendUint32(nil, wire.Grant, 5), wire.AppendResult(nil, wire.OK, ""))...))
	f.Add(append(part(wire.AppendExit(nil, 3, 0), wire.AppendResult(nil, wire.Refused, "no")), part(wire.AppendFrame(nil, wire.FileData, "abc"), wire.AppendResult(nil, wire.OK, ""))...))
	f.Add(part(wire.AppendFrame(nil, wire.FileData, strings.Repeat("x", 200))))
	f.Add(append(part(wire.AppendUint32(nil, wire.InputGrant, 6), wire.AppendExit(nil, 3, 0)), part(wire.AppendUint32(nil, wire.InputGrant, 1<<31))...))
	f.Add(append(part(wire.AppendProbed(nil, []wire.Outcome{{Errno: 111, Reply: "x"}}), wire.AppendExit(nil, 3, 0)), part(wire.AppendProbed(nil, nil))...))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 1<<20 {
			return
		}
		c, err := guest.New(context.Background(), newScript(data), guest.Config{Grace: time.Millisecond, Patience: 50 * time.Millisecond})
		if err != nil {
			t.Fatalf("hello: %v", err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
		defer cancel()
		bounded := func(err error) {
			if err != nil && !errors.Is(err, sandbox.ErrDied) && len(err.Error()) > 8*wire.MaxMessage {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
		}
		var n int
		out := func(_ time.Time, b []byte) error {
			n += len(b)
			return nil
		}
		for round := range 2 {
			p := sandbox.Process{Args: []string{"x"}, Stdout: out, Stderr: out}
			if round == 0 {
				in := make(chan []byte, 1)
				in <- make([]byte, wire.Window)
				close(in)
				p.Stdin, p.TTY = in, &sandbox.TTY{}
			}
			outcomes, err := c.Probe(ctx, []sandbox.Attempt{{Network: "raw"}})
			bounded(err)
			if err == nil && len(outcomes) != 1 {
				t.Errorf("probe: got %d outcomes of 1 attempt", len(outcomes))
			}
			exit, err := c.Run(ctx, p)
			bounded(err)
			if exit.Code < 0 || exit.Code > 255 || exit.Signal < 0 || exit.Signal > 64 {
				t.Errorf("exit: got %+v, which no process has", exit)
			}
			bounded(c.Put(ctx, "/x", strings.NewReader(strings.Repeat("x", 100_000))))
			got, err := c.Get(ctx, "/x", 100)
			bounded(err)
			if len(got) > 100 || (err != nil && got != nil) {
				t.Errorf("get: got %d bytes and %v, want at most 100 or an error", len(got), err)
			}
		}
		if n > len(data) {
			t.Errorf("%d bytes of output from %d bytes", n, len(data))
		}
		_ = c.Close()
	})
}
