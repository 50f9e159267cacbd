// Package local is a directory as a CI service: the reference implementation
// of providers.Provider, and what "mayfly exec" runs a workflow through.
//
//	new/ID.json          jobs on offer; anyone who may write there submits one,
//	                     under another name first, renamed when it is complete
//	cancel/ID            its appearance asks for the job to be stopped
//	claimed/NAME/ID.json a claim is the rename of the job to here
//	claimed/NAME/heartbeat  its mtime says when the agent last lived
//	done/ID/claim.json   what was claimed, as it was read: the commit, the workflow
//	done/ID/log          what the job printed, masked
//	done/ID/steps.jsonl  the states of its steps; of each the last line counts
//	done/ID/annotations.jsonl, summary.md  what steps said of the code and of themselves
//	done/ID/result.json  how it ended; appears once, complete, and never changes
//
// Renames and links within one file system are all the locking there is, so
// any number of agents may share a spool. The directories claimed and done
// must be writable by the agent alone. A claim is not fsynced: after a loss of
// power the job is on offer again. A result is, before Complete returns.
//
// The workflow is read from the git repository at the commit, never from the
// work tree, unless the job says "worktree".
package local

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
)

// Name is Subject.Provider of every job from a spool.
const Name = "local"

const (
	dirNew     = "new"
	dirCancel  = "cancel"
	dirClaimed = "claimed"
	dirDone    = "done"

	extension = ".json"

	// rescan is how often the spool is read when the kernel announces nothing:
	// inotify is silent on network file systems, and its instances can run out.
	rescan = time.Second

	// heartbeat is well below the minute after which a human would wonder.
	heartbeat = 10 * time.Second
)

// A Config says where the spool is. Its zero value is refused: Dir is needed.
type Config struct {
	// Dir is the spool. It and its parts are made if they are missing.
	Dir string

	// Provider is what rules of the policy call this one; "" is Name.
	Provider string

	// Labels are what runs-on may ask for; a job that asks for another is
	// refused. None accepts all.
	Labels []string

	// Repositories is the directory under which the repository of a job that
	// is a name ("owner/repo") is found. Without it jobs name absolute paths.
	Repositories string

	// Trace, if set, is called between any two effects on the spool, for
	// tests that stop the agent there.
	Trace func(point string)
}

// A Provider serves the jobs of one spool.
type Provider struct {
	config Config
	root   *os.Root // nothing outside of it can be reached through a link

	mu     sync.Mutex
	queue  []string             // ids on offer at the last scan, oldest first
	handed map[string]time.Time // offered by Poll and perhaps being claimed
	told   map[string]bool      // claims whose Watch has returned ErrCancelled
}

// New opens the spool and makes what is missing of it.
func New(c Config) (*Provider, error) {
	if c.Dir == "" {
		return nil, errors.New("local: the spool directory is not set")
	}
	if err := providers.CheckLabels(c.Labels, runtime.GOARCH); err != nil {
		return nil, fmt.Errorf("local: %w", err)
	}
	if c.Trace == nil {
		c.Trace = func(string) {}
	}
	if c.Provider == "" {
		c.Provider = Name
	}
	root, err := openSpool(c.Dir)
	if err != nil {
		return nil, err
	}
	return &Provider{config: c, root: root, handed: map[string]time.Time{}, told: map[string]bool{}}, nil
}

// openSpool makes the layout. The spool itself is private to its maker, who
// may open it and new/ and cancel/ to others.
func openSpool(dir string) (*os.Root, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("spool: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("spool: %w", err)
	}
	for _, part := range []string{dirNew, dirCancel, dirClaimed, dirDone} {
		if err := root.Mkdir(part, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, errors.Join(fmt.Errorf("spool: %w", err), root.Close())
		}
		if info, err := root.Lstat(part); err != nil || !info.IsDir() {
			return nil, errors.Join(fmt.Errorf("spool: %s in %s is not a directory", part, dir), err, root.Close())
		}
	}
	return root, nil
}

// validID says which file names in new are jobs: anything else there is not
// an offer and stays where it is.
func validID(id string) bool {
	if id == "" || len(id) > 64 || strings.ContainsAny(id[:1], "._-") {
		return false
	}
	for _, c := range []byte(id) {
		if !alphanumeric(c) && c != '.' && c != '_' && c != '-' {
			return false
		}
	}
	return true
}

func alphanumeric(c byte) bool {
	return '0' <= c && c <= '9' || 'A' <= c && c <= 'Z' || 'a' <= c && c <= 'z'
}

// checkName guards the paths that are made of names: the agent chooses them,
// and reads them back from its journal after a crash.
func checkName(name string) error {
	if name == "" || len(name) > 40 || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		return fmt.Errorf("claim %q: the name is not 1 to 40 bytes of a-z, 0-9 and -", name)
	}
	return nil
}

// Poll waits for a job and offers the oldest. An offer is not made again for a
// second, so that one agent does not claim a job twice; if it is not claimed
// by then, it is on offer again.
func (p *Provider) Poll(ctx context.Context) (providers.Offer, error) {
	if err := ctx.Err(); err != nil {
		return providers.Offer{}, err
	}
	if id, err := p.take(); err != nil || id != "" {
		return providers.Offer{ID: id}, err
	}
	w := newWatcher(path.Join(p.config.Dir, dirNew))
	defer w.close()
	for {
		// Again, for what came before the watch was set.
		if id, err := p.take(); err != nil || id != "" {
			return providers.Offer{ID: id}, err
		}
		if err := w.wait(ctx, rescan); err != nil {
			return providers.Offer{}, err
		}
	}
}

// take returns the next id, or "" if there is none.
func (p *Provider) take() (string, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for range 2 {
		for len(p.queue) > 0 {
			id := p.queue[0]
			p.queue = p.queue[1:]
			if _, err := p.root.Lstat(path.Join(dirNew, id+extension)); err == nil {
				p.handed[id] = time.Now()
				return id, nil
			}
		}
		if err := p.scan(); err != nil {
			return "", err
		}
	}
	return "", nil
}

// scan fills the queue with what is in new and was not offered just now.
func (p *Provider) scan() error {
	for id, at := range p.handed {
		if time.Since(at) >= rescan {
			delete(p.handed, id)
		}
	}
	entries, err := fs.ReadDir(p.root.FS(), dirNew)
	if err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	type waiting struct {
		id string
		at time.Time
	}
	var found []waiting
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), extension)
		if _, handed := p.handed[id]; !ok || handed || e.IsDir() || !validID(id) {
			continue
		}
		if info, err := e.Info(); err == nil { // else another agent has it
			found = append(found, waiting{id, info.ModTime()})
		}
	}
	slices.SortStableFunc(found, func(a, b waiting) int { return a.at.Compare(b.at) })
	p.queue = p.queue[:0]
	for _, f := range found {
		p.queue = append(p.queue, f.id)
	}
	return nil
}

// Watch beats until ctx is done. It returns ErrCancelled once for a claim;
// called again it only beats, so that the claim stays alive during cleanup.
func (p *Provider) Watch(ctx context.Context, name string, _ []byte) error {
	id, err := p.find(name)
	if err != nil {
		return err
	}
	w := newWatcher(path.Join(p.config.Dir, dirCancel))
	defer w.close()
	var beat time.Time
	for {
		if time.Since(beat) >= heartbeat {
			if err := p.beat(name); err != nil {
				return err
			}
			beat = time.Now()
		}
		if p.cancelled(name, id) {
			return providers.ErrCancelled
		}
		if err := w.wait(ctx, rescan); ctx.Err() != nil {
			return nil
		} else if err != nil {
			return fmt.Errorf("claim %s: %w", name, err)
		}
	}
}

func (p *Provider) beat(name string) error {
	file := path.Join(dirClaimed, name, "heartbeat")
	now := time.Now()
	err := p.root.Chtimes(file, now, now)
	if errors.Is(err, fs.ErrNotExist) {
		err = p.root.WriteFile(file, nil, 0o644)
	}
	if err != nil {
		return fmt.Errorf("heartbeat of %s: %w", name, err)
	}
	return nil
}

func (p *Provider) cancelled(name, id string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.told[name] {
		return false
	}
	_, err := p.root.Lstat(path.Join(dirCancel, id))
	p.told[name] = err == nil
	return err == nil
}

// find returns the id of the job that is claimed under name, and ErrGone if
// there is no such claim.
func (p *Provider) find(name string) (string, error) {
	if err := checkName(name); err != nil {
		return "", err
	}
	entries, err := fs.ReadDir(p.root.FS(), path.Join(dirClaimed, name))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("claim %s: %w", name, err)
	}
	for _, e := range entries {
		if id, ok := strings.CutSuffix(e.Name(), extension); ok && validID(id) {
			return id, nil
		}
	}
	return "", fmt.Errorf("claim %s: %w", name, providers.ErrGone)
}
