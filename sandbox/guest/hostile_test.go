package guest_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/guest"
	"github.com/mayfly-ci/mayfly/sandbox/guest/wire"
)

// hostile returns a client whose guest is the function: what it sends is up to
// it. Frames of the agent are read and thrown away, unless deaf.
func hostile(t *testing.T, deaf bool, do func(t *testing.T, conn net.Conn)) *guest.Client {
	t.Helper()
	ours, theirs := net.Pipe()
	go func() {
		_, _ = theirs.Write(wire.AppendHello(nil))
		if !deaf {
			go func() { _, _ = io.Copy(io.Discard, theirs) }()
		}
		do(t, theirs)
	}()
	c, err := guest.New(t.Context(), ours, guest.Config{Patience: 100 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close(); _ = theirs.Close() })
	return c
}

func output(n int) []byte {
	return append(wire.AppendHeader(nil, wire.Stdout, n), make([]byte, n)...)
}

func TestHostileGuestHarmsOnlyItself(t *testing.T) {
	t.Parallel()
	header := func(typ wire.Type, n int) string { return string(wire.AppendHeader(nil, typ, n)) }
	frame := func(typ wire.Type, payload string) string { return string(wire.AppendFrame(nil, typ, payload)) }
	process := func(c *guest.Client, ctx context.Context) error {
		_, err := c.Run(ctx, sandbox.Process{Args: []string{"x"}})
		return err
	}
	put := func(c *guest.Client, ctx context.Context) error {
		return c.Put(ctx, "/x", io.LimitReader(endless{}, 10<<20))
	}
	get := func(c *guest.Client, ctx context.Context) error { _, err := c.Get(ctx, "/x", 10); return err }
	for name, c := range map[string]struct {
		call func(*guest.Client, context.Context) error
		say  string // "…!" hangs up after it
	}{
		"unknown type":             {process, "\xff\x00\x00\x00\x00"},
		"type of the agent":        {process, frame(wire.Start, "")},
		"second hello":             {process, string(wire.AppendHello(nil))},
		"length of 4 GiB":          {process, string(wire.Stdout) + "\xff\xff\xff\xff"},
		"output too long":          {process, header(wire.Stdout, wire.MaxData+wire.StampSize+1)},
		"output without stamp":     {process, frame(wire.Stdout, "short")},
		"output of no process":     {get, string(output(9))},
		"exit of no length":        {process, frame(wire.Exit, "")},
		"exit and signal":          {process, frame(wire.Exit, "\x01\x09")},
		"signal 65":                {process, frame(wire.Exit, "\x00\x41")},
		"exit of no process":       {get, string(wire.AppendExit(nil, 0, 0))},
		"result of no transfer":    {process, frame(wire.Result, "\x00")},
		"data of no transfer":      {process, frame(wire.FileData, "x")},
		"grant of no transfer":     {process, string(wire.AppendUint32(nil, wire.Grant, 1))},
		"result without code":      {get, frame(wire.Result, "")},
		"result with unknown code": {get, frame(wire.Result, "\x09")},
		"message too long":         {get, header(wire.Result, wire.MaxMessage+2)},
		"file too long":            {get, frame(wire.FileData, "01234567890")},
		"file in pieces too long":  {get, strings.Repeat(frame(wire.FileData, "x"), 11)},
		"file for a put":           {put, frame(wire.FileData, "x")},
		"grant for a get":          {get, string(wire.AppendUint32(nil, wire.Grant, 1))},
		"grant of 4 GiB":           {put, string(wire.AppendUint32(nil, wire.Grant, 1<<32-1))},
		"grant of 3 bytes":         {put, frame(wire.Grant, "123")},
		"cut in a header":          {process, "\x41\x00!"},
		"cut in a payload":         {process, header(wire.Stdout, 100) + "x!"},
		"closes at once":           {process, "!"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			asked := make(chan struct{})
			client := hostile(t, true, func(_ *testing.T, conn net.Conn) {
				// Waits for the request, so that the frames meet it.
				one := make([]byte, 1)
				_, _ = conn.Read(one)
				go func() { _, _ = io.Copy(io.Discard, conn) }()
				close(asked)
				say, hangUp := strings.CutSuffix(c.say, "!")
				_, _ = conn.Write([]byte(say))
				if hangUp {
					_ = conn.Close()
				}
			})
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			err := c.call(client, ctx)
			<-asked
			if !errors.Is(err, sandbox.ErrDied) || ctx.Err() != nil {
				t.Errorf("call: got %v, want ErrDied before the time is over", err)
			}
			<-client.Done()
			if err := client.Err(); !errors.Is(err, sandbox.ErrDied) {
				t.Errorf("Err: got %v, want ErrDied", err)
			}
			if err := c.call(client, t.Context()); !errors.Is(err, sandbox.ErrDied) {
				t.Errorf("next call: got %v, want ErrDied", err)
			}
		})
	}
}

func TestNothingMayFollowTheEnd(t *testing.T) {
	t.Parallel()
	exit, result := wire.AppendExit(nil, 0, 0), wire.AppendResult(nil, wire.OK, "")
	input := wire.AppendUint32(nil, wire.InputGrant, 0)
	for name, say := range map[string][]byte{
		"input":  append(bytes.Clone(exit), input...),
		"exit":   bytes.Join([][]byte{exit, exit}, nil),
		"output": append(bytes.Clone(exit), output(9)...),
		"result": bytes.Join([][]byte{result, result}, nil),
	} {
		c := hostile(t, true, func(_ *testing.T, conn net.Conn) {
			_, _ = conn.Read(make([]byte, 1))
			go func() { _, _ = io.Copy(io.Discard, conn) }()
			_, _ = conn.Write(say)
		})
		// The first frame may still be taken for an honest end.
		if name == "result" {
			_, _ = c.Get(t.Context(), "/x", 1)
		} else {
			_, _ = c.Run(t.Context(), sandbox.Process{Args: []string{"x"}})
		}
		select {
		case <-c.Done():
		case <-time.After(time.Minute):
			t.Errorf("second %s: the guest is alive, want dead", name)
		}
	}
}

func TestHelloIsChecked(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ say, want string }{
		"another version": {"\x40\x00\x00\x00\x0emayfly-guest\x00\x63", "make build"},
		"another program": {"\x40\x00\x00\x00\x0eMAYFLY-guest\x00\x01", "bad frame"},
		"another frame":   {string(wire.AppendExit(nil, 0, 0)), "bad frame"},
		"text":            {"sh: mayfly-guest: not found\n", "bad frame"},
		"nothing":         {"", "EOF"},
	} {
		ours, theirs := net.Pipe()
		go func() {
			_, _ = theirs.Write([]byte(c.say))
			_ = theirs.Close()
		}()
		if _, err := guest.New(t.Context(), ours, guest.Config{}); !errors.Is(err, sandbox.ErrDied) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want ErrDied with %q", name, err, c.want)
		}
	}
	ours, theirs := net.Pipe()
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("no time left")
	time.AfterFunc(10*time.Millisecond, func() { cancel(cause) })
	if _, err := guest.New(ctx, ours, guest.Config{}); !errors.Is(err, cause) {
		t.Errorf("silent guest: got %v, want the cause of the context", err)
	}
	if _, err := theirs.Write([]byte("x")); err == nil {
		t.Error("the stream is open after New has failed, want closed")
	}
}

func TestGuestThatDoesNotRead(t *testing.T) {
	t.Parallel()
	for name, call := range map[string]func(*guest.Client) error{
		"run": func(c *guest.Client) error {
			_, err := c.Run(t.Context(), sandbox.Process{Args: []string{"x"}})
			return err
		},
		"put": func(c *guest.Client) error { return c.Put(t.Context(), "/x", endless{}) },
		"get": func(c *guest.Client) error { _, err := c.Get(t.Context(), "/x", 1); return err },
	} {
		c := hostile(t, true, func(*testing.T, net.Conn) {})
		if err := call(c); !errors.Is(err, sandbox.ErrDied) {
			t.Errorf("%s: got %v, want ErrDied", name, err)
		}
	}
}

func TestGuestThatDoesNotAnswer(t *testing.T) {
	t.Parallel()
	cause := errors.New("canceled")
	for name, call := range map[string]func(*guest.Client, context.Context) error{
		"run": func(c *guest.Client, ctx context.Context) error {
			_, err := c.Run(ctx, sandbox.Process{Args: []string{"x"}, Grace: time.Millisecond})
			return err
		},
		"put":         func(c *guest.Client, ctx context.Context) error { return c.Put(ctx, "/x", strings.NewReader("x")) },
		"put, window": func(c *guest.Client, ctx context.Context) error { return c.Put(ctx, "/x", endless{}) },
		"get":         func(c *guest.Client, ctx context.Context) error { _, err := c.Get(ctx, "/x", 1); return err },
	} {
		c := hostile(t, false, func(*testing.T, net.Conn) {})
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(10*time.Millisecond, func() { cancel(cause) })
		if err := call(c, ctx); !errors.Is(err, cause) || !errors.Is(err, sandbox.ErrDied) {
			t.Errorf("%s: got %v, want the cause and ErrDied", name, err)
		}
	}
}

func TestGuestThatDripsAfterTheStop(t *testing.T) {
	t.Parallel()
	c := hostile(t, false, func(_ *testing.T, conn net.Conn) {
		for {
			if _, err := conn.Write(output(9)); err != nil {
				return
			}
			runtime.Gosched()
		}
	})
	ctx, cancel := context.WithCancel(t.Context())
	began := time.Now()
	_, err := c.Run(ctx, sandbox.Process{Args: []string{"x"}, Grace: time.Millisecond, Stdout: func(time.Time, []byte) error { cancel(); return nil }})
	if !errors.Is(err, sandbox.ErrDied) || time.Since(began) > time.Minute {
		t.Errorf("got %v after %v, want ErrDied soon: output must not keep a stopped process alive", err, time.Since(began))
	}
}

func TestCloseEndsWhatIsUnderWay(t *testing.T) {
	t.Parallel()
	c := hostile(t, false, func(*testing.T, net.Conn) {})
	done := make(chan error, 1)
	go func() {
		_, err := c.Run(t.Context(), sandbox.Process{Args: []string{"x"}})
		done <- err
	}()
	if err := c.Close(); err != nil {
		t.Errorf("close: got %v, want nil", err)
	}
	if err := <-done; !errors.Is(err, sandbox.ErrDied) {
		t.Errorf("run: got %v, want ErrDied", err)
	}
	if err := c.Close(); err != nil {
		t.Errorf("second close: got %v, want nil", err)
	}
}

func TestGuestThatOverdrawsItsWindow(t *testing.T) {
	t.Parallel()
	sent := make(chan int, 1)
	c := hostile(t, false, func(_ *testing.T, conn net.Conn) {
		n := 0
		for ; n < 1000; n++ {
			if _, err := conn.Write(output(wire.MaxData)); err != nil {
				break
			}
		}
		sent <- n
	})
	_, err := c.Run(t.Context(), sandbox.Process{Args: []string{"x"}, Stdout: func(time.Time, []byte) error {
		<-c.Done() // takes nothing until the guest is dead
		return nil
	}})
	if !errors.Is(err, sandbox.ErrDied) {
		t.Errorf("got %v, want ErrDied", err)
	}
	if n, most := <-sent, 2*wire.Window/wire.MaxData+2; n > most {
		t.Errorf("the agent took %d frames that nobody had room for, want at most %d", n, most)
	}
}
