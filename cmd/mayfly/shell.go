package main

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/runner/console"
	"github.com/mayfly-ci/mayfly/sandbox"
)

func runShell(c *call) error {
	var command []string
	if i := slices.Index(c.args, "--"); i >= 0 {
		c.args, command = c.args[:i], c.args[i+1:]
	}
	o, err := c.flags("shell", 1, nil)
	if err != nil {
		return err
	}
	if len(o.args) != 1 {
		return usageError("name the job whose box is kept: \"mayfly jobs\" lists them")
	}
	conf, err := load(o.config)
	if err != nil {
		return exitError{exitUsage, err}
	}
	s := console.Session{
		Job: o.args[0], Args: command, Term: os.Getenv("TERM"), Stdin: os.Stdin, Stdout: c.stdout, Stderr: c.stderr,
	}
	restore := func() error { return nil }
	if size, ok := terminal(); ok {
		sizes, stop := resizes()
		defer stop()
		s.Size, s.Resize = &size, sizes
		if restore, err = raw(); err != nil {
			return err
		}
	}
	status, err := console.Dial(context.Background(), conf.State, s)
	err = errors.Join(err, restore())
	switch {
	case errors.Is(err, console.ErrRefused):
		return exitError{exitNo, err}
	case err != nil:
		return err
	case status != 0:
		return exitError{status, nil}
	}
	return nil
}

// terminal is the size of the terminal that the program is at, if it reads and
// writes one.
func terminal() (sandbox.Size, bool) {
	in, inErr := unix.IoctlGetWinsize(int(os.Stdin.Fd()), unix.TIOCGWINSZ)
	_, outErr := unix.IoctlGetWinsize(int(os.Stdout.Fd()), unix.TIOCGWINSZ)
	if inErr != nil || outErr != nil {
		return sandbox.Size{}, false
	}
	return sandbox.Size{Rows: in.Row, Cols: in.Col}, true
}

// resizes sends the size of the terminal whenever it changes, until the function
// that it returns is called.
func resizes() (<-chan sandbox.Size, func()) {
	sizes, changed, ended := make(chan sandbox.Size), make(chan os.Signal, 1), make(chan struct{})
	signal.Notify(changed, unix.SIGWINCH)
	var watching sync.WaitGroup
	watching.Go(func() {
		for {
			select {
			case <-changed:
			case <-ended:
				return
			}
			if size, ok := terminal(); ok {
				select {
				case sizes <- size:
				case <-ended:
					return
				}
			}
		}
	})
	return sizes, func() {
		signal.Stop(changed)
		close(ended)
		watching.Wait()
	}
}

// raw lets every key through to the box, Ctrl-C too (termios(3), cfmakeraw).
// The function that it returns puts the terminal back.
func raw() (func() error, error) {
	fd := int(os.Stdin.Fd())
	old, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, os.NewSyscallError("terminal", err)
	}
	t := *old
	t.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
	t.Oflag &^= unix.OPOST
	t.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
	t.Cflag = t.Cflag&^(unix.CSIZE|unix.PARENB) | unix.CS8
	t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &t); err != nil {
		return nil, os.NewSyscallError("terminal", err)
	}
	return func() error {
		return os.NewSyscallError("terminal", unix.IoctlSetTermios(fd, unix.TCSETS, old))
	}, nil
}
