package runner

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner/internal/failpoint"
	"github.com/mayfly-ci/mayfly/runner/internal/journal"
	"github.com/mayfly-ci/mayfly/sandbox"
)

// A box of a failed job that its plan keeps is the one thing that outlives its
// job (docs/adr/0012). It is a debt like any other, in the journal and released
// by release; what is here only says that its time has not come. It is kept by
// the life that made it and by no other: the guest ends with the agent.

// A kept is such a box.
type kept struct {
	job    string
	name   string // of the box
	box    sandbox.Sandbox
	env    []string // of the step that failed, without secrets
	until  time.Time
	parted func()        // called when nothing else of the job is left
	free   chan struct{} // closed: its time is over
	why    string        // valid when free is closed
	gone   chan struct{} // closed when the job's log is

	shell chan struct{} // holds a token while a shell is open, and after the end
	ready bool          // the job has been reported, and only the box is left; keptBoxes.mu guards it
	told  bool          // the audit and the job's log have been; of the job's goroutine
}

// keptBoxes are all of them, oldest first. The zero value is none.
type keptBoxes struct {
	mu    sync.Mutex
	boxes []*kept
	shut  bool // the agent is stopping
}

// keep decides whether the box outlives the job. It ends what runs in it, so
// that hostile code does not run on behind the report.
func (l *life) keep(ctx context.Context, r providers.Result, parted func()) *kept {
	s := l.steps
	if s == nil || s.plan.Keep == 0 || (r.Conclusion != providers.Failure && r.Conclusion != providers.TimedOut) {
		return nil
	}
	k := &kept{
		job: l.log.Job, name: l.box(), box: s.box, parted: parted, until: earlier(time.Now().Add(s.plan.Keep), l.expires(s.plan, s.deadline)),
		free: make(chan struct{}), gone: make(chan struct{}), shell: make(chan struct{}, 1),
	}
	ctx, cancel := l.detached(ctx)
	defer cancel()
	err := s.strip(ctx, k)
	if err == nil {
		err = l.kept.admit(ctx, k, l.cfg.Keep)
	}
	if err == nil {
		err = l.log.Keep(k.name, k.until)
	}
	if err != nil {
		l.kept.drop(k)
		l.out.notice(-1, "the box is not kept: "+err.Error())
		return nil
	}
	return k
}

// strip kills every process of the box and takes the agent's secrets out of it.
// What the job wrote stays as it is.
func (s *steps) strip(ctx context.Context, k *kept) error {
	if s.cfg.Keep == 0 {
		return errors.New("this agent keeps none")
	}
	if _, err := s.box.Run(ctx, sandbox.Process{Args: []string{"/bin/true"}, Dir: "/", Alone: true}); err != nil {
		return err
	}
	s.leases.clear() // so that none is in the environment
	step, files := s.failing, map[string]string{"step": ""}
	if step == nil {
		step = &current{frame: s.root, scope: s.scope(s.root, nil)}
	} else if _, sh, script, err := s.process(step); err == nil {
		files[sh.file] = s.out.hide(script)
	}
	for _, l := range s.plan.Leases {
		maps.Copy(files, emptied(l))
	}
	for _, kv := range s.environment(step) {
		if s.out.hide(kv) == kv {
			k.env = append(k.env, kv)
		}
	}
	return s.put(ctx, files)
}

// admit makes room for a box by letting the oldest go, and waits until that is
// gone, so that there are never more than most.
func (b *keptBoxes) admit(ctx context.Context, k *kept, most int) error {
	b.mu.Lock()
	var oldest *kept
	n := 0
	for _, other := range slices.Backward(b.boxes) {
		if !isClosed(other.free) {
			oldest, n = other, n+1
		}
	}
	if b.shut {
		b.mu.Unlock()
		return errors.New("the agent is stopping")
	}
	b.boxes = append(b.boxes, k)
	if n < most {
		b.mu.Unlock()
		return nil
	}
	oldest.release("a newer one needs the room")
	b.mu.Unlock()
	select {
	case <-oldest.gone:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%d boxes are kept, and the oldest, of %s, does not go away", n, oldest.job)
	}
}

// holds reports whether the box of a job is not to be released yet.
func (b *keptBoxes) holds(job string) bool {
	k := b.of(job)
	return k != nil && !isClosed(k.free) && time.Now().Before(k.until)
}

// holdsBox reports that of a box: a job may have others, which nobody keeps.
func (b *keptBoxes) holdsBox(job, name string) bool {
	k := b.of(job)
	return k != nil && k.name == name && b.holds(job)
}

// of is the kept box of a job, or nil.
func (b *keptBoxes) of(job string) *kept {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, k := range b.boxes {
		if k.job == job {
			return k
		}
	}
	return nil
}

// drop forgets a box, which may then be released.
func (b *keptBoxes) drop(k *kept) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.boxes = slices.DeleteFunc(b.boxes, func(other *kept) bool { return other == k })
	k.release("its time is over")
}

// release ends the time of a box. The caller holds keptBoxes.mu.
func (k *kept) release(why string) {
	if !isClosed(k.free) {
		k.why = why
		close(k.free)
	}
}

// leave ends the time of a job's box, and reports whether it had not ended.
func (b *keptBoxes) leave(job, why string) bool {
	held := b.holds(job)
	if k := b.of(job); k != nil {
		b.mu.Lock()
		defer b.mu.Unlock()
		k.release(why)
	}
	return held
}

// close ends the time of every box, now and later.
func (b *keptBoxes) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.shut = true
	for _, k := range b.boxes {
		k.release("the agent stops")
	}
}

// tellKept says, behind everything else of the job and before its report, that
// its box stays.
func (a *Agent) tellKept(ctx context.Context, log *journal.Log, out *stream) error {
	k := a.kept.of(log.Job)
	if k == nil || k.told || !a.kept.holds(log.Job) {
		return nil
	}
	if err := a.audit(ctx, k.job, "box.keep", k.name, nil, "until", stamp(k.until)); err != nil {
		return err
	}
	k.told = true
	out.notice(-1, fmt.Sprintf("the box is kept until %s: mayfly shell %s", k.until.UTC().Format(time.RFC3339), k.job))
	return nil
}

// stay waits until the time of a box is over. Its job holds nothing else by
// then, no slot either.
func (a *Agent) stay(ctx context.Context, k *kept) {
	failpoint.Here("kept")
	k.parted()
	a.kept.mu.Lock()
	k.ready = true
	a.kept.mu.Unlock()
	timer := time.NewTimer(time.Until(k.until))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-k.free:
	case <-ctx.Done():
	}
	a.kept.drop(k)
	k.shell <- struct{}{} // a shell in it is told to end, and does so first
	if err := a.audit(ctx, k.job, "box.leave", k.name, nil, "why", k.why); err != nil {
		a.cfg.Log.Error().Err(err).Str("job", k.job).Msg("kept box") // it goes all the same
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
