// Package journal is the agent's memory of what it owes the outside world.
//
// One job has one file, jobs/<job>.wal, of JSON lines, and so has each box that
// is kept ready and that no job has. The agent writes a line
// naming a thing before it makes the thing, and a line when the thing is gone.
// The file exists exactly as long as something may be owed, so "ls jobs/" after
// a crash is the list of what to clean up. There is no other state, and no
// compaction because none is needed.
//
// Two lines are forced to the disk before the agent goes on: the claim and the
// plan (one line names everything that the plan will acquire). A handle is
// forced only if nothing else could release what it stands for. The outcome is
// forced, so that a crash during teardown does not turn a success into a loss.
// Releases are not: forgetting one costs a second, idempotent release.
package journal

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/runner/internal/failpoint"
	"github.com/mayfly-ci/mayfly/runner/internal/seal"
)

// Version is written into the first line of each log. A log of a newer version
// is refused: an old agent must not release what it does not understand.
const Version = 1

// reserve is the space set aside for a log when it begins, so that a disk that
// fills up later can stop new jobs but not the teardown of this one. A job with
// a hundred leases writes about 40 KiB.
const reserve = 64 << 10

const suffix = ".wal"

// A Debt is something that may exist and must be released.
type Debt struct {
	Kind  string `json:"kind"`            // claim, gateway, box, lease, rules
	Name  string `json:"name"`            // unique for ever
	By    string `json:"by,omitempty"`    // which provider, runtime or issuer of the configuration
	Scope string `json:"scope,omitempty"` // step that it is for; "" is the job
	// Expires is when a lease ends by itself at the latest; zero of other things.
	Expires time.Time `json:"expires,omitzero"`

	Until  time.Time    `json:"-"` // not released before; for readers beside the agent
	Handle creds.Handle `json:"-"` // opened; nil if the agent died before learning it
	Tried  bool         `json:"-"` // this life of the agent may have made it; after a crash always true

	State State     `json:"-"` // of a lease; "" of other things
	Since time.Time `json:"-"` // that it is in that state; zero if it is intended
	Why   string    `json:"-"` // that it is stuck
}

type op string

const (
	opBegin   op = "begin"
	opIntend  op = "intend"
	opHeld    op = "held"
	opLease   op = "lease"
	opKeep    op = "keep"
	opRelease op = "release"
	opOutcome op = "outcome"
)

type record struct {
	Op         op              `json:"op"`
	Version    int             `json:"version,omitempty"`
	Generation int64           `json:"generation,omitempty"`
	Debts      []Debt          `json:"debts,omitempty"`
	Name       string          `json:"name,omitempty"`
	Until      time.Time       `json:"until,omitzero"`
	State      State           `json:"state,omitempty"`
	At         time.Time       `json:"at,omitzero"`
	Why        string          `json:"why,omitempty"`
	Handle     []byte          `json:"handle,omitempty"` // sealed
	Outcome    json.RawMessage `json:"outcome,omitempty"`
}

// Journal is a directory of logs.
type Journal struct {
	dir        string
	key        *seal.Key
	generation int64
}

// Open opens the journal in dir, making it if it is absent.
func Open(dir string, key *seal.Key, generation int64) (*Journal, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	return &Journal{dir, key, generation}, nil
}

// Begin starts the log of a job with its first debt. When it returns, the debt
// is on disk.
func (j *Journal) Begin(job string, d Debt) (*Log, error) {
	path := filepath.Join(j.dir, job+suffix)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	failpoint.Here("journal.created")
	l := &Log{Job: job, Generation: j.generation, path: path, f: f, key: j.key}
	if err := l.start(d); err != nil {
		return nil, errors.Join(fmt.Errorf("journal %s: %w", job, err), f.Close(), os.Remove(path))
	}
	return l, nil
}

func (l *Log) start(d Debt) error {
	err := unix.Fallocate(int(l.f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, reserve)
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("reserve %d bytes: %w", reserve, err)
	}
	err = l.append(record{Op: opBegin, Version: Version, Generation: l.Generation, Debts: []Debt{d}}, true)
	return errors.Join(err, syncDir(filepath.Dir(l.path)))
}

// Unfinished opens the log of every job that was not closed. A log that cannot
// be read does not hide the others: it is in the error, and stays where it is.
func (j *Journal) Unfinished() ([]*Log, error) {
	paths, err := filepath.Glob(filepath.Join(j.dir, "*"+suffix))
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	var logs []*Log
	var errs []error
	for _, p := range paths {
		l, err := j.reopen(p)
		if err != nil {
			errs = append(errs, fmt.Errorf("journal %s: %w", filepath.Base(p), err))
			continue
		}
		logs = append(logs, l)
	}
	return logs, errors.Join(errs...)
}

// Peek reads every unfinished log without touching it, for "mayfly jobs" and
// for a reaper that runs beside the agent.
func (j *Journal) Peek() ([]*Log, error) {
	paths, err := filepath.Glob(filepath.Join(j.dir, "*"+suffix))
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	var logs []*Log
	var errs []error
	for _, p := range paths {
		b, err := os.ReadFile(p)
		if errors.Is(err, fs.ErrNotExist) {
			continue // closed in the meantime
		}
		l, _, perr := j.parse(p, b)
		if err := errors.Join(err, perr); err != nil {
			errs = append(errs, fmt.Errorf("journal %s: %w", filepath.Base(p), err))
			continue
		}
		logs = append(logs, l)
	}
	return logs, errors.Join(errs...)
}

// Reseal seals every handle with the newest key. No agent may be running. What no
// key opens stays as it is.
func (j *Journal) Reseal() error {
	paths, err := filepath.Glob(filepath.Join(j.dir, "*"+suffix))
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	for _, path := range paths {
		if err := j.reseal(path); err != nil {
			return fmt.Errorf("journal %s: %w", filepath.Base(path), err)
		}
	}
	return nil
}

func (j *Journal) reseal(path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var out bytes.Buffer
	for line := range bytes.Lines(b) {
		var r record
		if json.Unmarshal(line, &r) == nil && r.Handle != nil && r.Version <= Version {
			if plain, err := j.key.Open(r.Name, r.Handle); err == nil {
				r.Handle = j.key.Seal(r.Name, plain)
				clear(plain)
				if line, err = json.Marshal(r); err != nil {
					return err
				}
				line = append(line, '\n')
			}
		}
		out.Write(line)
	}
	fresh := path + ".new" // which is no log
	if err := os.WriteFile(fresh, out.Bytes(), 0o600); err != nil {
		return err
	}
	f, err := os.OpenFile(fresh, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, reserve)
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = nil
	}
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(fresh))
	}
	return errors.Join(os.Rename(fresh, path), syncDir(j.dir))
}

func (j *Journal) reopen(path string) (*Log, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	l, whole, err := j.parse(path, b)
	if err != nil {
		return nil, err
	}
	l.f, err = os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	if err := l.f.Truncate(int64(whole)); err != nil {
		return nil, errors.Join(err, l.f.Close())
	}
	return l, nil
}

// parse rebuilds a log from its bytes and says how many of them are whole.
//
// A torn last line is a record that was never acknowledged: what it describes
// did not happen, or will be undone by name; it is cut off. Any other line that
// does not parse is damage: it is skipped, counted, and the debts of all the
// others are still paid, because a damaged line must not keep a lease alive.
func (j *Journal) parse(path string, b []byte) (*Log, int, error) {
	whole := bytes.LastIndexByte(b, '\n') + 1
	l := &Log{Job: strings.TrimSuffix(filepath.Base(path), suffix), path: path, key: j.key, size: int64(whole)}
	for line := range bytes.Lines(b[:whole]) {
		var r record
		if err := json.Unmarshal(line, &r); err != nil {
			l.Damaged++
			continue
		}
		if r.Version > Version {
			return nil, 0, fmt.Errorf("version %d, this agent knows %d: start the newer agent", r.Version, Version)
		}
		l.apply(r)
	}
	for i := range l.debts {
		l.debts[i].Tried = true
	}
	return l, whole, nil
}

// A Log is one job's part of the journal. Each method may be called at any time;
// one name is one goroutine's.
type Log struct {
	Job        string
	Generation int64 // life of the agent that began it
	Damaged    int   // lines that could not be read

	path    string
	f       *os.File
	key     *seal.Key
	mu      sync.Mutex // guards what follows
	size    int64      // of the whole records
	debts   []Debt
	outcome json.RawMessage
	failed  error // the first append that failed: nothing more is acquired
}

// Intend records, on disk, that the agent is about to acquire ds.
func (l *Log) Intend(ds ...Debt) error {
	return l.append(record{Op: opIntend, Debts: ds}, true)
}

// Try notes, in memory, that name is about to be acquired. It fails if the log
// is broken or does not know the name.
func (l *Log) Try(name string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.failed != nil {
		return l.failed
	}
	for i := range l.debts {
		if l.debts[i].Name == name {
			l.debts[i].Tried = true
			return nil
		}
	}
	return fmt.Errorf("journal %s: %s was not intended", l.Job, name)
}

// Held records that name was acquired and what will release it; durable says
// that the handle must be on disk before the thing is used.
func (l *Log) Held(name string, handle []byte, durable bool) error {
	r := record{Op: opHeld, Name: name, Handle: l.key.Seal(name, handle)}
	return l.append(r, durable)
}

// Keep records until when name is kept by this life of the agent. It is not
// forced: no other life keeps it.
func (l *Log) Keep(name string, until time.Time) error {
	return l.append(record{Op: opKeep, Name: name, Until: until}, false)
}

// Release records that name is gone. A lease must have been seen to be dead, or
// be unprovable, or never have been asked for.
func (l *Log) Release(name string) error {
	l.mu.Lock()
	err := l.mayRelease(name)
	l.mu.Unlock()
	if err != nil {
		return err
	}
	return l.append(record{Op: opRelease, Name: name}, false)
}

// SetOutcome records how the job ended. The first outcome stands.
func (l *Log) SetOutcome(outcome json.RawMessage) error {
	if l.Outcome() != nil {
		return nil
	}
	return l.append(record{Op: opOutcome, Outcome: outcome}, true)
}

// Outcome returns the recorded outcome, or nil.
func (l *Log) Outcome() json.RawMessage {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.outcome
}

// Debts returns what may still exist, newest first.
func (l *Log) Debts() []Debt {
	l.mu.Lock()
	defer l.mu.Unlock()
	ds := slices.Clone(l.debts)
	slices.Reverse(ds)
	return ds
}

// Close removes the log if nothing is owed, and otherwise leaves it for later.
func (l *Log) Close() error {
	if err := l.f.Close(); err != nil || len(l.Debts()) > 0 {
		return err
	}
	failpoint.Here("journal.closing")
	return os.Remove(l.path)
}

func (l *Log) append(r record, durable bool) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	b = append(b, '\n')
	at := "journal." + string(r.Op)
	l.mu.Lock()
	defer l.mu.Unlock()
	if r.Op != opLease { // no decision hangs on a state that was written or was not
		failpoint.Here(at + ".before")
	}
	if err := l.write(at, b, durable); err != nil {
		// A half-written record would swallow the next one.
		err = errors.Join(err, l.f.Truncate(l.size))
		l.failed = fmt.Errorf("journal %s: %w", l.Job, err)
		// In memory the record stands, so that this life of the agent goes on
		// releasing; what the disk lacks is released once more after a crash.
		if r.Op == opRelease || r.Op == opHeld || r.Op == opLease || r.Op == opOutcome {
			l.apply(r)
		}
		return l.failed
	}
	if r.Op != opLease {
		failpoint.Here(at + ".after")
	}
	l.size += int64(len(b))
	l.apply(r)
	return nil
}

func (l *Log) apply(r record) {
	switch r.Op {
	case opBegin, opIntend:
		l.Generation = max(l.Generation, r.Generation)
		for _, d := range r.Debts {
			if d.Kind == kindLease {
				d.State = Intended
			}
			l.debts = append(l.debts, d)
		}
	case opLease:
		l.turned(r)
	case opHeld:
		for i := range l.debts {
			if l.debts[i].Name == r.Name {
				// A handle under another key is as good as lost: what it
				// stands for is then released by name.
				l.debts[i].Handle, _ = l.key.Open(r.Name, r.Handle)
			}
		}
	case opKeep:
		for i := range l.debts {
			if l.debts[i].Name == r.Name {
				l.debts[i].Until = r.Until
			}
		}
	case opRelease:
		if d := l.find(r.Name); d != nil {
			clear(d.Handle) // nobody needs it any more
		}
		l.debts = slices.DeleteFunc(l.debts, func(d Debt) bool { return d.Name == r.Name })
	case opOutcome:
		l.outcome = r.Outcome
	}
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
