package providertest

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
)

// ErrDown is what every call of a fake service returns while it is down.
var ErrDown = errors.New("the fake service is down")

// A Fake is a CI service made of files, for tests that kill its users: each
// effect is one rename, link or append, so that any process that opens the
// same directory, at any time, sees what had been done. It implements
// providers.Provider and providers.Logger.
type Fake struct {
	// Trace, if set before use, is called behind each effect.
	Trace func(point string)

	dir  string
	mu   sync.Mutex
	told map[string]bool // names whose Watch has returned ErrCancelled
}

// NewFake opens the fake service in dir and makes what is missing of it.
func NewFake(dir string) (*Fake, error) {
	for _, part := range []string{"offers", "claims", "reports", "cancel", "logs"} {
		if err := os.MkdirAll(filepath.Join(dir, part), 0o700); err != nil {
			return nil, fmt.Errorf("fake: %w", err)
		}
	}
	return &Fake{dir: dir, told: map[string]bool{}}, nil
}

// An order is a job in the fake's files.
type order struct {
	ID  string        `json:"id"`
	Bad string        `json:"bad,omitempty"`
	Job providers.Job `json:"job"`
}

// A Report is one call of Complete.
type Report struct {
	Name   string           `json:"name"`
	ID     string           `json:"id"` // of the job; empty if nothing is claimed under the name
	Result providers.Result `json:"result"`
}

// Submit offers a job and returns its id. Ref, ByName and, if they are empty,
// Provider, Repository and Job of the subject and Trust are filled in. The job
// goes through JSON, so it cannot have secrets.
func (f *Fake) Submit(job providers.Job) (string, error) {
	if len(job.Secrets) > 0 {
		return "", errors.New("fake: a job in a file has no secrets")
	}
	fill := func(s *string, v string) {
		if *s == "" {
			*s = v
		}
	}
	fill(&job.Subject.Provider, "fake")
	fill(&job.Subject.Repository, "owner/repo")
	fill(&job.Subject.Job, "build")
	fill((*string)(&job.Trust), string(providers.TrustBranch))
	return f.submit(order{Job: job})
}

// SubmitBad offers a job that Claim refuses with ErrBadJob.
func (f *Fake) SubmitBad(reason string) (string, error) { return f.submit(order{Bad: reason}) }

func (f *Fake) submit(o order) (string, error) {
	o.ID = fmt.Sprintf("%020d-%s", time.Now().UnixNano(), strings.ToLower(rand.Text()))
	b, err := json.Marshal(o)
	if err != nil {
		return "", fmt.Errorf("fake: %w", err)
	}
	draft := f.path("offers", "."+o.ID)
	if err := os.WriteFile(draft, b, 0o600); err != nil {
		return "", fmt.Errorf("fake: %w", err)
	}
	return o.ID, os.Rename(draft, f.path("offers", o.ID))
}

// Cancel asks for a job to be stopped.
func (f *Fake) Cancel(id string) error { return os.WriteFile(f.path("cancel", id), nil, 0o600) }

// SetDown makes every call of Provider and Logger fail with ErrDown, or ends
// that. Writing to a log that is open fails too.
func (f *Fake) SetDown(down bool) error {
	if down {
		return os.WriteFile(f.path("down"), nil, 0o600)
	}
	if err := os.Remove(f.path("down")); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Reports returns the reports that took effect, one for each claim at most, in
// the order of the names of the claims.
func (f *Fake) Reports() ([]Report, error) {
	entries, err := os.ReadDir(f.path("reports"))
	if err != nil {
		return nil, fmt.Errorf("fake: %w", err)
	}
	var reports []Report
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") {
			continue
		}
		var r Report
		if err := read(f.path("reports", e.Name()), &r); err != nil {
			return nil, err
		}
		reports = append(reports, r)
	}
	return reports, nil
}

// Calls returns every call of Complete, whether it took effect or not, in
// order: a job that was called a success and then lost shows here.
func (f *Fake) Calls() ([]Report, error) {
	b, err := os.ReadFile(f.path("calls"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("fake: %w", err)
	}
	return lines[Report](b), nil
}

// Owed returns the names of the claims that stand: after a job, and after
// recovery from a crash, there should be none.
func (f *Fake) Owed() ([]string, error) {
	entries, err := os.ReadDir(f.path("claims"))
	if err != nil {
		return nil, fmt.Errorf("fake: %w", err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, nil
}

// LogOf returns the log of a job and the last state told of each step.
func (f *Fake) LogOf(id string) ([]byte, map[int]providers.StepState, error) {
	b, err := os.ReadFile(f.path("logs", id))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("fake: %w", err)
	}
	told, err := os.ReadFile(f.path("logs", id+".steps"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("fake: %w", err)
	}
	states := map[int]providers.StepState{}
	for _, s := range lines[providers.StepState](told) {
		states[s.Index] = s
	}
	return b, states, nil
}

// NotesOf returns the annotations and the summary of a job.
func (f *Fake) NotesOf(id string) ([]providers.Annotation, []byte, error) {
	notes, err := os.ReadFile(f.path("logs", id+".notes"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("fake: %w", err)
	}
	summary, err := os.ReadFile(f.path("logs", id+".summary"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("fake: %w", err)
	}
	return lines[providers.Annotation](notes), summary, nil
}

// Poll implements providers.Provider.
func (f *Fake) Poll(ctx context.Context) (providers.Offer, error) {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		if err := errors.Join(ctx.Err(), f.up()); err != nil {
			return providers.Offer{}, err
		}
		entries, err := os.ReadDir(f.path("offers"))
		if err != nil {
			return providers.Offer{}, fmt.Errorf("fake: %w", err)
		}
		for _, e := range entries {
			if !strings.HasPrefix(e.Name(), ".") {
				return providers.Offer{ID: e.Name()}, nil
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// Claim implements providers.Provider.
func (f *Fake) Claim(_ context.Context, name string, o providers.Offer) (providers.Job, error) {
	if err := errors.Join(f.up(), checkName(name)); err != nil {
		return providers.Job{}, err
	}
	var claimed order
	err := read(f.path("claims", name), &claimed)
	if errors.Is(err, fs.ErrNotExist) {
		if strings.Trim(o.ID, "0123456789-abcdefghijklmnopqrstuvwxyz") != "" || o.ID == "" || len(o.ID) > 100 {
			return providers.Job{}, fmt.Errorf("fake: offer %q: %w", o.ID, providers.ErrGone)
		}
		err = os.Rename(f.path("offers", o.ID), f.path("claims", name))
		if errors.Is(err, fs.ErrNotExist) {
			return providers.Job{}, fmt.Errorf("fake: offer %q: %w", o.ID, providers.ErrGone)
		}
		f.trace("fake.claimed")
		if err == nil {
			err = read(f.path("claims", name), &claimed)
		}
	}
	if err != nil {
		return providers.Job{}, fmt.Errorf("fake: %w", err)
	}
	job := claimed.Job
	job.Ref, job.ByName = []byte(claimed.ID), true
	if claimed.Bad != "" {
		return job, fmt.Errorf("%w: %s", providers.ErrBadJob, claimed.Bad)
	}
	return job, nil
}

// Source is a repository that nobody has.
func (f *Fake) Source(j providers.Job) (providers.Source, error) {
	return providers.Source{URL: "https://forge.invalid/" + j.Subject.Repository + ".git"}, nil
}

// Watch implements providers.Provider.
func (f *Fake) Watch(ctx context.Context, name string, _ []byte) error {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		claimed, err := f.claim(name)
		if err != nil {
			return err
		}
		if f.cancelled(name, claimed.ID) {
			return providers.ErrCancelled
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// claim returns what is claimed under name, or ErrGone.
func (f *Fake) claim(name string) (order, error) {
	var claimed order
	if err := errors.Join(f.up(), checkName(name)); err != nil {
		return claimed, err
	}
	err := read(f.path("claims", name), &claimed)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("fake: claim %s: %w", name, providers.ErrGone)
	}
	return claimed, err
}

func (f *Fake) cancelled(name, id string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, err := os.Lstat(f.path("cancel", id))
	if err != nil || f.told[name] {
		return false
	}
	f.told[name] = true
	return true
}

// Complete implements providers.Provider.
func (f *Fake) Complete(_ context.Context, name string, _ []byte, r providers.Result) error {
	if err := errors.Join(f.up(), checkName(name)); err != nil {
		return err
	}
	var claimed order
	if err := read(f.path("claims", name), &claimed); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	b, err := json.Marshal(Report{Name: name, ID: claimed.ID, Result: r})
	if err != nil {
		return fmt.Errorf("fake: %w", err)
	}
	if err := appendTo(f.path("calls"), append(b, '\n')); err != nil || claimed.ID == "" {
		return err
	}
	// Not written over: after a death behind the link it is the report itself.
	draft := f.path("reports", "."+name)
	if err := os.Remove(draft); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("fake: %w", err)
	}
	if err := os.WriteFile(draft, b, 0o600); err != nil {
		return fmt.Errorf("fake: %w", err)
	}
	if err := os.Link(draft, f.path("reports", name)); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("fake: %w", err)
	}
	f.trace("fake.reported")
	if err := errors.Join(os.Remove(draft), os.Remove(f.path("claims", name))); err != nil {
		return fmt.Errorf("fake: %w", err)
	}
	f.trace("fake.completed")
	return nil
}

// Log implements providers.Logger.
func (f *Fake) Log(_ context.Context, name string, _ []byte) (providers.Log, error) {
	claimed, err := f.claim(name)
	if err != nil {
		return nil, err
	}
	return &fakeLog{f: f, file: f.path("logs", claimed.ID)}, nil
}

type fakeLog struct {
	f    *Fake
	file string
}

func (l *fakeLog) Write(_ time.Time, _ int, b []byte) error {
	return errors.Join(l.f.up(), appendTo(l.file, b))
}

func (l *fakeLog) Step(s providers.StepState) error {
	b, err := json.Marshal(s)
	return errors.Join(l.f.up(), err, appendTo(l.file+".steps", append(b, '\n')))
}

// Annotate implements providers.Annotator.
func (l *fakeLog) Annotate(a providers.Annotation) error {
	b, err := json.Marshal(a)
	return errors.Join(l.f.up(), err, appendTo(l.file+".notes", append(b, '\n')))
}

// Summary implements providers.Annotator.
func (l *fakeLog) Summary(_ int, markdown []byte) error {
	return errors.Join(l.f.up(), appendTo(l.file+".summary", markdown))
}

func (l *fakeLog) Close(context.Context) error { return l.f.up() }

func (f *Fake) path(parts ...string) string {
	return filepath.Join(append([]string{f.dir}, parts...)...)
}

func (f *Fake) trace(point string) {
	if f.Trace != nil {
		f.Trace(point)
	}
}

func (f *Fake) up() error {
	if _, err := os.Lstat(f.path("down")); err == nil {
		return ErrDown
	}
	return nil
}

func checkName(name string) error {
	if name == "" || len(name) > 40 || strings.Trim(name, "0123456789-abcdefghijklmnopqrstuvwxyz") != "" {
		return fmt.Errorf("fake: the name %q is not 1 to 40 bytes of a-z, 0-9 and -", name)
	}
	return nil
}

func read(file string, v any) error {
	b, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(b, v)
	}
	if err != nil {
		return fmt.Errorf("fake: %w", err)
	}
	return nil
}

// appendTo writes in one call, so that lines of several processes do not mix.
func appendTo(file string, b []byte) error {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("fake: %w", err)
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Close())
}

// lines reads JSON lines, leaving out one that a kill has cut off.
func lines[T any](b []byte) []T {
	var all []T
	for line := range bytes.Lines(b) {
		var v T
		if json.Unmarshal(line, &v) == nil {
			all = append(all, v)
		}
	}
	return all
}
