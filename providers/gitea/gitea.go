// Package gitea takes jobs from a Gitea by the protocol of its runners,
// runner.v1 (code.gitea.io/actions-proto-go; the server's side is
// routers/api/actions/runner in code.gitea.io/gitea, read at 1.27.3).
//
// Asking is taking: FetchTask assigns the job in its answer. So Poll only waits,
// Claim asks, and the agent's journal has an intent on disk before each ask. If
// the answer is lost on its way, or the agent dies before the journal has it,
// nobody here knows of the task. Gitea takes it back if it sees the connection
// break before it answers, and else ends it as failed when it has heard nothing
// for its ZOMBIE_TASK_TIMEOUT, ten minutes by default. Nothing of such a job
// runs, and nothing of it is kept.
//
// A task whose answer cannot be used (too large, cut off, a workflow that cannot
// be run) is reported as failed, if as much as its number was read.
//
// Every UpdateTask carries the states of all steps: to the server a step without
// one runs again. States do not outlive the agent, so after a crash the steps
// are shown as the job as a whole ended.
//
// Gitea stores a log as rows of UTF-8 text. Bytes that are none become U+FFFD,
// one each; a line of more than 64 KiB becomes several rows; a last line has a
// newline, whether it was printed or not. All else arrives as it was printed.
package gitea

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
)

const (
	// quick is the pause between two asks while there is something going on.
	quick = 200 * time.Millisecond

	// defaultPoll is the pause between two asks of an idle agent. An ask that
	// finds nothing costs Gitea 2 ms and this machine one journal file.
	defaultPoll = 2 * time.Second
	leastPoll   = quick
	mostPoll    = 5 * time.Minute

	// mostFailing is the pause after many asks that failed.
	mostFailing = 30 * time.Second

	// maxSeen is how many tasks are remembered after they ended, so that one that
	// comes again is not run again.
	maxSeen = 4096
)

// A Store keeps one small secret from one life of the agent to the next.
type Store interface {
	// Load returns what was saved last, nil if nothing was.
	Load() ([]byte, error)
	// Save is on disk, sealed, when it returns.
	Save(b []byte) error
}

// A Config is one registration at one instance. URL, Labels and Store are
// needed, and Token until the runner is registered.
type Config struct {
	// URL is the instance: https://gitea.example.org. Plain http is for
	// loopback addresses; elsewhere only if Insecure says so.
	URL      string
	RootCA   string // PEM file of authorities; "" is the system's
	Insecure bool

	// Provider is what rules of the policy call this one; "" is "gitea".
	Provider string
	// Runner is the name that Gitea shows; "" is the machine's.
	Runner string
	// Labels are what runs-on may ask for: names, without what Gitea's own
	// runner writes behind a colon.
	Labels []string
	// Ephemeral makes a runner of its own for each job. Gitea gives it one task
	// and forgets it afterwards.
	Ephemeral bool

	// Token reads the registration token. It is asked when there is a need to
	// register, and for a runner that Gitea forgot only if it has changed.
	Token func() (creds.Secret, error)
	// Store keeps the registration.
	Store Store

	Poll    time.Duration // the longest pause between two asks; 0 is two seconds
	Timeout time.Duration // of one call; 0 is half a minute
	Version string        // of this agent, for Gitea's list of runners

	// Out makes a transport, which has the authorities of RootCA if that is set,
	// one that leaves this machine. nil dials directly; the environment's proxy is
	// never used.
	Out func(*http.Transport) http.RoundTripper

	// Trace, if set, is called between any two effects on the server or the
	// store, for tests that stop the agent there.
	Trace func(point string)
}

// A Provider takes jobs from one instance.
type Provider struct {
	config Config
	client *client

	// asking is held while one Claim asks or one Poll registers.
	asking       sync.Mutex
	current      *registration
	refused      string // uuid that the server does not know any more
	declared     bool
	tasksVersion integer

	mu     sync.Mutex
	claims map[string]*claim
	seen   []integer // tasks that were claimed, oldest first
	next   time.Time // of the next ask
	idle   time.Duration
	failed error // of the last ask, until Poll has told it
	woken  chan struct{}
}

// New checks the configuration. It does not ask the server: an agent starts
// while its Gitea is down, and Poll registers.
func New(c Config) (*Provider, error) {
	errs := []error{checkLabels(c.Labels)}
	if c.Store == nil {
		errs = append(errs, errors.New("store: there is none to keep the registration in"))
	}
	if c.Poll != 0 && (c.Poll < leastPoll || c.Poll > mostPoll) {
		errs = append(errs, fmt.Errorf("poll: %s is out of range: %s to %s", c.Poll, leastPoll, mostPoll))
	}
	c.Poll = orDefault(c.Poll, defaultPoll)
	if c.Runner == "" {
		name, err := os.Hostname()
		c.Runner, errs = name, append(errs, err)
	}
	if c.Runner == "" || len(c.Runner) > 255 || clip(c.Runner) != c.Runner {
		errs = append(errs, fmt.Errorf("name: %q is not a line of 1 to 200 bytes", clip(c.Runner)))
	}
	c.Provider = orDefault(c.Provider, "gitea")
	if c.Trace == nil {
		c.Trace = func(string) {}
	}
	if c.Token == nil {
		c.Token = func() (creds.Secret, error) { return creds.Secret{}, errors.New("token_file is not set") }
	}
	client, err := newClient(c)
	if err := errors.Join(append(errs, err)...); err != nil {
		return nil, fmt.Errorf("gitea: %w", err)
	}
	return &Provider{config: c, client: client, claims: map[string]*claim{}, woken: make(chan struct{}, 1)}, nil
}

// checkLabels refuses labels that promise what a box is not, and those that
// Gitea would read as something else.
func checkLabels(labels []string) error {
	if len(labels) == 0 {
		return errors.New("labels: none, so that no job would fit: want what runs-on says, for example [linux]")
	}
	errs := []error{providers.CheckLabels(labels, runtime.GOARCH)}
	for i, l := range labels {
		switch {
		case !labelShape.MatchString(l):
			errs = append(errs, fmt.Errorf("labels: %q: want a name of letters, digits, dots, _ and -; what the box is made of is the policy's choice", clip(l)))
		case slices.Contains(labels[:i], l):
			errs = append(errs, fmt.Errorf("labels: %q stands there twice", l))
		}
	}
	return errors.Join(errs...)
}

var labelShape = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$`)

func orDefault[T comparable](v, d T) T {
	var zero T
	if v == zero {
		return d
	}
	return v
}

// jitter spreads a pause by a fifth both ways, so that agents that were started
// together do not ask together.
func jitter(d time.Duration) time.Duration {
	return time.Duration(float64(d) * (0.8 + 0.4*rand.Float64()))
}

// Poll waits until it is time to ask: at once after a task was found, soon after
// a job ended, and then ever less often. It registers the runner first if it is
// not. What it offers is a chance, and Claim finds out. An ask that failed is
// told here.
func (p *Provider) Poll(ctx context.Context) (providers.Offer, error) {
	if err := p.takeFailure(); err != nil {
		return providers.Offer{}, err
	}
	err := p.wait(ctx)
	p.asking.Lock()
	defer p.asking.Unlock()
	if err != nil {
		return providers.Offer{}, errors.Join(err, p.putAway(true))
	}
	if err := p.ready(ctx); err != nil {
		p.rest(err)
		return providers.Offer{}, errors.Join(p.takeFailure(), ctx.Err())
	}
	return providers.Offer{}, nil
}

// wait lasts until the next ask is due. It returns ctx's error if that ends.
func (p *Provider) wait(ctx context.Context) error {
	for ctx.Err() == nil {
		p.mu.Lock()
		wait := time.Until(p.next)
		p.mu.Unlock()
		if wait <= 0 {
			return nil
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-p.woken:
		case <-ctx.Done():
		}
		t.Stop()
	}
	return ctx.Err()
}

func (p *Provider) takeFailure() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	err := p.failed
	p.failed = nil
	return err
}

// rest sets the time of the next ask after one that found nothing, or failed.
func (p *Provider) rest(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	most := p.config.Poll
	if err != nil {
		most = max(most, mostFailing)
		p.failed = fmt.Errorf("gitea %s: %w", p.config.URL, err)
	}
	p.idle = min(max(2*p.idle, quick), most)
	wait := jitter(p.idle)
	if e, ok := errors.AsType[*callError](err); ok {
		wait = max(wait, e.after)
	}
	p.next = time.Now().Add(wait)
}

// busy makes the next ask come after d, for a queue that moves.
func (p *Provider) busy(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.idle = 0
	if next := time.Now().Add(d); p.next.After(next) {
		p.next = next
	}
	select {
	case p.woken <- struct{}{}:
	default: // it is awake
	}
}

// checkName holds the agent to what it promises of its names.
func checkName(name string) error {
	if name == "" || len(name) > 40 || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		return fmt.Errorf("claim %q: the name is not 1 to 40 bytes of a-z, 0-9 and -", clip(name))
	}
	return nil
}

func digest(s creds.Secret) string {
	sum := sha256.Sum256([]byte(s.Reveal()))
	return fmt.Sprintf("%x", sum[:8])
}
