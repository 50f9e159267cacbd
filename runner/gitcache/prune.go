package gitcache

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// packs is how many packs a repository may have before they are made one. Each
// is looked into for every object.
const packs = 16

// pack makes one pack of many if nobody reads the repository. Prepare ends it.
func (c *Cache) pack(ctx context.Context, e *entry) {
	found, _ := filepath.Glob(c.path(e, "view", "repository.git", "objects", "pack", "*.pack"))
	if len(found) < packs || e.hold(ctx) != nil {
		return
	}
	defer e.release()
	ctx, cancel := context.WithTimeoutCause(ctx, c.cfg.Time, errTime)
	defer cancel()
	p := &packing{stop: cancel, ended: make(chan struct{})}
	c.mu.Lock()
	idle := e.users == 0 && e.packing == nil && c.entries[e.key] == e
	if idle {
		e.packing = p
	}
	c.mu.Unlock()
	if !idle {
		return
	}
	if err := c.repack(ctx, e); err != nil && ctx.Err() == nil {
		c.cfg.Note(Event{Repository: e.key, Err: err})
	}
	c.count(e)
	c.mu.Lock()
	e.packing = nil
	c.mu.Unlock()
	close(p.ended)
}

func (c *Cache) repack(ctx context.Context, e *entry) error {
	lock, err := c.lockEntry(e)
	if err != nil {
		return err
	}
	defer lock.Close()
	secret, err := Want{}.file()
	if err != nil {
		return err
	}
	defer secret.Close()
	way, err := inMemory("git-way", nil) // it speaks to nobody, and its configuration names the file
	if err != nil {
		return err
	}
	defer way.Close()
	g := git{program: c.git, dir: c.path(e, "view", "repository.git"), files: []*os.File{secret, lock, way}}
	if c.root {
		g.user = e.user()
	}
	_, err = g.run(ctx, "-c", "pack.threads=1", "-c", "pack.windowMemory=256m", "-c", "core.hooksPath=/dev/null", "repack", "-a", "-d", "-q")
	return errors.Join(err, swept(g.dir))
}

// prune removes repositories that no box reads: those that no job has used for
// long, and, while all together are larger than they may be, the one whose last
// use is the longest ago.
func (c *Cache) prune(ctx context.Context) {
	c.mu.Lock()
	all := make([]*entry, 0, len(c.entries))
	var unknown []*entry
	for _, e := range c.entries {
		all = append(all, e)
		if e.size == 0 {
			unknown = append(unknown, e)
		}
	}
	c.mu.Unlock()
	for _, e := range unknown {
		c.count(e)
	}
	c.mu.Lock()
	var total int64
	for _, e := range all {
		total += e.size
	}
	slices.SortFunc(all, func(a, b *entry) int { return a.used.Compare(b.used) })
	var gone []string
	for _, e := range all {
		if e.users > 0 || len(e.asked) > 0 || total <= c.cfg.Size && time.Since(e.used) < c.cfg.Age || ctx.Err() != nil {
			continue
		}
		if p, ok := c.remove(e); ok {
			total -= e.size
			gone = append(gone, p)
		}
	}
	c.mu.Unlock()
	for _, p := range gone {
		if err := os.RemoveAll(p); err != nil {
			c.cfg.Note(Event{Repository: filepath.Base(p), Err: err}) // and the next start tries again
		}
	}
}

// remove takes an entry out of the cache, if nobody changes it now. The lock is
// held.
func (c *Cache) remove(e *entry) (path string, ok bool) {
	select {
	case e.turn <- struct{}{}:
		defer e.release()
	default:
		return "", false
	}
	path = filepath.Join(c.cfg.Dir, ".gone-"+e.key)
	if err := os.Rename(c.path(e), path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", false
	}
	delete(c.entries, e.key)
	return path, true
}
