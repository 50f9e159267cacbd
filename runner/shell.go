package runner

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/mayfly-ci/mayfly/sandbox"
)

var (
	// ErrNotKept reports that no box of that job can be entered.
	ErrNotKept = errors.New("no box of this job is kept")
	// ErrShellOpen reports that somebody else has a shell in the box.
	ErrShellOpen = errors.New("a shell is open in this box")

	errKeptOver  = errors.New("the box is not kept any longer")
	errRecording = errors.New("recording")
)

const (
	// shellGrace is between interrupt, terminate and kill of a shell whose
	// person has gone. An interactive shell ignores the first two.
	shellGrace = 100 * time.Millisecond

	// recordMax bounds what may be typed into one shell, in bytes: what cannot
	// be written down does not reach the box.
	recordMax = 16 << 20

	// recordsMax is how many recordings are left: years of looking at failures.
	recordsMax = 256
)

// A Shell is what somebody asks of a kept box.
type Shell struct {
	Job    string
	Who    map[string]string // of the peer: user, uid, pid, login; for the audit
	Args   []string          // empty: an interactive shell
	Term   string            // type of the terminal
	Stdin  <-chan []byte     // as of sandbox.Process, and so are the others
	TTY    *sandbox.TTY
	Stdout sandbox.Output
	Stderr sandbox.Output
}

// Shell runs a command in a kept box, as the job's steps ran: through the guest.
// It returns ErrNotKept or ErrShellOpen if it may not. Every other process of
// the box is killed first. What is typed is recorded before the box sees it; its
// hash is in the audit. When ctx ends, or the time of the box is over, the
// command is killed.
func (a *Agent) Shell(ctx context.Context, sh Shell) (sandbox.Exit, error) {
	k, leave, err := a.kept.enter(sh.Job)
	if err != nil {
		return sandbox.Exit{}, err
	}
	defer leave()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	rec, err := newRecording(filepath.Join(a.state.Dir, "shells"), sh)
	if err != nil {
		return sandbox.Exit{}, err
	}
	who := []string{"recording", filepath.Base(rec.file.Name()), "command", strings.Join(sh.Args, " ")}
	for _, what := range []string{"user", "uid", "pid", "login"} {
		who = append(who, what, sh.Who[what])
	}
	if err := a.audit(ctx, k.job, "box.shell", k.name, nil, who...); err != nil {
		return sandbox.Exit{}, errors.Join(err, rec.file.Close())
	}
	began := time.Now()
	exit, err := k.run(ctx, cancel, sh, rec)
	if errors.Is(err, sandbox.ErrDied) {
		a.kept.leave(k.job, "it died") // there is nothing left to keep
	}
	sum, rerr := rec.close()
	err = errors.Join(err, rerr)
	return exit, errors.Join(err, a.audit(ctx, k.job, "box.shell.end", k.name, err, append(who[:2:2],
		"took", time.Since(began).String(), "exit", strconv.Itoa(exit.Code), "typed", strconv.Itoa(rec.typed), "sha256", sum)...))
}

// enter takes the shell of a kept box, until the function that it returns is
// called.
func (b *keptBoxes) enter(job string) (*kept, func(), error) {
	k := b.of(job)
	b.mu.Lock()
	defer b.mu.Unlock()
	if k == nil || !k.ready || isClosed(k.free) {
		return nil, nil, fmt.Errorf("%w: %s: \"mayfly jobs\" lists those that are", ErrNotKept, job)
	}
	select {
	case k.shell <- struct{}{}:
		return k, func() { <-k.shell }, nil
	default:
		return nil, nil, fmt.Errorf("%w: %s", ErrShellOpen, job)
	}
}

// run runs the command until it ends, ctx does or the box's time is over.
func (k *kept) run(ctx context.Context, cancel context.CancelCauseFunc, sh Shell, rec *recording) (sandbox.Exit, error) {
	p := sandbox.Process{
		Args: sh.Args, Env: k.env, Stdout: sh.Stdout, Stderr: sh.Stderr, Grace: shellGrace, Alone: true,
	}
	if len(p.Args) == 0 {
		p.Args = []string{"/bin/sh", "-c", "command -v bash >/dev/null && exec bash; exec sh"}
	}
	if sh.TTY != nil {
		p.Env = append(slices.Clone(p.Env), "TERM="+sh.Term)
	}
	ended := make(chan struct{})
	var beside sync.WaitGroup
	beside.Go(func() {
		select {
		case <-k.free:
			cancel(errKeptOver)
		case <-ended:
		}
	})
	if sh.Stdin != nil {
		in := make(chan []byte)
		p.Stdin = in
		beside.Go(func() { rec.tee(sh.Stdin, in, ended, cancel) })
	}
	if sh.TTY != nil {
		p.TTY = &sandbox.TTY{Size: sh.TTY.Size, Resize: sh.TTY.Resize}
	}
	exit, err := k.box.Run(ctx, p)
	close(ended)
	beside.Wait()
	return exit, err
}

// A recording is what was typed into a shell: JSON lines in a file that nobody
// but the agent's user can read.
type recording struct {
	file  *os.File
	sum   hash.Hash
	typed int
}

// A recorded line. Typed is text, or Bytes is what is no text.
type recorded struct {
	At    time.Time         `json:"at"`
	Job   string            `json:"job,omitempty"`
	Who   map[string]string `json:"who,omitempty"`
	Args  []string          `json:"args,omitempty"`
	Typed string            `json:"typed,omitempty"`
	Bytes []byte            `json:"bytes,omitempty"`
}

func newRecording(dir string, sh Shell) (*recording, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("%w: %w", errRecording, err)
	}
	old, err := filepath.Glob(filepath.Join(dir, "*.jsonl")) // sorted, so the oldest is first
	for ; len(old) >= recordsMax && err == nil; old = old[1:] {
		err = os.Remove(old[0])
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errRecording, err)
	}
	name := time.Now().UTC().Format("20060102T150405.000000000Z") + "-" + sh.Job + "-" + newID()[:4] + ".jsonl"
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errRecording, err)
	}
	r := &recording{file: f, sum: sha256.New()}
	if err := r.write(recorded{Job: sh.Job, Who: sh.Who, Args: sh.Args}); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return r, nil
}

func (r *recording) write(line recorded) error {
	line.At = time.Now().UTC()
	b, err := json.Marshal(line)
	if err == nil {
		b = append(b, '\n')
		_, err = r.file.Write(b)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", errRecording, err)
	}
	_, _ = r.sum.Write(b) // never fails (hash.Hash)
	return nil
}

// tee hands on what is typed, each time after it was written down. What cannot
// be ends the shell.
func (r *recording) tee(from <-chan []byte, to chan<- []byte, ended <-chan struct{}, cancel context.CancelCauseFunc) {
	for {
		var b []byte
		select {
		case more, ok := <-from:
			if !ok {
				close(to)
				return
			}
			b = more
		case <-ended:
			return
		}
		line := recorded{Typed: string(b)}
		if !utf8.Valid(b) {
			line = recorded{Bytes: b}
		}
		err := fmt.Errorf("%w: more than the %d bytes that may be typed into one shell", errRecording, recordMax)
		if r.typed += len(b); r.typed <= recordMax {
			err = r.write(line)
		}
		if err != nil {
			cancel(err)
			return
		}
		select {
		case to <- b:
		case <-ended:
			return
		}
	}
}

// close returns the hash of the file, in hexadecimal.
func (r *recording) close() (sum string, err error) {
	err = errors.Join(r.file.Sync(), r.file.Close())
	if err != nil {
		err = fmt.Errorf("%w: %w", errRecording, err)
	}
	return hex.EncodeToString(r.sum.Sum(nil)), err
}
