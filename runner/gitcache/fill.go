package gitcache

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

var (
	// ErrTooLarge ends a filling that would take more than Config.Size.
	ErrTooLarge = errors.New("the cache has no room for it: raise git_cache.size")
	errTime     = errors.New("the time for one filling is over")
	errBusy     = errors.New("somebody else fills it")
)

// firstUser is the first of 65536 user ids that git runs as, one for each
// repository: a git that somebody took over by what it fetched can change that
// one. They end where those of boxes begin (sandbox/native).
const firstUser = 1<<30 - 1<<16

func (e *entry) user() int {
	id, _ := strconv.ParseUint(e.key[:4], 16, 16) // the key is hexadecimal
	return firstUser + int(id)
}

func (c *Cache) path(e *entry, parts ...string) string {
	return filepath.Join(append([]string{c.cfg.Dir, e.key}, parts...)...)
}

// layOut makes the directory of an entry, at once or not at all:
//
//	KEY/                      only git's user passes through
//	KEY/lock                  held by whoever fills it, its children included
//	KEY/view/                 what a box sees, and nobody but root changes
//	KEY/view/template/        how a repository in a box begins
//	KEY/view/repository.git/  git's
func (c *Cache) layOut(e *entry) error {
	now := time.Now()
	if err := os.Chtimes(c.path(e), now, now); err == nil {
		return nil
	}
	work, err := os.MkdirTemp(c.cfg.Dir, ".new-")
	if err != nil {
		return err
	}
	git := filepath.Join(work, "view", "repository.git")
	for _, d := range []string{"objects/info", "objects/pack", "refs/mayfly"} {
		err = errors.Join(err, os.MkdirAll(filepath.Join(git, d), 0o755))
	}
	template := filepath.Join(work, "view", "template")
	for _, d := range []string{"objects/info", "info", "hooks"} { // scripts write into the last two
		err = errors.Join(err, os.MkdirAll(filepath.Join(template, d), 0o755))
	}
	for file, content := range map[string]string{
		filepath.Join(git, "HEAD"):                         "ref: refs/heads/none\n",
		filepath.Join(git, "config"):                       "[core]\n\trepositoryformatversion = 0\n\tbare = true\n\tsharedRepository = 0644\n",
		filepath.Join(template, "objects/info/alternates"): Target + "/repository.git/objects\n",
		filepath.Join(template, "info/exclude"):            "",
		filepath.Join(work, "lock"):                        "",
	} {
		err = errors.Join(err, os.WriteFile(file, []byte(content), 0o644), os.Chmod(file, 0o644))
	}
	// Whatever the agent's umask is.
	err = errors.Join(err, filepath.WalkDir(work, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			err = os.Chmod(p, 0o755)
		}
		if err == nil && c.root && (p == git || strings.HasPrefix(p, git+"/")) {
			err = os.Lchown(p, e.user(), e.user())
		}
		return err
	}), os.Chmod(work, 0o710))
	if c.root {
		err = errors.Join(err, os.Lchown(work, 0, e.user()))
	}
	if err == nil {
		err = os.Rename(work, c.path(e))
	}
	if errors.Is(err, fs.ErrExist) {
		err = nil // another job of the same repository was first
	}
	return errors.Join(err, os.RemoveAll(work))
}

// begin fills the entry in the background. One that waits for its turn with the
// same ref is enough.
func (c *Cache) begin(e *entry, w Want, secret *os.File) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || e.asked[w.Ref] || time.Now().Before(e.resting.until) {
		_ = secret.Close()
		return
	}
	e.asked[w.Ref] = true
	c.start(func(ctx context.Context) {
		began := time.Now()
		filled, err := c.fill(ctx, e, w, secret)
		err = errors.Join(err, secret.Close())
		size := c.count(e)
		c.mu.Lock()
		delete(e.asked, w.Ref)
		e.rest(err, c.cfg.Pause)
		c.mu.Unlock()
		if filled || err != nil && ctx.Err() == nil {
			c.cfg.Note(Event{Repository: w.Repository, Tier: w.Tier, Size: size, Took: time.Since(began), Err: err})
		}
	})
}

// rest sets when the entry may be filled again, after a filling that ended so.
func (e *entry) rest(err error, first time.Duration) {
	if err == nil {
		e.resting = rest{}
		return
	}
	e.resting.pause = min(max(first, 2*e.resting.pause), mostPause)
	e.resting.until = time.Now().Add(e.resting.pause)
}

// fill fetches the ref of w, if the cache does not have its commit.
func (c *Cache) fill(ctx context.Context, e *entry, w Want, secret *os.File) (filled bool, err error) {
	select {
	case c.turns <- struct{}{}:
		defer func() { <-c.turns }()
	case <-ctx.Done():
		return false, context.Cause(ctx)
	}
	if err := e.hold(ctx); err != nil {
		return false, err
	}
	defer e.release()
	if st, err := secret.Stat(); err != nil || st.Size() == 0 {
		return false, err // the job is over, and its token with it
	}
	lock, err := c.lockEntry(e)
	if err != nil {
		return false, err
	}
	defer lock.Close() // which git's children have as well, and so hold
	ctx, cancel := context.WithTimeoutCause(ctx, c.cfg.Time, errTime)
	defer cancel()
	g := git{program: c.git, dir: c.path(e, "view", "repository.git"), files: []*os.File{secret, lock}}
	if c.root {
		g.user = e.user()
	}
	if have, err := g.run(ctx, "rev-parse", "--verify", "--quiet", w.slot()+"^{commit}"); err == nil && w.SHA != "" && strings.TrimSpace(have) == w.SHA {
		return false, nil
	}
	way, end, err := c.way(ctx, w)
	if err != nil {
		return false, err
	}
	defer end()
	g.files = append(g.files, way)
	ca, err := c.authorities(w)
	if err != nil {
		return false, err
	}
	if ca != nil {
		defer ca.Close()
		g.files = append(g.files, ca)
	}
	ctx, toolarge := context.WithCancelCause(ctx)
	defer toolarge(nil)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		c.watch(ctx, e, toolarge)
	}()
	_, err = g.run(ctx, w.fetch(ca != nil)...)
	cause := context.Cause(ctx)
	toolarge(nil)
	<-watched
	if err != nil {
		err = errors.Join(fmt.Errorf("fetch %s: %w", w.Ref, errors.Join(cause, err)), swept(g.dir))
	}
	return err == nil, err
}

// watchEvery is how often the bytes are counted that a filling has brought. At
// 1 GB/s it exceeds its bound by so much in that time.
const watchEvery = 200 * time.Millisecond

// watch ends a filling that takes more than there is room for, with what nobody
// uses out of its way.
func (c *Cache) watch(ctx context.Context, e *entry, end context.CancelCauseFunc) {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		c.count(e)
		if c.total() <= c.cfg.Size {
			continue
		}
		if c.prune(ctx); c.total() > c.cfg.Size {
			end(ErrTooLarge)
			return
		}
	}
}

func (c *Cache) total() (size int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.entries {
		size += e.size
	}
	return size
}

// lockEntry locks an entry against a filling that an earlier life of the agent
// began, and removes what one left that was killed.
func (c *Cache) lockEntry(e *entry) (*os.File, error) {
	f, err := os.OpenFile(c.path(e, "lock"), os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	err = flock(f)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = errBusy
	}
	if err == nil {
		err = swept(c.path(e, "view", "repository.git"))
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// lockPatience is how long a lock is waited for that a copy of a closed descriptor
// may hold: in a child that has not executed its program yet, or in one that was
// killed.
const lockPatience = time.Second

// flock locks a file, or returns EWOULDBLOCK if somebody keeps it locked.
func flock(f *os.File) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(lockPatience); ; <-tick.C {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(end) {
			return err
		}
	}
}

// swept removes what a git that was killed leaves: packs that are not finished,
// and locks of files.
func swept(dir string) error {
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		name := d.Name()
		half := strings.HasPrefix(name, "tmp_") || strings.HasPrefix(name, ".tmp-") || strings.HasPrefix(name, "incoming-") || strings.HasSuffix(name, ".lock")
		if err != nil || !half {
			return err
		}
		if err := os.RemoveAll(p); err != nil || !d.IsDir() {
			return err
		}
		return fs.SkipDir
	})
	if err != nil {
		return fmt.Errorf("remove what a killed git left: %w", err)
	}
	return nil
}

// weigh is the size of all files below dir, in bytes of the disk.
func weigh(dir string) int64 {
	var size int64
	_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil // removed meanwhile
		}
		if info, err := d.Info(); err == nil {
			if st, ok := info.Sys().(*syscall.Stat_t); ok {
				size += st.Blocks * 512
			}
		}
		return nil
	})
	return size
}
