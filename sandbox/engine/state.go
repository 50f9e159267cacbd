// Package engine is what the runtimes over a container engine share. The engine
// makes a container with an idle guest, by its own means; what is here turns it
// into a box: it looks in the kernel whether the engine did what it was asked,
// enters the namespaces of the container by its process 1, gives it the network
// of a box and a root over a sized disk (ADR 0011), and connects to the guest.
// It also keeps the state directory: the record of each box, the guest program
// and the templates of disks.
package engine

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/kernel"
)

// What every box of an engine has.
const (
	ShmBytes = 64 << 20 // of /dev/shm; counted as memory
	MaxFiles = 1 << 16  // open files of a process, where the limit of who starts it allows
)

// Labels of every container.
const (
	LabelRuntime    = "ci.mayfly.runtime" // names the state directory
	labelOwner      = "ci.mayfly.owner"
	labelJob        = "ci.mayfly.job"
	labelGeneration = "ci.mayfly.generation"
	labelExpires    = "ci.mayfly.expires" // RFC 3339, "" is never
)

// A Record is box.json: what List says about a box whose container is not there
// (yet, or any more), and what Destroy needs to know.
type Record struct {
	Labels  sandbox.Labels `json:"labels"`
	Expires time.Time      `json:"expires"`
	Image   string         `json:"image"`
}

// Dirs of a state directory.
const (
	boxesDir = "boxes"
	baseDir  = "base"
	guestDir = "guest"
)

// A State is the state directory of a runtime, and the boxes that this process
// made. It may be used by several goroutines.
type State struct {
	ID      string       // on the label of every container of this directory
	Program string       // file name of the guest in GuestDir
	Names   kernel.Names // in work

	dir, owner string

	mu    sync.Mutex
	boxes map[string]*Box // that this process made

	templates sync.Mutex // held while one is made
}

// Defaults puts what a box gets if nobody says more where l is zero: 4 GiB of
// memory, 4096 processes, 2 cores, 10 GiB and a million files.
func Defaults(l sandbox.Limits) (sandbox.Limits, error) {
	return kernel.Limits(l, sandbox.Limits{Memory: 4 << 30, Pids: 4096, MilliCPU: 2000, Disk: 10 << 30, Inodes: 1 << 20})
}

// Open prepares a state directory, which is absolute and the runtime's own, for
// boxes of that owner and with that guest program. It must run as root.
func Open(dir, owner string, program []byte) (*State, error) {
	switch {
	case !filepath.IsAbs(dir):
		return nil, fmt.Errorf("state directory %q is not absolute", dir)
	case owner == "":
		return nil, errors.New("owner is empty")
	case len(program) == 0:
		return nil, errors.New("guest program is empty")
	case os.Geteuid() != 0:
		return nil, fmt.Errorf("not root: run the agent as root, it enters the namespaces of its containers: %w", sandbox.ErrUnsupported)
	}
	dir = filepath.Clean(dir)
	sum := sha256.Sum256([]byte(dir))
	s := &State{dir: dir, owner: owner, boxes: map[string]*Box{}, ID: hex.EncodeToString(sum[:6])}
	for _, d := range []string{boxesDir, baseDir, guestDir} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o700); err != nil {
			return nil, err
		}
	}
	var err error
	if s.Program, err = install(s.GuestDir(), program); err != nil {
		return nil, fmt.Errorf("guest program: %w", err)
	}
	return s, nil
}

// Dir is that of a box. It is the first thing made of one, and the last removed.
func (s *State) Dir(name string) string { return filepath.Join(s.dir, boxesDir, name) }

// GuestDir holds the guest program, and is mounted in containers.
func (s *State) GuestDir() string { return filepath.Join(s.dir, guestDir) }

// GuestArgs is the command of process 1: it waits for its agent, and ends at the
// time of the spec, if there is one.
func (s *State) GuestArgs(spec sandbox.Spec) []string {
	args := []string{sandbox.Run + "/" + s.Program, "listen"}
	if spec.Isolation == sandbox.GVisor {
		args[1] = "keep"
	}
	if !spec.Expires.IsZero() {
		args = append(args, strconv.FormatInt(max(spec.Expires.Unix(), 1), 10))
	}
	return args
}

// Record claims the name and writes down what the box will be. In between it
// calls named.
func (s *State) Record(name string, rec Record, named func()) error {
	b, err := json.Marshal(rec)
	if err != nil {
		return fmt.Errorf("record: %w", err)
	}
	err = os.Mkdir(s.Dir(name), 0o700)
	if errors.Is(err, fs.ErrExist) {
		return sandbox.ErrExists
	}
	if err != nil {
		return fmt.Errorf("record: %w", err)
	}
	named()
	if err := os.WriteFile(filepath.Join(s.Dir(name), "box.json"), b, 0o600); err != nil {
		return fmt.Errorf("record: %w", err)
	}
	return nil
}

// Recorded is what was written down of a box. A record that was not finished
// names this installation only.
func (s *State) Recorded(name string) Record {
	var rec Record
	b, err := os.ReadFile(filepath.Join(s.Dir(name), "box.json"))
	if err != nil || json.Unmarshal(b, &rec) != nil {
		return Record{Labels: sandbox.Labels{Owner: s.owner}}
	}
	return rec
}

// Labels are what the container of a box is found by.
func (s *State) Labels(rec Record) map[string]string {
	expires := ""
	if !rec.Expires.IsZero() {
		expires = rec.Expires.Format(time.RFC3339Nano)
	}
	return map[string]string{
		labelOwner: rec.Labels.Owner, LabelRuntime: s.ID, labelJob: rec.Labels.Job,
		labelGeneration: strconv.FormatInt(rec.Labels.Generation, 10), labelExpires: expires,
	}
}

// Info is what the labels of a container say.
func Info(name string, labels map[string]string) sandbox.Info {
	info := sandbox.Info{Name: name, Labels: sandbox.Labels{Owner: labels[labelOwner], Job: labels[labelJob]}}
	// What somebody else wrote there is as good as nothing.
	info.Labels.Generation, _ = strconv.ParseInt(labels[labelGeneration], 10, 64)
	info.Expires, _ = time.Parse(time.RFC3339Nano, labels[labelExpires])
	return info
}

// Others adds what has a directory and is not among the found.
func (s *State) Others(found []sandbox.Info) ([]sandbox.Info, error) {
	seen := map[string]bool{}
	for _, info := range found {
		seen[info.Name] = true
	}
	entries, err := os.ReadDir(filepath.Join(s.dir, boxesDir))
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if seen[e.Name()] {
			continue
		}
		rec := s.Recorded(e.Name())
		if _, err := os.Stat(s.Dir(e.Name())); errors.Is(err, fs.ErrNotExist) {
			continue // destroyed meanwhile
		}
		found = append(found, sandbox.Info{Name: e.Name(), Labels: rec.Labels, Expires: rec.Expires})
	}
	return found, nil
}

// NewBox keeps what this process has of a recorded box for the Destroy of it.
func (s *State) NewBox(name string) *Box {
	b := &Box{Name: name}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.boxes[name] = b
	return b
}

// Box is that of NewBox, nil if another process made it.
func (s *State) Box(name string) *Box {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.boxes[name]
}

// Forget removes the directory of a box whose container is gone, when its disk
// is gone too.
func (s *State) Forget(ctx context.Context, name string) error {
	loop := -1
	if b := s.Box(name); b != nil && b.Disk != nil {
		loop = b.Disk.Loop
	}
	if err := kernel.Gone(ctx, s.Dir(name), loop); err != nil {
		return err
	}
	if err := os.RemoveAll(s.Dir(name)); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.boxes, name)
	return nil
}

// guestAge is how long the guest of another build is kept: longer than any two
// builds of one installation run side by side.
const guestAge = 7 * 24 * time.Hour

// install writes the program to dir, which boxes see read-only until they have
// begun, and removes old ones, and at once what a crash has left half made. Its
// name is made of its content.
func install(dir string, program []byte) (name string, err error) {
	sum := sha256.Sum256(program)
	name = "mayfly-guest-" + hex.EncodeToString(sum[:6])
	lock, err := os.Open(dir)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil { // held for as long as a write takes
		return "", fmt.Errorf("lock %s: %w", dir, err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", err
	}
	for _, e := range entries {
		st, infoErr := e.Info()
		half := strings.HasPrefix(e.Name(), unfinished)
		if half || infoErr == nil && e.Name() != name && time.Since(st.ModTime()) > guestAge {
			err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	work, workErr := os.MkdirTemp(dir, unfinished)
	if err := errors.Join(err, workErr); err != nil {
		return "", err
	}
	// Always anew: what lies there may be half of a power cut's, and is as young
	// as its last use.
	file := filepath.Join(work, name)
	err = errors.Join(os.WriteFile(file, program, 0o555), os.Chmod(file, 0o555), os.Chmod(dir, 0o755))
	if err == nil {
		err = os.Rename(file, filepath.Join(dir, name))
	}
	return name, errors.Join(err, os.Remove(work))
}

// unfinished begins the names of what install has not finished.
const unfinished = ".new-"

// Template is the file that disks of that size are copied from.
func (s *State) Template(ctx context.Context, l sandbox.Limits) (string, error) {
	s.templates.Lock()
	defer s.templates.Unlock()
	t := kernel.Template{Dir: filepath.Join(s.dir, baseDir), Version: "engine1", Skeleton: skeleton, Own: ownInodes}
	return t.Make(ctx, l.Disk, l.Inodes)
}
