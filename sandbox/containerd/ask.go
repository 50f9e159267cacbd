package containerd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"golang.org/x/sys/unix"
)

// AskArg is the argument of the program that Config.Ask starts: it calls Ask.
const AskArg = "containerd-task"

// asking bounds the time in which the daemon makes a task.
const asking = 2 * time.Minute

// Files beside the record. A task was asked for if there is asked; it is locked
// for as long as somebody waits for the daemon. Without answered, and the lock,
// the daemon may still be about to make it.
const (
	asked    = "asked"
	answered = "answered"
)

// An order is a task that a child asks for. Descriptor 3 of the child is asked,
// locked.
type order struct {
	Address, Namespace, ID, Dir string
	First                       uint32
}

// An answer is what the daemon said to it.
type answer struct {
	Pid      int
	Error    string
	Away     bool // it said nothing
	InTheWay bool // it has the task, or half of it
}

// err is the daemon's error, of a kind that away and inTheWay know.
func (a answer) err() error {
	switch {
	case a.Error == "":
		return nil
	case a.Away:
		return fmt.Errorf("%s: %w", a.Error, errdefs.ErrUnavailable)
	case a.InTheWay:
		return fmt.Errorf("%s: %w", a.Error, errdefs.ErrAlreadyExists)
	}
	return errors.New(a.Error)
}

// Ask is the whole of a child process, which asks the daemon for one task: when a
// client goes away a daemon of version 1.6 stops in the middle of making it, and
// may forget what there is already. The agent may go away at any time; this
// process ends with the answer, and notes that there was one.
func Ask(in io.Reader, out io.Writer) error {
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGPIPE)
	var o order
	if err := json.NewDecoder(in).Decode(&o); err != nil {
		return fmt.Errorf("order: %w", err)
	}
	c, err := client.New(o.Address, client.WithDefaultNamespace(o.Namespace), client.WithTimeout(time.Second))
	if err != nil {
		return err
	}
	a, err := o.ask(context.Background(), c)
	return errors.Join(err, json.NewEncoder(out).Encode(a), c.Close()) // nobody may read it any more
}

// ask waits for the daemon's answer and notes that there was one.
func (o order) ask(ctx context.Context, c *client.Client) (answer, error) {
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(ctx, o.Namespace), asking)
	defer cancel()
	t, err := c.TaskService().Create(ctx, &tasks.CreateTaskRequest{
		ContainerID: o.ID,
		// A root of its own, which belongs to root of the box: the OCI runtime
		// makes directories in it as that root.
		Rootfs: []*types.Mount{{
			Type: "tmpfs", Source: "mayfly",
			Options: []string{"nosuid", "nodev", "mode=755", fmt.Sprintf("size=%d", rootBytes), fmt.Sprintf("uid=%d", o.First), fmt.Sprintf("gid=%d", o.First)},
		}},
	})
	if err == nil {
		return answer{Pid: int(t.GetPid())}, os.WriteFile(filepath.Join(o.Dir, answered), nil, 0o600)
	}
	a := answer{Error: errgrpc.ToNative(err).Error(), Away: away(err) || ctx.Err() != nil, InTheWay: inTheWay(err)}
	if a.Away || a.InTheWay {
		return a, nil
	}
	return a, os.WriteFile(filepath.Join(o.Dir, answered), nil, 0o600)
}

// ask asks for a task and returns its process, which waits to be started. If ctx
// ends before the daemon has answered a child goes on waiting.
func (r *Runtime) ask(ctx context.Context, name string, first uint32) (pid int, err error) {
	o := order{r.cfg.Address, r.cfg.Namespace, r.id(name), r.state.Dir(name), first}
	f, err := os.OpenFile(filepath.Join(o.Dir, asked), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return 0, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	r.cfg.Trace("containerd.asked")
	var a answer
	if len(r.cfg.Ask) == 0 {
		a, err = o.ask(ctx, r.client)
	} else {
		a, err = r.child(ctx, o, f)
	}
	return a.Pid, errors.Join(err, a.err())
}

// child has the program of Config.Ask ask.
func (r *Runtime) child(ctx context.Context, o order, lock *os.File) (answer, error) {
	in, err := json.Marshal(o)
	if err != nil {
		return answer{}, err
	}
	var out, complaints bytes.Buffer
	cmd := exec.Command(r.cfg.Ask[0], r.cfg.Ask[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), &out, &complaints
	cmd.Args[0] = os.Args[0] // what it is called by
	cmd.ExtraFiles = []*os.File{lock}
	cmd.Env, cmd.Dir = []string{}, "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // what is sent to our group is not for it
	if err := cmd.Start(); err != nil {
		return answer{}, fmt.Errorf("child: %w", err)
	}
	r.cfg.Trace("containerd.asking")
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case err = <-ended:
	case <-ctx.Done():
		return answer{}, context.Cause(ctx)
	}
	var a answer
	if err == nil {
		err = json.Unmarshal(out.Bytes(), &a)
	}
	if err != nil {
		return answer{}, fmt.Errorf("child: %w: %.500s", err, complaints.Bytes())
	}
	return a, nil
}

// settled reports whether the daemon has answered, or was never asked. busy is
// that somebody still waits for it.
func (r *Runtime) settled(name string) (ok, busy bool) {
	dir := r.state.Dir(name)
	f, err := os.Open(filepath.Join(dir, asked))
	if err != nil {
		return errors.Is(err, os.ErrNotExist), false
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return false, true
	}
	_, err = os.Stat(filepath.Join(dir, answered))
	return err == nil, false
}
