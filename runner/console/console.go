// Package console is the socket by which "mayfly shell" reaches a running agent:
// both ends of it.
//
// The socket lies in the state directory, open to nobody but the agent's user.
// The kernel says who is at the other end (SO_PEERCRED, unix(7)); only root and
// the agent's own user are let in. A connection is one shell: lines of JSON, the
// first of which asks for it, and then what is typed and what is printed. The
// server never stops reading, so that it notices when the person has gone; what
// may be typed is bounded by the agent's recording.
package console

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/sandbox"
)

const (
	socketName = "shell.sock"

	// maxLine bounds one line: 64 KiB of output in base64, and some more. The
	// arguments of a command must fit into it.
	maxLine = 128 << 10

	// maxQueue is what is kept of what was typed and the box has not taken yet,
	// a little more than the agent's recording lets through.
	maxQueue = 17 << 20

	// askTime is how long a connection may take to say what it wants.
	askTime = 10 * time.Second

	// farewell is how long the end of a shell may take to reach a client that
	// does not read.
	farewell = 2 * time.Second

	// maxClients bounds connections; there are far fewer boxes.
	maxClients = 64
)

// An ask is the first line of a client.
type ask struct {
	Job  string        `json:"job"`
	Args []string      `json:"args,omitempty"`
	Term string        `json:"term,omitempty"`
	Size *sandbox.Size `json:"size,omitempty"` // of its terminal; nil if it has none
}

// An up is any further line of a client.
type up struct {
	In   []byte        `json:"in,omitempty"`
	End  bool          `json:"end,omitempty"` // of the input
	Size *sandbox.Size `json:"size,omitempty"`
}

// A down is a line of the server.
type down struct {
	Out    []byte `json:"out,omitempty"`
	Err    []byte `json:"err,omitempty"`
	Exit   *int   `json:"exit,omitempty"` // the last line of a command that ran
	Refuse string `json:"refuse,omitempty"`
	Fail   string `json:"fail,omitempty"`
}

// Open runs a shell: runner.Agent.Shell.
type Open func(ctx context.Context, sh runner.Shell) (sandbox.Exit, error)

// A Server is the agent's end.
type Server struct {
	listener *net.UnixListener
	open     Open
}

// Listen opens the socket in a state directory that the agent has locked. What
// an earlier life left there is replaced.
func Listen(state string, open Open) (*Server, error) {
	var l *net.UnixListener
	err := through(state, func(path string) (err error) {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if l, err = net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"}); err != nil {
			return err
		}
		l.SetUnlinkOnClose(false) // its path is of another descriptor by then
		return os.Chmod(path, 0o600)
	})
	if err != nil {
		if l != nil {
			err = errors.Join(err, l.Close())
		}
		return nil, fmt.Errorf("socket of mayfly shell in %s: %w: or write keep: 0 and keep no boxes", state, err)
	}
	return &Server{l, open}, nil
}

// through calls do with the path of the socket below a descriptor of its
// directory: the path of a socket has at most 107 bytes (unix(7)), that of a
// state directory has more.
func through(state string, do func(path string) error) error {
	dir, err := os.Open(state)
	if err != nil {
		return err
	}
	return errors.Join(do(filepath.Join("/proc/self/fd", strconv.Itoa(int(dir.Fd())), socketName)), dir.Close())
}

// Serve takes connections until ctx ends, and then ends them.
func (s *Server) Serve(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = s.listener.Close() }) // which Accept reports
	defer stop()
	clients := make(chan struct{}, maxClients)
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		conn, err := s.listener.AcceptUnix()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("socket of mayfly shell: %w", errors.Join(err, s.listener.Close()))
		}
		select {
		case clients <- struct{}{}:
			wg.Go(func() {
				s.serve(ctx, conn)
				<-clients
			})
		default:
			_ = conn.Close() // and the client says that it was
		}
	}
}

// serve serves one connection.
func (s *Server) serve(ctx context.Context, conn *net.UnixConn) {
	defer conn.Close() // nothing is left to be said
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Now()) })() // ends a read
	c := &client{conn: conn}
	exit, err := s.shell(ctx, cancel, c)
	_ = conn.SetWriteDeadline(time.Now().Add(farewell)) // a client that does not read learns nothing
	var end down
	switch {
	case errors.Is(err, runner.ErrNotKept), errors.Is(err, runner.ErrShellOpen), errors.Is(err, errPeer):
		end.Refuse = err.Error()
	case err != nil:
		end.Fail = err.Error()
	default:
		end.Exit = &exit.Code
	}
	_ = c.say(end)
}

var (
	errPeer = errors.New("only root and the agent's own user may open a shell")
	errGone = errors.New("the other end has gone")
)

// shell reads what the client wants, and does it.
func (s *Server) shell(ctx context.Context, cancel context.CancelCauseFunc, c *client) (sandbox.Exit, error) {
	who, err := peer(c.conn)
	if err != nil {
		return sandbox.Exit{}, err
	}
	if err := c.conn.SetReadDeadline(time.Now().Add(askTime)); err != nil {
		return sandbox.Exit{}, err
	}
	lines := scanner(c.conn)
	var a ask
	if err := next(lines, &a); err != nil {
		return sandbox.Exit{}, err
	}
	if err := c.conn.SetReadDeadline(time.Time{}); err != nil {
		return sandbox.Exit{}, err
	}
	in, sizes := make(chan []byte), make(chan sandbox.Size, 1)
	sh := runner.Shell{
		Job: a.Job, Who: who, Args: a.Args, Term: term(a.Term), Stdin: in,
		Stdout: func(_ time.Time, b []byte) error { return c.say(down{Out: b}) },
		Stderr: func(_ time.Time, b []byte) error { return c.say(down{Err: b}) },
	}
	if a.Size != nil {
		sh.TTY = &sandbox.TTY{Size: *a.Size, Resize: sizes}
	}
	q := &queue{wake: make(chan struct{}, 1)}
	ended := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() { cancel(read(lines, q, sizes)) })
	wg.Go(func() { q.pump(in, ended) })
	// A client that does not read must not hold the box's end up.
	stop := context.AfterFunc(ctx, func() { _ = c.conn.SetWriteDeadline(time.Now().Add(farewell)) })
	exit, err := s.open(ctx, sh)
	stop()
	close(ended)
	_ = c.conn.SetReadDeadline(time.Now()) // ends read
	wg.Wait()
	return exit, err
}

// read takes lines until the client has gone or breaks the protocol, and says
// which.
func read(lines *bufio.Scanner, q *queue, sizes chan sandbox.Size) error {
	for {
		var u up
		if err := next(lines, &u); err != nil {
			return err
		}
		if u.Size != nil {
			select {
			case <-sizes: // only the last one matters
			default:
			}
			sizes <- *u.Size // there is room: nobody else puts one in
		}
		if !q.put(u.In, u.End) {
			return errors.New("more was typed than a shell takes")
		}
	}
}

// scanner reads lines of a bounded length.
func scanner(conn *net.UnixConn) *bufio.Scanner {
	s := bufio.NewScanner(conn)
	s.Buffer(nil, maxLine)
	return s
}

// next reads a line. The end of the connection is errGone.
func next(lines *bufio.Scanner, into any) error {
	if !lines.Scan() {
		if err := lines.Err(); err != nil {
			return fmt.Errorf("%w: %w", errGone, err)
		}
		return errGone
	}
	if err := json.Unmarshal(lines.Bytes(), into); err != nil {
		return fmt.Errorf("line of the client: %w", err)
	}
	return nil
}

// A client is the writing side of a connection.
type client struct {
	conn *net.UnixConn
	mu   sync.Mutex
}

func (c *client) say(d down) error {
	b, err := json.Marshal(d)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, err := c.conn.Write(append(b, '\n')); err != nil {
		return fmt.Errorf("%w: %w", errGone, err)
	}
	return nil
}

// A queue is what was typed and not taken yet.
type queue struct {
	mu   sync.Mutex
	buf  []byte
	end  bool
	wake chan struct{}
}

func (q *queue) put(b []byte, end bool) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.buf, q.end = append(q.buf, b...), q.end || end
	select {
	case q.wake <- struct{}{}:
	default:
	}
	return len(q.buf) <= maxQueue
}

func (q *queue) take() (b []byte, end bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	b, q.buf = q.buf, nil
	return b, q.end
}

// pump hands the queue on until ended is closed.
func (q *queue) pump(in chan<- []byte, ended <-chan struct{}) {
	for {
		b, end := q.take()
		if len(b) > 0 {
			select {
			case in <- b:
			case <-ended:
				return
			}
		}
		if end {
			close(in)
			return
		}
		select {
		case <-q.wake:
		case <-ended:
			return
		}
	}
}

// term is the type of a terminal, or "dumb" if it is none.
func term(name string) string {
	if regexp.MustCompile(`^[A-Za-z0-9._+-]{1,64}$`).MatchString(name) {
		return name
	}
	return "dumb"
}

// peer asks the kernel who is at the other end.
func peer(conn *net.UnixConn) (map[string]string, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil || credErr != nil {
		return nil, fmt.Errorf("peer of the socket: %w", errors.Join(err, credErr))
	}
	if cred.Uid != 0 && int(cred.Uid) != os.Geteuid() {
		return nil, fmt.Errorf("%w: uid %d is neither", errPeer, cred.Uid)
	}
	who := map[string]string{"uid": strconv.Itoa(int(cred.Uid)), "pid": strconv.Itoa(int(cred.Pid))}
	who["user"] = userName(who["uid"])
	who["login"] = login(cred.Pid)
	return who, nil
}

// login is who logged in to become the peer, by sudo for instance, as the
// kernel's audit knows it (proc_pid_loginuid(5)); "" if it does not.
func login(pid int32) string {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(int(pid)) + "/loginuid")
	uid := strings.TrimSpace(string(b))
	if err != nil || uid == "" || uid == strconv.FormatUint(1<<32-1, 10) {
		return ""
	}
	return userName(uid)
}

func userName(uid string) string {
	u, err := user.LookupId(uid)
	if err != nil {
		return uid
	}
	return u.Username
}
