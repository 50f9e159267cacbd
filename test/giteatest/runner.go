package giteatest

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// A PeerConfig says how Gitea's own runner shall run.
type PeerConfig struct {
	Name     string
	Label    string // in runs-on; "" is the name
	Image    string // Docker image of the jobs; "" runs them on the host
	Docker   string // address of the daemon that runs the image
	Capacity int    // jobs at once; 0 is 1
	Once     bool   // an ephemeral runner: one job, and the server forgets it

	// Tuned asks the server ten times as often as the defaults do, and reports
	// logs and states without the pauses of the defaults.
	Tuned bool
}

// A Peer is a process of Gitea's own runner, to compare with and to test with.
type Peer struct {
	cmd  *exec.Cmd
	done chan struct{}
	log  output
}

// output is what a process has written so far.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// The cache of actions is off since no job here uses it, and images are local.
const peerYAML = `log: {level: info}
runner: {file: %[1]s/.runner, capacity: %[2]d%[3]s}
cache: {enabled: false}
container: {force_pull: false, docker_host: "-"}
host: {workdir_parent: %[1]s/work}
`

const tuned = ", fetch_interval: 200ms, fetch_interval_max: 200ms, log_report_interval: 500ms, log_report_max_latency: 100ms, state_report_interval: 500ms"

// StartPeer registers a runner for the whole server and starts it. It ends with
// Stop, and by itself when the calling process dies.
func (s *Server) StartPeer(ctx context.Context, c PeerConfig) (*Peer, error) {
	token, err := s.RegistrationToken(ctx)
	if err != nil {
		return nil, err
	}
	dir, config := filepath.Join(s.dir, "runners", c.Name), filepath.Join(s.dir, "runners", c.Name+".yaml")
	more, label := "", cmp.Or(c.Label, c.Name)+":host"
	if c.Tuned {
		more = tuned
	}
	if c.Image != "" {
		label = cmp.Or(c.Label, c.Name) + ":docker://" + c.Image
	}
	text := fmt.Sprintf(peerYAML, dir, max(1, c.Capacity), more)
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(config, []byte(text), 0o600)); err != nil {
		return nil, err
	}
	args := []string{"--config", config, "register", "--no-interactive", "--instance", s.URL(), "--token", token, "--name", c.Name, "--labels", label}
	if c.Once {
		args = append(args, "--ephemeral")
	}
	if out, err := s.peer(dir, args...).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("gitea-runner register: %w: %s", err, tail(string(out)))
	}
	p := &Peer{cmd: s.peer(dir, "--config", config, "daemon"), done: make(chan struct{})}
	if c.Docker != "" {
		p.cmd.Env = append(p.cmd.Env, "DOCKER_HOST="+c.Docker)
	}
	p.cmd.Stdout, p.cmd.Stderr = &p.log, &p.log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error, 1)
	go func() { // Stop waits for it
		runtime.LockOSThread() // the death signal is bound to the thread
		defer runtime.UnlockOSThread()
		defer close(p.done)
		err := p.cmd.Start()
		started <- err
		if err == nil {
			_ = p.cmd.Wait() // how it ended is in its log
		}
	}()
	return p, <-started
}

func (s *Server) peer(dir string, args ...string) *exec.Cmd {
	cmd := exec.Command(s.Runner(), args...)
	cmd.Dir = dir
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir}
	return cmd
}

// Pid is the runner's process.
func (p *Peer) Pid() int { return p.cmd.Process.Pid }

// Log is what the runner has written so far.
func (p *Peer) Log() string { return p.log.String() }

// Over reports whether the runner has ended.
func (p *Peer) Over() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// Stop ends the runner, in order if it can.
func (p *Peer) Stop() error {
	for _, how := range []os.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		if err := p.cmd.Process.Signal(how); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return err
		}
		select {
		case <-p.done:
			return nil
		case <-time.After(stopTimeout):
		}
	}
	return fmt.Errorf("gitea-runner (process %d) does not end: %s", p.Pid(), tail(strings.TrimSpace(p.Log())))
}
