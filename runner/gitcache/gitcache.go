// Package gitcache keeps git objects on the agent's machine, so that a clone in a
// box transfers what the agent does not have yet (docs/adr/0020).
//
// There is one bare repository for each repository and trust tier of a provider.
// The agent alone fills it, with the ref of a job and beside the job, which does
// not wait for it. A box sees the one of its own job at [Target], read-only, as
// an alternate: what is in it need not be fetched. Whoever may read one reads
// every object of that repository in that tier, so that it is shown to jobs of
// that repository and tier only, and a fork's are never among those of a
// protected branch.
//
// Nothing here fails a job: a repository that cannot be filled, because it is too
// large, malformed, slow or hostile, is one that jobs fetch as they would without
// a cache, and [Config.Note] hears why. git runs as a user of its own for each
// repository, with one protocol, no configuration but ours, no hooks, and bounds
// on time, bytes and memory.
package gitcache

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
)

const (
	// Target is where a box sees its cache. /run/mayfly is a tmpfs of secrets,
	// and /var/cache is where builds remove what they do not need.
	Target = "/opt/mayfly/git"
	// TemplateVar is the variable that makes git begin every repository in a box
	// with the cache as its alternate, and TemplateDir its value.
	TemplateVar = "GIT_TEMPLATE_DIR"
	// TemplateDir is the value of TemplateVar.
	TemplateDir = Target + "/template"
)

// Defaults, each with its reason.
const (
	defaultSize  = 10 << 30            // as much as one box may write
	defaultAge   = 30 * 24 * time.Hour // a repository that is built once a month
	defaultTime  = 15 * time.Minute    // 1 GiB at 10 Mbit/s
	defaultPause = 10 * time.Minute
	mostPause    = 24 * time.Hour
	// fillers is how many repositories are filled at once: one that hangs must
	// not keep the others from it, and jobs want the machine too.
	fillers = 2
)

// ErrUnusable reports a repository that no cache is made for: its address or its
// ref is not one that git is asked for.
var ErrUnusable = errors.New("repository is not cached")

// A Config says where and how much. Dir is required; zero values of the rest are
// the defaults.
type Config struct {
	// Dir is an absolute directory of the cache's own. Every user must be able
	// to reach it, since git does not run as root.
	Dir  string
	Size int64         // bytes of all repositories together; 0 is 10 GiB
	Age  time.Duration // after which one that no job used is removed; 0 is 30 days
	Time time.Duration // bounds one filling; 0 is 15 minutes
	// Pause is how long a repository is left alone that could not be filled: what
	// is too large would be fetched in vain for each job. It doubles with each
	// failure, to a day; 0 is ten minutes.
	Pause time.Duration
	// Out lets one filling out, to address, HOST:PORT, until end is called: it
	// returns the URL of a proxy, with its password. nil is directly.
	Out func(ctx context.Context, address string) (proxy creds.Secret, end func(), err error)
	// Authorities are, as PEM, what https servers are verified with whose provider
	// names none; "" is the system's.
	Authorities string
	// Note hears what became of a repository. It may be called at once from
	// several goroutines. nil hears nothing.
	Note func(Event)
}

// An Event is a repository that was filled, or was not.
type Event struct {
	Repository, Tier string
	Size             int64 // bytes that the cache has of it now
	Took             time.Duration
	Err              error // why it was not filled; never holds a secret
}

// A Want says whose objects a job wants, and where they come from.
type Want struct {
	Provider, Repository, Tier string
	Ref, SHA                   string // full name, and the commit that it had when the job was made
	// URL is https, http or file, from the configuration of the provider and
	// never from a job. Of the protocols of git only this one is used.
	URL    string
	User   string // beside Token; "" is anonymous
	Token  creds.Secret
	RootCA string // PEM file of authorities; "" is the system's
}

// A Cache is the directory of an agent. It may be used by several goroutines.
type Cache struct {
	cfg  Config
	git  string // program
	lock *os.File
	root bool // git runs as users of its own

	stop    context.CancelFunc // ends what runs in the background
	start   func(f func(ctx context.Context))
	running sync.WaitGroup
	turns   chan struct{} // one for each filler

	mu      sync.Mutex
	entries map[string]*entry
	closed  bool
}

// An entry is one repository in one tier.
type entry struct {
	key  string
	turn chan struct{} // held by the one who changes it

	// Guarded by the cache's lock.
	users   int   // boxes that may read it
	size    int64 // bytes, as they were when they were last counted
	used    time.Time
	packing *packing        // that runs now
	asked   map[string]bool // refs that somebody waits to fetch
	resting rest
}

// A rest is how a repository is left alone that could not be filled.
type rest struct {
	until time.Time
	pause time.Duration // the last one
}

// A packing makes one pack of many, and drops what no ref reaches, while nobody
// may read the repository.
type packing struct {
	stop  context.CancelFunc
	ended chan struct{}
}

// New takes the directory, for this process alone. It runs nothing but
// "git version".
func New(cfg Config) (*Cache, error) {
	if !filepath.IsAbs(cfg.Dir) || filepath.Clean(cfg.Dir) != cfg.Dir || cfg.Dir == "/" {
		return nil, fmt.Errorf("git cache: directory %q is not absolute and clean", cfg.Dir)
	}
	if cfg.Size < 0 || cfg.Age < 0 || cfg.Time < 0 || cfg.Pause < 0 {
		return nil, errors.New("git cache: size, age, time and pause must not be negative")
	}
	orDefault(&cfg.Size, defaultSize)
	orDefault(&cfg.Age, defaultAge)
	orDefault(&cfg.Time, defaultTime)
	orDefault(&cfg.Pause, defaultPause)
	if cfg.Note == nil {
		cfg.Note = func(Event) {}
	}
	c := &Cache{cfg: cfg, root: os.Geteuid() == 0, turns: make(chan struct{}, fillers), entries: map[string]*entry{}}
	var err error
	if c.git, err = exec.LookPath("git"); err != nil {
		return nil, fmt.Errorf("git cache: install git, or remove git_cache from the configuration: %w", err)
	}
	if err := c.take(); err != nil {
		return nil, fmt.Errorf("git cache: %w", err)
	}
	ctx, stop := context.WithCancel(context.Background())
	c.stop = stop
	c.start = func(f func(ctx context.Context)) { c.running.Go(func() { f(ctx) }) }
	c.start(c.prune)
	return c, nil
}

func orDefault[T ~int64](v *T, d T) {
	if *v == 0 {
		*v = d
	}
}

// take makes the directory and locks it: what one agent's boxes read, another
// agent would remove.
func (c *Cache) take() error {
	if err := os.MkdirAll(c.cfg.Dir, 0o711); err != nil {
		return err
	}
	if err := os.Chmod(c.cfg.Dir, 0o711); err != nil { // every user may pass, none may look
		return fmt.Errorf("it must belong to the agent: %w", err)
	}
	if err := passable(c.cfg.Dir); err != nil {
		return err
	}
	var err error
	if c.lock, err = os.OpenFile(filepath.Join(c.cfg.Dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return err
	}
	if err := flock(c.lock); err != nil {
		return errors.Join(fmt.Errorf("%s is in use by another agent: give each its own: %w", c.cfg.Dir, err), c.lock.Close())
	}
	found, err := os.ReadDir(c.cfg.Dir)
	for _, e := range found {
		if p := filepath.Join(c.cfg.Dir, e.Name()); strings.HasPrefix(e.Name(), ".") { // half of a crash's
			err = errors.Join(err, os.RemoveAll(p))
		} else if st, statErr := e.Info(); statErr == nil && e.IsDir() && len(e.Name()) == 2*keyBytes {
			c.entries[e.Name()] = newEntry(e.Name(), st.ModTime())
		}
	}
	if err != nil {
		err = errors.Join(err, c.lock.Close())
	}
	return err
}

// passable says whether git's users get to dir, where the agent is root.
func passable(dir string) error {
	if os.Geteuid() != 0 {
		return nil
	}
	for up := filepath.Dir(dir); up != "/"; up = filepath.Dir(up) {
		if st, err := os.Stat(up); err != nil && !errors.Is(err, os.ErrNotExist) || err == nil && st.Mode()&0o001 == 0 {
			return errors.Join(fmt.Errorf("other users cannot pass through %s to %s, and git does not run as root: choose another directory", up, dir), err)
		}
	}
	return nil
}

// minVersion of git is the first that reads its user's configuration from where
// GIT_CONFIG_GLOBAL says.
const minVersion = "2.32"

// Check says which git there is, and what a cache holds, beside the agent that
// owns it. An error means that New, or every filling, fails.
func Check(ctx context.Context, cfg Config) (string, error) {
	program, err := exec.LookPath("git")
	if err != nil {
		return "", fmt.Errorf("install git: %w", err)
	}
	out, err := git{program: program, dir: "/"}.run(ctx, "version")
	if err != nil {
		return "", err
	}
	var major, minor, wantMajor, wantMinor int
	_, err = fmt.Sscanf(out, "git version %d.%d", &major, &minor)
	_, wantErr := fmt.Sscanf(minVersion, "%d.%d", &wantMajor, &wantMinor)
	if err := errors.Join(err, wantErr); err != nil {
		return "", fmt.Errorf("git version %q: %w", out, err)
	}
	if major < wantMajor || major == wantMajor && minor < wantMinor {
		return "", fmt.Errorf("git %d.%d is too old: %s is needed", major, minor, minVersion)
	}
	if err := passable(cfg.Dir); err != nil {
		return "", err
	}
	return fmt.Sprintf("git %d.%d; %d MiB on the disk", major, minor, weigh(cfg.Dir)>>20), nil
}

func newEntry(key string, used time.Time) *entry {
	return &entry{key: key, used: used, turn: make(chan struct{}, 1), asked: map[string]bool{}}
}

// Close ends what runs in the background and waits for it.
func (c *Cache) Close() error {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.stop()
	c.running.Wait()
	return c.lock.Close()
}

// Prepare returns the directory of the repository that w is about, to be mounted
// at Target, and begins to fill it. It does not wait for that: what is there is
// there, and what comes later is seen too. done must be called when no box reads
// the directory any more. An error means that there is no cache for this job.
func (c *Cache) Prepare(ctx context.Context, w Want) (dir string, done func(), err error) {
	if err := w.check(); err != nil {
		return "", nil, err
	}
	key := w.key()
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return "", nil, errors.New("git cache: closed")
	}
	e := c.entries[key]
	if e == nil {
		e = newEntry(key, time.Time{})
		c.entries[key] = e
	}
	e.users++ // from here on nobody removes it
	packing := e.packing
	c.mu.Unlock()

	wipe := func() {}
	done = sync.OnceFunc(func() { wipe(); c.done(e) })
	if packing != nil {
		packing.stop()
		select {
		case <-packing.ended:
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
	}
	if err == nil {
		err = c.layOut(e)
	}
	var secret *os.File
	if err == nil {
		secret, err = w.file()
	}
	if err != nil {
		done()
		return "", nil, fmt.Errorf("git cache: %w", err)
	}
	wipe = func() { w.blank(secret) }
	c.begin(e, w, secret)
	return filepath.Join(c.cfg.Dir, key, "view"), done, nil
}

// done lets go of an entry, and packs it if that is worth it and nobody looks.
func (c *Cache) done(e *entry) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e.users--
	e.used = time.Now()
	if e.users > 0 || e.packing != nil || c.closed {
		return
	}
	c.start(func(ctx context.Context) {
		c.pack(ctx, e)
		c.prune(ctx)
	})
}

// count notes what an entry has.
func (c *Cache) count(e *entry) int64 {
	size := weigh(filepath.Join(c.cfg.Dir, e.key))
	c.mu.Lock()
	defer c.mu.Unlock()
	e.size = size
	return size
}

// hold waits for the turn to change an entry.
func (e *entry) hold(ctx context.Context) error {
	select {
	case e.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (e *entry) release() { <-e.turn }

// check refuses what git could take for something else than a ref and an address.
func (w Want) check() error {
	u, err := url.Parse(w.URL)
	if err != nil || u.User != nil || !(u.Scheme == "file" && u.Host == "" && filepath.IsAbs(u.Path)) && !(u.Scheme == "https" || u.Scheme == "http") ||
		u.Scheme != "file" && u.Host == "" || u.RawQuery != "" || u.Fragment != "" {
		return fmt.Errorf("%w: the address %q is none of https, http and file", ErrUnusable, w.URL)
	}
	if !strings.HasPrefix(w.Ref, "refs/") || strings.ContainsAny(w.Ref, " ~^:?*[\\\x7f") || strings.Contains(w.Ref, "..") ||
		strings.Contains(w.Ref, "@{") || strings.ContainsFunc(w.Ref, func(r rune) bool { return r < ' ' }) || len(w.Ref) > 1024 {
		return fmt.Errorf("%w: ref %q is not a full name", ErrUnusable, w.Ref)
	}
	if w.Repository == "" || w.Tier == "" {
		return fmt.Errorf("%w: it has no name or no tier", ErrUnusable)
	}
	return nil
}

const (
	keyBytes = 16
	layout   = "1" // of an entry's directory; another one makes all anew
)

// key names the entry: everything that decides who may read it, and the address,
// which is another repository's if it changes.
func (w Want) key() string {
	sum := sha256.New()
	for _, s := range []string{layout, w.Provider, w.Repository, w.Tier, w.URL} {
		sum.Write([]byte(strconv.Itoa(len(s)) + ":" + s))
	}
	return hex.EncodeToString(sum.Sum(nil)[:keyBytes])
}

// slot is the ref of the cache that holds a ref of the repository. There are 256,
// so that those who negotiate by them do so with no more.
func (w Want) slot() string {
	sum := sha256.Sum256([]byte(w.Ref))
	return "refs/mayfly/" + hex.EncodeToString(sum[:1])
}
