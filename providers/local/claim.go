package local

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
)

// A record is what a claim found, kept in done/ID/claim.json, so that claiming
// again gives the same job though a branch or a file has moved since.
type record struct {
	Name      string    `json:"name"`
	ID        string    `json:"id"`
	ClaimedAt time.Time `json:"claimed_at"` // when the rename had been done
	// AnsweredAt is when the job had been read, so that Claim could answer.
	AnsweredAt time.Time `json:"answered_at,omitzero"`
	Job        Job       `json:"job"`
	SHA        string    `json:"sha,omitempty"`
	Source     string    `json:"workflow_source,omitempty"`
	Bad        string    `json:"bad,omitempty"` // why the job cannot be run
}

// Claim takes the offer by a rename. Everything that is wrong with the job
// file, its repository or its workflow is ErrBadJob with the claim standing.
func (p *Provider) Claim(ctx context.Context, name string, o providers.Offer) (providers.Job, error) {
	id, err := p.find(name)
	if errors.Is(err, providers.ErrGone) {
		id, err = o.ID, p.rename(name, o.ID)
	}
	if err != nil {
		return providers.Job{}, err
	}
	at := time.Now().UTC()
	rec, err := p.recorded(id)
	if err == nil && rec.Name == "" {
		rec, err = p.read(ctx, name, id, at)
	}
	if err != nil {
		return p.bare(id), err
	}
	if rec.Name != name {
		return providers.Job{}, errors.Join(fmt.Errorf("offer %s: %w: a job with this id was claimed before", id, providers.ErrGone), p.discard(name, id))
	}
	return p.job(rec)
}

// rename takes the job out of new, which only one agent can do.
func (p *Provider) rename(name, id string) error {
	if !validID(id) {
		return fmt.Errorf("offer %q: %w", id, providers.ErrGone)
	}
	dir := path.Join(dirClaimed, name)
	if err := p.root.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("claim %s: %w", name, err)
	}
	p.config.Trace("local.named")
	err := p.root.Rename(path.Join(dirNew, id+extension), path.Join(dir, id+extension))
	if errors.Is(err, fs.ErrNotExist) {
		return errors.Join(fmt.Errorf("offer %s: %w", id, providers.ErrGone), p.root.RemoveAll(dir))
	}
	if err != nil {
		return errors.Join(fmt.Errorf("claim %s: %w", name, err), p.root.RemoveAll(dir))
	}
	p.config.Trace("local.claimed")
	return nil
}

// read reads the job and its workflow and records them. Errors that are not
// the job's (the disk, a git that is missing, the end of ctx) are returned and
// not recorded.
func (p *Provider) read(ctx context.Context, name, id string, at time.Time) (record, error) {
	rec := record{Name: name, ID: id, ClaimedAt: at}
	var err error
	rec.Job, err = p.submission(path.Join(dirClaimed, name, id+extension))
	if err == nil {
		rec.SHA, rec.Source, err = p.source(ctx, rec.Job)
	}
	if errors.Is(err, providers.ErrBadJob) {
		rec.Bad = strings.Replace(err.Error(), providers.ErrBadJob.Error()+": ", "", 1) // job says it again
	} else if err != nil {
		return record{}, fmt.Errorf("job %s: %w", id, err)
	}
	rec.AnsweredAt = time.Now().UTC()
	return p.record(rec)
}

// recorded returns the record of a claim. One that was torn by a loss of power
// is as good as none.
func (p *Provider) recorded(id string) (record, error) {
	b, err := p.root.ReadFile(path.Join(dirDone, id, "claim.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return record{}, nil
	}
	if err != nil {
		return record{}, fmt.Errorf("record of %s: %w", id, err)
	}
	var rec record
	if json.Unmarshal(b, &rec) != nil {
		return record{}, nil
	}
	return rec, nil
}

// record puts rec in its place, unless a record is there already: two jobs of
// one id may have been claimed, and the first keeps the id. It returns the
// record that stands.
func (p *Provider) record(rec record) (record, error) {
	if err := p.root.Mkdir(path.Join(dirDone, rec.ID), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return record{}, fmt.Errorf("record of %s: %w", rec.ID, err)
	}
	draft := path.Join(dirClaimed, rec.Name, "record")
	final := path.Join(dirDone, rec.ID, "claim.json")
	if err := p.write(draft, rec, false); err != nil {
		return record{}, err
	}
	err := p.root.Link(draft, final)
	if errors.Is(err, fs.ErrExist) {
		standing, err := p.recorded(rec.ID)
		if err != nil || standing.Name != "" {
			return standing, err
		}
		if err := p.root.Rename(draft, final); err != nil { // over a torn one
			return record{}, fmt.Errorf("record of %s: %w", rec.ID, err)
		}
		return rec, nil
	}
	if err != nil {
		return record{}, fmt.Errorf("record of %s: %w", rec.ID, err)
	}
	p.config.Trace("local.recorded")
	return rec, nil
}

// discard ends a claim whose id belongs to another: its job is kept beside the
// other's result, and reported to nobody.
func (p *Provider) discard(name, id string) error {
	err := p.root.Rename(path.Join(dirClaimed, name, id+extension), path.Join(dirDone, id, "duplicate-"+name+extension))
	return errors.Join(err, p.root.RemoveAll(path.Join(dirClaimed, name)))
}

// write writes v as JSON to a new file, through to the disk if sync is set. An
// old file of the name is removed and not written over: after a death behind a
// link it is the report itself.
func (p *Provider) write(file string, v any, sync bool) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	if err := p.root.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("spool: %w", err)
	}
	f, err := p.root.OpenFile(file, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o644)
	if err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	_, err = f.Write(append(b, '\n'))
	if sync {
		err = errors.Join(err, f.Sync())
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	return nil
}

// A Result is what stands in done/ID/result.json.
type Result struct {
	ID   string `json:"id"`
	Name string `json:"name"` // of the claim
	providers.Result
	SHA string `json:"sha,omitempty"`
	// The spool's own clock: the job was taken; it had been read, and Claim
	// answered; the report was written.
	ClaimedAt   time.Time `json:"claimed_at"`
	AnsweredAt  time.Time `json:"answered_at,omitzero"`
	CompletedAt time.Time `json:"completed_at"`
}

// Complete reports by a link, which succeeds once, and ends the claim. It is
// on disk when Complete returns.
func (p *Provider) Complete(_ context.Context, name string, _ []byte, r providers.Result) error {
	id, err := p.find(name)
	if errors.Is(err, providers.ErrGone) {
		return p.root.RemoveAll(path.Join(dirClaimed, name)) // cut short before its rename, or after its end
	}
	if err != nil {
		return err
	}
	rec, err := p.recorded(id)
	if err == nil && rec.Name == "" {
		rec, err = p.record(record{Name: name, ID: id, ClaimedAt: time.Now().UTC(), Bad: "the claim was cut short"})
	}
	if err != nil {
		return err
	}
	if rec.Name != name {
		return p.discard(name, id)
	}
	draft, dir := path.Join(dirClaimed, name, "result"), path.Join(dirDone, id)
	result := Result{ID: id, Name: name, Result: r, SHA: rec.SHA, ClaimedAt: rec.ClaimedAt, AnsweredAt: rec.AnsweredAt, CompletedAt: time.Now().UTC()}
	if err := p.write(draft, result, true); err != nil {
		return err
	}
	if err := p.root.Link(draft, path.Join(dir, "result.json")); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("result of %s: %w", id, err)
	}
	if err := errors.Join(p.sync(dir), p.sync(dirDone)); err != nil {
		return err
	}
	p.config.Trace("local.reported")
	if err := p.root.Remove(path.Join(dirCancel, id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cancel of %s: %w", id, err)
	}
	if err := p.root.RemoveAll(path.Join(dirClaimed, name)); err != nil {
		return fmt.Errorf("claim %s: %w", name, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.told, name)
	return nil
}

// sync brings the names in a directory to the disk.
func (p *Provider) sync(dir string) error {
	d, err := p.root.Open(dir)
	if err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("spool: %s: %w", dir, err)
	}
	return nil
}
