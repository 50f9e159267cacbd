package gitea

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/gitea/fakegitea"
)

// Whatever point an agent dies at, the next one ends the job: reported once, or,
// if nobody learnt of the task, left to the server. No registration is wasted.
func TestDeathAtEveryPoint(t *testing.T) {
	t.Parallel()
	for _, ephemeral := range []bool{false, true} {
		points := deaths(t, ephemeral, 0)
		if len(points) < 7 {
			t.Fatalf("points = %q, want those of the registration, the claim, the log and the end", points)
		}
		for n := range points {
			deaths(t, ephemeral, n+1)
		}
	}
}

// deaths kills an agent at the nth point, and lets two more recover. It returns
// the points that were passed.
func deaths(t *testing.T, ephemeral bool, n int) []string {
	t.Helper()
	s := instance(t)
	conf := config(s)
	conf.Ephemeral = ephemeral
	id := s.Submit(simple("echo x"))
	ctx, die := context.WithCancel(t.Context())
	defer die()
	var mu sync.Mutex
	var points []string
	dying := conf
	dying.Trace = func(point string) {
		mu.Lock()
		points = append(points, point)
		dead := len(points) >= n && n > 0
		mu.Unlock()
		if dead {
			die()
			runtime.Goexit()
		}
	}
	var ref []byte // what the journal has
	dead := make(chan struct{})
	go func() {
		defer close(dead)
		ref = aLife(ctx, t, open(t, dying), &ref)
	}()
	<-dead
	mu.Lock()
	defer mu.Unlock()
	if n == 0 {
		green(t, s, id, "one")
		return points
	}
	at := points[n-1]
	for range 2 {
		next := open(t, conf)
		if l, err := next.Log(t.Context(), "c", ref); err == nil {
			if err := l.Close(t.Context()); err != nil {
				t.Errorf("died at %s: Close = %v", at, err)
			}
		} else if !errors.Is(err, providers.ErrGone) {
			t.Errorf("died at %s: Log = %v", at, err)
		}
		if err := next.Complete(t.Context(), "c", ref, providers.Result{Conclusion: providers.Lost}); err != nil {
			t.Errorf("died at %s: Complete = %v", at, err)
		}
	}
	task := s.Task(id)
	switch {
	case task.Assigned && ref == nil:
		if at != "gitea.fetched" || task.Finals != 0 {
			t.Errorf("died at %s: the task is assigned and %d times reported", at, task.Finals)
		}
	case task.Assigned:
		want := fakegitea.Failure
		if at == "gitea.reported" {
			want = fakegitea.Success
		}
		if task.Finals != 1 || task.Status != want || !task.Sealed {
			t.Errorf("died at %s: %s, %d times reported, sealed %v; want one %s", at, task.Status, task.Finals, task.Sealed, want)
		}
	}
	// The next one works, with the same registration if there can be one.
	next := open(t, conf)
	if task.Assigned {
		id = s.Submit(simple("echo x"))
	}
	job, _, err := take(t, next, "d")
	if err != nil {
		t.Fatalf("died at %s: the next job: %v", at, err)
	}
	live(t, next, "d", job, "y")
	green(t, s, id, "y")
	if got := len(s.Runners()); got > 2 || got > 1 && !ephemeral && at != "gitea.registered" {
		t.Errorf("died at %s: %d registrations", at, got)
	}
	return points
}

// aLife is a job, as far as ctx lets it. What the journal would have stands in
// ref as soon as it has it.
func aLife(ctx context.Context, t *testing.T, p *Provider, ref *[]byte) []byte {
	o, err := p.Poll(ctx)
	if err != nil {
		t.Errorf("Poll = %v", err)
		return nil
	}
	job, err := p.Claim(ctx, "c", o)
	if err != nil {
		t.Errorf("Claim = %v", err)
		return nil
	}
	*ref = job.Ref
	l, err := p.Log(ctx, "c", job.Ref)
	if err == nil {
		err = errors.Join(l.Step(providers.StepState{Started: time.Now()}), l.Write(time.Now(), 0, []byte("one\n")),
			l.Step(providers.StepState{Started: time.Now(), Ended: time.Now(), Conclusion: providers.Success}), l.Close(ctx))
	}
	if ctx.Err() != nil {
		runtime.Goexit() // it died in another goroutine
	}
	if err = errors.Join(err, p.Complete(ctx, "c", job.Ref, providers.Result{Conclusion: providers.Success, Outputs: map[string]string{"k": "v"}})); err != nil {
		t.Errorf("a life: %v", err)
	}
	return job.Ref
}

func TestRegistration(t *testing.T) {
	t.Parallel()
	s := instance(t)
	c := config(s)
	token := fakegitea.RegistrationToken
	asked := 0
	c.Token = func() (creds.Secret, error) { asked++; return creds.NewSecret(token), nil }
	ready := func() error { _, err := open(t, c).Poll(t.Context()); return err }
	for range 3 {
		if err := ready(); err != nil {
			t.Fatal(err)
		}
	}
	c.Labels = []string{"linux", "ubuntu-latest"}
	if err := ready(); err != nil {
		t.Fatal(err)
	}
	rs := s.Runners()
	if len(rs) != 1 || asked != 1 || rs[0].Declared != 4 || len(rs[0].Labels) != 2 || !rs[0].Cancelling || rs[0].Name != "agent" || rs[0].Version != "mayfly/dev" {
		t.Errorf("runners = %+v, the token was read %d times; want one that declares itself at each start", rs, asked)
	}
	// Deleted by hand: it does not come back by itself, only with a new token.
	s.DeleteRunners()
	p := open(t, c)
	for range 2 {
		if _, err := p.Poll(t.Context()); err == nil || !strings.Contains(err.Error(), "does not know this runner") {
			t.Errorf("Poll of a deleted runner = %v", err)
		}
	}
	if _, err := p.Poll(t.Context()); err == nil || !strings.Contains(err.Error(), "new registration token") {
		t.Errorf("Poll of a deleted runner = %v, want to be told what to do", err)
	}
	if _, err := p.Check(t.Context()); err == nil {
		t.Error("Check of a deleted runner = nil")
	}
	token += "-new"
	if _, err := p.Poll(t.Context()); err != nil {
		t.Errorf("Poll with a new token = %v", err)
	}
	if said, err := p.Check(t.Context()); err != nil || !strings.Contains(said, `registered as "agent"`) {
		t.Errorf("Check = %q, %v", said, err)
	}
	// Another instance, another registration; and a token that is none.
	other := instance(t)
	c.URL, token = other.URL(), "wrong"
	if err := ready(); err == nil || !strings.Contains(err.Error(), "Register: unknown: runner registration token not found") || strings.Contains(err.Error(), "wrong") {
		t.Errorf("Poll with a wrong token = %v", err)
	}
	if said, err := open(t, c).Check(t.Context()); err != nil || !strings.Contains(said, "will register") || len(other.Runners()) != 0 {
		t.Errorf("Check before the registration = %q, %v; it registers nothing", said, err)
	}
}

// An ephemeral registration is used for one job, and kept by an agent that stops
// before it had one.
func TestEphemeral(t *testing.T) {
	t.Parallel()
	s := instance(t)
	c := config(s)
	c.Ephemeral = true
	for range 3 { // lives without a job
		p := open(t, c)
		if _, err := p.Poll(t.Context()); err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		stop()
		if _, err := p.Poll(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("Poll when the agent stops = %v", err)
		}
	}
	if n := len(s.Runners()); n != 1 {
		t.Errorf("%d registrations of three agents that stopped, want one", n)
	}
	p := open(t, c)
	for i := range 3 { // held at the same time
		name := fmt.Sprint("c-", i)
		job, id := claimed(t, s, p, name, simple("x"))
		defer func() {
			live(t, p, name, job, "x")
			green(t, s, id, "x")
			if r := s.Runners()[i]; !r.Deleted || !r.Ephemeral {
				t.Errorf("after its job: %+v, want it to be gone", r)
			}
		}()
	}
}

func TestCancelledByTheServer(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		do   func(s *fakegitea.Server, id int64)
		want string // the task's end
	}{
		"cancel":          {func(s *fakegitea.Server, id int64) { s.Cancel(id) }, fakegitea.Cancelled},
		"zombie":          {func(s *fakegitea.Server, id int64) { s.End(id, fakegitea.Failure) }, fakegitea.Failure},
		"task deleted":    {func(s *fakegitea.Server, id int64) { s.Delete(id) }, "running"},
		"runner deleted":  {func(s *fakegitea.Server, _ int64) { s.DeleteRunners() }, "running"},
		"while it is out": {func(s *fakegitea.Server, id int64) { s.Fail("UpdateTask", fakegitea.Fault{Status: 500}); s.Cancel(id) }, fakegitea.Cancelled},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := instance(t)
			p := open(t, config(s))
			job, id := claimed(t, s, p, "c", simple("x"))
			l := logOf(t, p, "c", job.Ref)
			ctx, stop := context.WithTimeout(t.Context(), patience)
			defer stop()
			told := make(chan error, 1)
			go func() { told <- p.Watch(ctx, "c", job.Ref) }()
			eventually(t, "the heart beats", func() bool { return s.Task(id).Beats > 0 })
			c.do(s, id)
			if err := <-told; !errors.Is(err, providers.ErrCancelled) {
				t.Fatalf("Watch = %v, want ErrCancelled", err)
			}
			// What runs after it may speak, and the end is reported once at most.
			go func() { told <- p.Watch(ctx, "c", job.Ref) }()
			err := errors.Join(l.Write(time.Now(), 0, []byte("post\n")), l.Close(ctx),
				p.Complete(ctx, "c", job.Ref, providers.Result{Conclusion: providers.Cancelled}))
			if err != nil {
				t.Errorf("the end = %v, want nil", err)
			}
			stop()
			if err := <-told; err != nil {
				t.Errorf("Watch during the cleanup = %v, want nil at its end", err)
			}
			task := s.Task(id)
			if task.Status != c.want && task.Status+"" != c.want {
				t.Errorf("the task is %s, want %s", task.Status, c.want)
			}
			if finals := map[string]int{fakegitea.Cancelled: 1}[c.want]; task.Finals != finals || (finals == 1) != (len(task.Rows) == 1) {
				t.Errorf("%d final states, rows %q", task.Finals, task.Rows)
			}
		})
	}
}

// The heart stops with the report, which the server must not take for its own
// decision.
func TestNoBeatAfterTheReport(t *testing.T) {
	t.Parallel()
	s := instance(t)
	p := open(t, config(s))
	job, id := claimed(t, s, p, "c", simple("x"))
	ctx, stop := context.WithCancel(t.Context())
	told := make(chan error, 1)
	go func() { told <- p.Watch(ctx, "c", job.Ref) }()
	eventually(t, "the heart beats", func() bool { return s.Task(id).Beats > 0 })
	live(t, p, "c", job, "x")
	beats := s.Calls("UpdateTask")
	moment := time.NewTimer(3 * heartbeat / 2) // for what must not happen
	defer moment.Stop()
	select {
	case err := <-told:
		t.Errorf("Watch = %v after the report, want it to last", err)
	case <-moment.C:
		stop()
		if err := <-told; err != nil || s.Calls("UpdateTask") != beats {
			t.Errorf("Watch = %v, %d calls after the report", err, s.Calls("UpdateTask")-beats)
		}
	}
	stop()
	green(t, s, id, "x")
}

func TestOutputs(t *testing.T) {
	t.Parallel()
	s := instance(t)
	p := open(t, config(s))
	job, id := claimed(t, s, p, "c", simple("x"))
	s.DropOutputs(3)
	outputs := map[string]string{"a": "1", "b": "", "c\xff": "\xfe", strings.Repeat("k", 256): "x", "big": strings.Repeat("v", maxOutputValue+1)}
	for i := range 6 {
		outputs[fmt.Sprint("m", i)] = strings.Repeat("v", maxOutputValue)
	}
	if err := p.Complete(t.Context(), "c", job.Ref, providers.Result{Conclusion: providers.Success, Outputs: outputs}); err != nil {
		t.Fatal(err)
	}
	task := s.Task(id)
	if len(task.Outputs) != 9 || task.Outputs["a"] != "1" || task.Outputs["c\ufffd"] != "\ufffd" || len(task.Outputs["m5"]) != maxOutputValue {
		t.Errorf("%d outputs arrived: %.100v", len(task.Outputs), task.Outputs)
	}
	if got := text(task.Rows); !strings.Contains(got, `output "big" is not kept`) || !strings.Contains(got, "output \"kkk") || !task.SealedAtEnd {
		t.Errorf("the log says %q of those that do not fit", got)
	}
	// Some that are never stored do not hold up the end.
	job, id = claimed(t, s, p, "d", simple("x"))
	s.DropOutputs(1 << 20)
	if err := p.Complete(t.Context(), "d", job.Ref, providers.Result{Conclusion: providers.Success, Outputs: map[string]string{"a": "1"}}); err != nil || s.Task(id).Status != fakegitea.Success {
		t.Errorf("Complete = %v, the task is %s", err, s.Task(id).Status)
	}
}

// Asks come quickly after something happened, ever less often when nothing does,
// and not before the server wants them.
func TestCadence(t *testing.T) {
	t.Parallel()
	p := open(t, Config{URL: "https://gitea.test", Labels: []string{"linux"}, Store: &memory{}})
	pause := func() time.Duration { return time.Until(p.next) }
	within := func(what string, want time.Duration) {
		t.Helper()
		if got := pause(); got > want*6/5 || got < want*4/5-time.Second {
			t.Errorf("%s: the next ask in %s, want about %s", what, got, want)
		}
	}
	for _, want := range []time.Duration{quick, 2 * quick, 4 * quick, 8 * quick, defaultPoll, defaultPoll} {
		p.rest(nil)
		within("idle", want)
	}
	p.busy(quick)
	within("after a job", quick)
	p.busy(0)
	within("after a task", 0)
	p.rest(&callError{method: "FetchTask", err: errors.New("busy"), after: 2 * time.Minute})
	within("Retry-After", 2*time.Minute)
	for range 20 {
		p.rest(errors.New("down"))
	}
	within("after many failures", mostFailing)
	if retryAfter("120") != 2*time.Minute || retryAfter("99999999") != maxRetryAfter || retryAfter("-1") != 0 || retryAfter("Wed, 21 Oct 2026 07:28:00 GMT") != 0 {
		t.Error("Retry-After is misread")
	}
}
