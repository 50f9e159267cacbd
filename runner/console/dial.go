package console

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"github.com/mayfly-ci/mayfly/sandbox"
)

// ErrRefused reports that the agent does not open the shell: its box is not
// kept, or somebody else is in it.
var ErrRefused = errors.New("refused")

// A Session is what a person wants of the agent.
type Session struct {
	Job    string
	Args   []string // empty: an interactive shell
	Term   string
	Size   *sandbox.Size // of the person's terminal; nil if there is none
	Resize <-chan sandbox.Size
	Stdin  io.Reader // read until the session ends, and for one read longer
	Stdout io.Writer
	Stderr io.Writer
}

// Dial opens a shell in a kept box of the agent that runs with this state
// directory, and returns its exit status when it has ended. ErrRefused has the
// agent's reason.
func Dial(ctx context.Context, state string, s Session) (status int, err error) {
	var conn *net.UnixConn
	err = through(state, func(path string) (err error) {
		conn, err = net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("no agent that keeps boxes runs with the state directory %s: %w", state, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() }) // ends the reading
	defer stop()
	d := &dialled{encoder: json.NewEncoder(conn)}
	// What cannot be sent has no reader: the other direction says why.
	_ = d.send(ask{Job: s.Job, Args: s.Args, Term: s.Term, Size: s.Size})
	ended := make(chan struct{})
	var resizes sync.WaitGroup
	resizes.Go(func() { d.resize(s.Resize, ended) })
	// It is not waited for: a read of a terminal cannot be ended, the process
	// does that.
	go d.input(s.Stdin)
	status, err = output(conn, s)
	close(ended)
	err = errors.Join(err, conn.Close())
	resizes.Wait()
	if ctx.Err() != nil {
		return 0, context.Cause(ctx)
	}
	return status, err
}

// A dialled is the writing side of the client.
type dialled struct {
	mu      sync.Mutex
	encoder *json.Encoder
}

func (d *dialled) send(v any) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.encoder.Encode(v); err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	return nil
}

// input sends what is typed.
func (d *dialled) input(from io.Reader) {
	b := make([]byte, 32<<10)
	for {
		n, err := from.Read(b)
		if n > 0 && d.send(up{In: b[:n]}) != nil {
			return
		}
		if err != nil {
			_ = d.send(up{End: true}) // the same
			return
		}
	}
}

func (d *dialled) resize(sizes <-chan sandbox.Size, ended <-chan struct{}) {
	for {
		select {
		case size := <-sizes:
			if d.send(up{Size: &size}) != nil {
				return
			}
		case <-ended:
			return
		}
	}
}

// output shows what the agent sends, to its last line.
func output(conn *net.UnixConn, s Session) (status int, err error) {
	lines := scanner(conn)
	for {
		var d down
		if err := next(lines, &d); err != nil {
			return 0, fmt.Errorf("the agent ended the shell: %w", err)
		}
		switch {
		case d.Refuse != "":
			return 0, fmt.Errorf("%w: %s", ErrRefused, d.Refuse)
		case d.Fail != "":
			return 0, errors.New(d.Fail)
		case d.Exit != nil:
			return *d.Exit, nil
		}
		_, err := s.Stdout.Write(d.Out)
		if len(d.Err) > 0 && err == nil {
			_, err = s.Stderr.Write(d.Err)
		}
		if err != nil {
			return 0, fmt.Errorf("output: %w", err)
		}
	}
}
