package runner

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/mask"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner/internal/journal"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// refusalsShown bounds how many different refusals the job's log shows; the
// ledger has them all.
const refusalsShown = 50

// pendingMax is how many lines of the agent's own wait for the end of a line of
// the job's; after that they break it.
const pendingMax = 8

// noticeBytes is how much the agent says of the steps of a job whose log has
// reached its limit, in bytes.
const noticeBytes = 64 << 10

// noticeMark begins every line that the agent adds to a job's log.
const noticeMark = "mayfly: "

// reopened is said where a log goes on after a crash: what the agent had in
// memory only, on its way to the provider, is lost.
const reopened = "the log was opened again here; what the job printed just before may be missing"

// A stream carries what a job prints: through the mask, into the provider's
// log. Everything passes here; what cannot be masked is not sent.
type stream struct {
	mu      sync.Mutex
	log     providers.Log // nil if the provider shows no logs, and once it is closed
	closed  bool
	set     *mask.Set
	fresh   []creds.Secret // to be in the set before the next byte is masked
	out     *mask.Writer
	at      time.Time // of the bytes that are being written
	index   int       // step that they are from
	running int       // step that runs now, counted from 1; 0: none does
	midline bool
	pending []string // lines of the agent's own, for when the job's line ends
	left    int64    // bytes that the plan still allows
	notes   int      // annotations so far
	shown   map[refusal]bool
	err     error // the first failure of the provider's log
}

type refusal struct {
	name string
	port uint16
	rule string

	service string
}

// openLog opens the provider's log of a claimed job. A log that cannot be
// opened is tried again when the job is reported; until then the job's output
// ends the job, because a line must not be lost.
func (l *life) openLog(ctx context.Context) *stream {
	s := &stream{set: mask.New(nil), shown: map[refusal]bool{}}
	if logger, ok := l.provider.(providers.Logger); ok {
		s.log, s.err = logger.Log(ctx, l.log.Job, l.job.Ref)
	}
	s.out = mask.NewWriter(s.send, s.set)
	if err := s.conceal(l.job.Secrets); err != nil {
		s.notice(0, err.Error()+": it will be shown if the job prints it")
	}
	return s
}

// limit bounds what the job may print, in bytes.
func (s *stream) limit(n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.left = n
}

// conceal masks further secrets from now on. The error names those that are too
// short to be masked; the others are.
func (s *stream) conceal(values map[string]creds.Secret) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	add := s.fresh
	s.fresh = nil
	var short error
	for _, name := range slices.Sorted(maps.Keys(values)) {
		if _, err := s.set.With(values[name]); err != nil {
			short = errors.Join(short, fmt.Errorf("mask %s: %w", name, mask.ErrTooShort))
			continue
		}
		add = append(add, values[name])
	}
	set, err := s.set.With(add...)
	s.set = set
	return errors.Join(short, err, s.out.Use(set))
}

// concealNext masks a value from the next byte on. A set is compiled when it is
// used, so that many values in a row cost as much as one.
func (s *stream) concealNext(value creds.Secret) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fresh = append(s.fresh, value)
}

// mask is the set with all that is to be concealed.
func (s *stream) mask() (*mask.Set, error) {
	if len(s.fresh) == 0 {
		return s.set, nil
	}
	set, err := s.set.With(s.fresh...)
	s.set, s.fresh = set, nil
	return set, errors.Join(err, s.out.Use(set))
}

// current is the mask as it is now.
func (s *stream) current() (*mask.Set, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mask()
}

// write takes what a step printed.
func (s *stream) write(at time.Time, step int, b []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.mask(); s.err == nil {
		s.err = err
	}
	return s.add(at, step, b)
}

// writeBefore takes bytes that no value of concealNext stands in.
func (s *stream) writeBefore(at time.Time, step int, b []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.add(at, step, b)
}

func (s *stream) add(at time.Time, step int, b []byte) error {
	if s.err != nil {
		return s.err
	}
	if s.left <= 0 {
		return nil // said once, below
	}
	cut := int64(len(b)) >= s.left
	if cut {
		b = b[:s.left]
	}
	s.left -= int64(len(b))
	s.at, s.index = at, step
	_, err := s.out.Write(b)
	if cut && err == nil {
		err = s.say("the log has reached its limit; what the job prints from here on is dropped (limits.log in the policy)")
	}
	s.err = err
	return err
}

// flush sends what the mask still holds back: at the end of a step nothing can
// follow that would complete a secret.
func (s *stream) flush() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, err := s.mask()
	return errors.Join(s.err, err, s.out.Flush(), s.sayPending())
}

// close sends what is held back and closes the provider's log. It does so once:
// a report that has to be made again finds the log whole, or opens it again. It
// returns false if there is no log to close and never was.
func (s *stream) close(ctx context.Context) (known bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.log == nil {
		return s.closed, nil
	}
	// A line that could not be written has ended the job already and is its
	// reason; here it must not hold the report back for ever.
	_, err = s.mask()
	if err := errors.Join(err, s.out.Flush(), s.sayPending()); s.err == nil {
		s.err = err
	}
	err = s.log.Close(ctx)
	s.log, s.closed = nil, err == nil
	return true, err
}

// notice adds a line of the agent's own. It is masked like everything else. A
// line about a step counts against the job's limit, a line about the job (-1)
// does not: what a job can provoke is bounded, and its end is always told.
func (s *stream) notice(step int, text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.left -= int64(len(text)); step >= 0 && s.left < -noticeBytes {
		return
	}
	s.at, s.index = time.Now(), max(step, 0)
	if err := s.say(text); s.err == nil {
		s.err = err
	}
}

// say goes past the masking writer: what that holds back may be the beginning of
// a secret, and must not be cut off from its end by a line in between.
func (s *stream) say(text string) error {
	set, err := s.mask()
	if err != nil {
		return err
	}
	s.pending = append(s.pending, noticeMark+set.Mask(text)+"\n")
	if s.midline && len(s.pending) <= pendingMax {
		return nil
	}
	return s.sayPending()
}

func (s *stream) sayPending() error {
	lines := s.pending
	s.pending = nil
	for _, line := range lines {
		if s.midline {
			line = "\n" + line
		}
		if err := s.send([]byte(line)); err != nil {
			return err
		}
	}
	return nil
}

// refusal shows a refused attempt to reach something, of the job or of one of
// its services, once, with what would allow it.
func (s *stream) refusal(line egress.Line, service string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := refusal{line.Name + line.Address, line.Port, line.Rule, service}
	if s.shown[key] || len(s.shown) > refusalsShown {
		return
	}
	s.shown[key] = true
	text, rule := fmt.Sprintf("%s: %s", line.Verdict, line.Reason), line.Suggest()
	if line.Verdict == egress.Learned {
		text = "learned: no rule allows this yet"
	}
	if service != "" {
		text = "service " + service + ": " + text
		if inner, ok := strings.CutSuffix(rule, "}"); ok {
			rule = inner + ", service: " + service + "}"
		}
	}
	if len(s.shown) > refusalsShown {
		text = "more attempts were refused: see the ledger (mayfly audit show)"
	} else if rule != "" {
		text += "; a rule that would allow it: " + rule
	}
	s.at = time.Now()
	if err := s.say(text); s.err == nil {
		s.err = err
	}
}

// hide masks a whole string, for what does not go through the stream.
func (s *stream) hide(text string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.hidden(text)
}

func (s *stream) hidden(text string) string {
	set, err := s.mask()
	if s.err == nil {
		s.err = err
	}
	return set.Mask(text)
}

// step tells the provider that a step changed its state.
func (s *stream) step(state providers.StepState) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.running = 0; state.Ended.IsZero() {
		s.running = state.Index + 1
	}
	if s.log == nil {
		return s.err
	}
	return errors.Join(s.err, s.log.Step(state))
}

// now is the index of the step that runs.
func (s *stream) now() (index int, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.running - 1, s.running > 0
}

// send is behind the mask.
func (s *stream) send(b []byte) error {
	if len(b) == 0 {
		return nil
	}
	s.midline = b[len(b)-1] != '\n'
	if s.log != nil {
		if err := s.log.Write(s.at, s.index, b); err != nil {
			return err
		}
	}
	if !s.midline && len(s.pending) > 0 {
		return s.sayPending()
	}
	return nil
}

// closeLog makes the log whole before the result is reported. After a crash
// there is no stream: the log is opened again and told what happened.
func (a *Agent) closeLog(ctx context.Context, p providers.Provider, d journal.Debt, out *stream, r providers.Result) error {
	if out != nil {
		if known, err := out.close(ctx); known {
			return err
		}
	}
	logger, ok := p.(providers.Logger)
	if !ok {
		return nil
	}
	log, err := logger.Log(ctx, d.Name, d.Handle)
	if errors.Is(err, providers.ErrGone) {
		return nil // never claimed, or reported already
	}
	if err != nil {
		return err
	}
	notice := noticeMark + reopened + "\n"
	if r.Reason != "" {
		notice += noticeMark + r.Reason + "\n"
	}
	return errors.Join(log.Write(time.Now(), 0, []byte(notice)), log.Close(ctx))
}
