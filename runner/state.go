package runner

import (
	"context"
	"crypto/rand"
	"encoding/base32"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/runner/internal/journal"
	"github.com/mayfly-ci/mayfly/runner/internal/seal"
)

// ErrInUse reports that another agent holds the state directory.
var ErrInUse = errors.New("state directory in use by another agent")

// ErrKeyElsewhere reports that the service manager gave the key of the last life,
// and gives none to this program. With another key it could open no handle, and
// would give up what only a handle takes back.
var ErrKeyElsewhere = errors.New("the service manager has the sealing key, and did not give it to this program")

// State is what outlives an agent: its identity, its journal and its key.
//
//	agent.json   installation id and generation (how many lives it has had)
//	seal.key     0600; opens the handles in the journal, and safes; the service
//	             manager may give another one (seal.Credential)
//	jobs/        the journal
//	safe/        what each Safe holds, sealed
//	lock         flock, held while an agent lives
//
// Runtimes and the audit keep directories of their own beside these.
type State struct {
	Dir        string
	Owner      string // installation id: labels everything that this installation makes
	Generation int64

	journal *journal.Journal
	key     *seal.Key
	lock    *os.File
}

type identity struct {
	Version    int    `json:"version"`
	Owner      string `json:"installation"`
	Generation int64  `json:"generation"`
	GivenKey   bool   `json:"given_key,omitempty"` // by the service manager
}

const stateVersion = 1

// lockPatience is half of how long OpenState waits for a lock: a fraction of a
// second, since who asks beside a living agent waits as long.
const lockPatience = 250 * time.Millisecond

// OpenState takes the state directory for a new life of the agent, making it
// if it is absent. It returns ErrInUse if another agent has it.
func OpenState(dir string) (*State, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	if err := take(lock); err != nil {
		return nil, errors.Join(fmt.Errorf("state %s: %w", dir, err), lock.Close())
	}
	s, err := load(dir, true)
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	s.lock = lock
	return s, nil
}

// take locks the file. A child that a killed agent was starting shares its lock
// until it finds that the agent is dead, a moment later.
func take(lock *os.File) error {
	for wait := time.Millisecond; ; wait *= 2 {
		err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
		if wait > lockPatience || !pause(context.Background(), wait) {
			return ErrInUse
		}
	}
}

// PeekState opens the state directory for reading beside a living agent. Jobs
// of it can be listed; nothing can be begun.
func PeekState(dir string) (*State, error) { return load(dir, false) }

// Owned reports whether this process has the directory, and does not only look
// at that of a living agent.
func (s *State) Owned() bool { return s.lock != nil }

// Close gives the directory up.
func (s *State) Close() error {
	if s.lock == nil {
		return nil
	}
	return s.lock.Close()
}

func load(dir string, next bool) (*State, error) {
	path := filepath.Join(dir, "agent.json")
	id := identity{Version: stateVersion}
	b, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && next:
		id.Owner = newID()
	case err != nil:
		return nil, fmt.Errorf("state: %w", err)
	default:
		if err := json.Unmarshal(b, &id); err != nil {
			return nil, fmt.Errorf("state %s: %w: restore it, or reap what the old installation left and remove the file", path, err)
		}
	}
	if id.Version > stateVersion || id.Owner == "" {
		return nil, fmt.Errorf("state %s: version %d, installation %q: this agent knows version %d", path, id.Version, id.Owner, stateVersion)
	}
	key, err := loadKey(filepath.Join(dir, sealFile), !next || id.GivenKey)
	if err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	if next {
		if id.GivenKey && !key.Given() {
			return nil, fmt.Errorf("state %s: %w: run it by \"systemd-run -p LoadCredential=%s:FILE\"; if that key is lost for good, remove \"given_key\" from the file: then leases are revoked by name only",
				path, ErrKeyElsewhere, seal.Credential)
		}
		id.Generation++
		id.GivenKey = key.Given()
		if err := writeFile(path, id); err != nil {
			return nil, fmt.Errorf("state: %w", err)
		}
	}
	j, err := journal.Open(filepath.Join(dir, "jobs"), key, id.Generation)
	if err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	return &State{Dir: dir, Owner: id.Owner, Generation: id.Generation, journal: j, key: key}, nil
}

// writeFile replaces path so that a crash leaves the old content or the new.
func writeFile(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return replace(path, append(b, '\n'))
}

// unfinished ends the name of a file that is being written.
const unfinished = ".new"

func replace(path string, b []byte) error {
	f, err := os.OpenFile(path+unfinished, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(path+unfinished, path)
}

// newID returns 80 random bits as 16 characters of [a-z2-7]: unique for ever,
// and valid in every name that a backend may make of it.
func newID() string {
	var b [10]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand, Go 1.24)
	return strings.ToLower(base32.StdEncoding.EncodeToString(b[:]))
}
