package serve

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox/guest/wire"
)

const (
	// stepScore is the oom_score_adj of processes, the highest there is
	// (proc_pid_oom_score_adj(5)): when memory runs out the kernel takes one of
	// them, in the box before the guest and on the host before the agent.
	stepScore = 1000

	// defaultPath is where programs are looked for if the environment has no
	// PATH, as root's login has it on Debian.
	defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

	statusNotFound = 127 // as in a shell
	statusCannot   = 126
)

// A startFunc starts a command in a session of its own, with nothing but files
// as its descriptors; null among them is /dev/null. A terminal is the session's
// own.
type startFunc func(c wire.Command, files [3]int) (pid int, err error)

// A startError is why a command could not be started.
type startError struct {
	status byte
	err    error
}

func (e *startError) Error() string { return e.err.Error() }
func (e *startError) Unwrap() error { return e.err }

// A starter starts commands for real.
type starter struct {
	null  *os.File // /dev/null
	score *os.File // our oom_score_adj, nil if it is as high as a step's
	own   []byte   // its value
}

// newStarter opens what starting a command needs, and makes sure that the guest
// may lower its oom_score_adj again after it has raised it.
func newStarter() (*starter, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("start: %w", err)
	}
	s := &starter{null: null}
	if err := s.openScore(); err != nil {
		s.close()
		return nil, fmt.Errorf("start: the guest needs its /proc: %w", err)
	}
	return s, nil
}

func (s *starter) openScore() error {
	f, err := os.OpenFile("/proc/self/oom_score_adj", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	own := make([]byte, 16)
	n, err := f.Read(own)
	if err != nil {
		return errors.Join(err, f.Close())
	}
	s.own = own[:n]
	if strings.TrimSpace(string(s.own)) == strconv.Itoa(stepScore) {
		return f.Close()
	}
	s.score = f
	return errors.Join(s.raise(), s.lower())
}

func (s *starter) close() {
	_ = s.null.Close() // nothing was written
	if s.score != nil {
		_ = s.score.Close() // every write has had its answer
	}
}

// raise gives us the score of a step, which the next child inherits. Setting it
// from outside would leave the first processes of a step with ours.
func (s *starter) raise() error {
	if s.score == nil {
		return nil
	}
	_, err := s.score.WriteAt([]byte(strconv.Itoa(stepScore)), 0)
	return err
}

func (s *starter) lower() error {
	if s.score == nil {
		return nil
	}
	_, err := s.score.WriteAt(s.own, 0)
	return err
}

// start implements startFunc. Its errors are *startError.
func (s *starter) start(c wire.Command, files [3]int) (int, error) {
	for i, fd := range files {
		if fd == null {
			files[i] = int(s.null.Fd())
		}
	}
	who, err := account(&c, files)
	if err != nil {
		return 0, &startError{statusCannot, err}
	}
	program, err := find(c)
	if err != nil {
		return 0, err
	}
	if err := s.raise(); err != nil {
		return 0, &startError{statusCannot, err}
	}
	pid, err := syscall.ForkExec(program, c.Args, &syscall.ProcAttr{
		Dir:   c.Dir,
		Env:   c.Env,
		Files: []uintptr{uintptr(files[0]), uintptr(files[1]), uintptr(files[2])},
		Sys:   &syscall.SysProcAttr{Setsid: true, Setctty: c.Input == wire.Terminal, Credential: who}, // Ctty is 0
	})
	// It was possible when the guest began and nobody can have forbidden it
	// since; if it fails all the same, the step runs and only the order in
	// which the kernel would kill is lost.
	_ = s.lower()
	if err != nil {
		return 0, &startError{statusOf(err), fmt.Errorf("%s: %w", program, err)}
	}
	return pid, nil
}

// find returns the program of a command, as a shell finds it.
func find(c wire.Command) (string, error) {
	switch {
	case len(c.Args) == 0 || c.Args[0] == "":
		return "", &startError{statusNotFound, errors.New("no command given")}
	case !filepath.IsAbs(c.Dir):
		return "", &startError{statusCannot, fmt.Errorf("%s: directory is not absolute", c.Dir)}
	}
	switch info, err := os.Stat(c.Dir); {
	case err != nil:
		return "", &startError{statusCannot, err}
	case !info.IsDir():
		return "", &startError{statusCannot, fmt.Errorf("%s: %w", c.Dir, syscall.ENOTDIR)}
	}
	name := c.Args[0]
	if strings.Contains(name, "/") {
		return name, nil // execve looks below Dir, where the child is by then
	}
	found := error(&startError{statusNotFound, fmt.Errorf("%s: command not found", name)})
	for _, dir := range filepath.SplitList(searchPath(c.Env)) {
		if !filepath.IsAbs(dir) {
			dir = filepath.Join(c.Dir, dir)
		}
		program := filepath.Join(dir, name)
		info, err := os.Stat(program)
		if err != nil || info.IsDir() {
			continue
		}
		if unix.Access(program, unix.X_OK) == nil {
			return program, nil
		}
		found = &startError{statusCannot, fmt.Errorf("%s: %w", program, syscall.EACCES)}
	}
	return "", found
}

// searchPath returns the PATH of an environment. Of two, the last counts, as in
// a shell.
func searchPath(env []string) string {
	path := defaultPath
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, "PATH="); ok {
			path = v
		}
	}
	return path
}

// statusOf is the exit status that a shell has for an error of execve.
func statusOf(err error) byte {
	if errors.Is(err, syscall.ENOENT) {
		return statusNotFound
	}
	return statusCannot
}
