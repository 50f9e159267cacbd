package gitea

import (
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/gitea/fakegitea"
)

// live is a job from the claim to the report, as the agent does it.
func live(t *testing.T, p *Provider, name string, job providers.Job, lines ...string) {
	t.Helper()
	ctx := t.Context()
	l := logOf(t, p, name, job.Ref)
	start := time.Now()
	err := l.Step(providers.StepState{Started: start})
	for _, line := range lines {
		err = errors.Join(err, l.Write(time.Now(), 0, []byte(line+"\n")))
	}
	err = errors.Join(err, l.Step(providers.StepState{Started: start, Ended: time.Now(), Conclusion: providers.Success}), l.Close(ctx),
		p.Complete(ctx, name, job.Ref, providers.Result{Conclusion: providers.Success, Outputs: map[string]string{"k": "v"}}))
	if err != nil {
		t.Errorf("the life of the job: %v", err)
	}
}

// green fails the test unless the task ended as live made it end.
func green(t *testing.T, s *fakegitea.Server, id int64, lines ...string) {
	t.Helper()
	task := s.Task(id)
	if task.Status != fakegitea.Success || task.Finals != 1 || task.Outputs["k"] != "v" || !slices.Equal(task.Rows, lines) {
		t.Errorf("task %d is %s, %d times final, outputs %v, rows %q; want a success with %q", id, task.Status, task.Finals, task.Outputs, task.Rows, lines)
	}
	if !task.SealedAtEnd || task.RowsAtEnd != len(lines) || task.Steps[0].Status != fakegitea.Success {
		t.Errorf("task %d: sealed %v with %d rows when the end came, step %+v", id, task.SealedAtEnd, task.RowsAtEnd, task.Steps[0])
	}
}

// Whatever goes wrong with a call, the job ends green and whole, once.
func TestFaultsAreRetried(t *testing.T) {
	t.Parallel()
	faults := map[string]fakegitea.Fault{
		"500": {Status: 500}, "502": {Status: 502}, "429": {Status: 429, RetryAfter: 1}, "internal": {Message: "rpc error: code = Internal desc = database is locked"},
		"garbage": {Garbage: true}, "hang": {Hang: true}, "cut": {Cut: true}, "lost": {Lost: true}, "huge": {Huge: true},
	}
	for name, fault := range faults {
		for _, method := range []string{"Register", "Declare", "UpdateTask", "UpdateLog"} {
			t.Run(name+"/"+method, func(t *testing.T) {
				t.Parallel()
				s := instance(t)
				c := config(s)
				if fault.Hang {
					c.Timeout = 2 * time.Second // of the calls that do not hang, too
				}
				s.Fail(method, fault, fault)
				p := open(t, c)
				id := s.Submit(simple("echo x"))
				job, told, err := take(t, p, "c")
				if err != nil {
					t.Fatal(err)
				}
				if asked := method == "Register" || method == "Declare"; asked != (told != nil) || asked && !strings.Contains(told.Error(), method+": ") {
					t.Errorf("Poll told %v; want the failure of %s if it was one of asking", told, method)
				}
				live(t, p, "c", job, "one", "two")
				green(t, s, id, "one", "two")
			})
		}
	}
}

// A failed ask takes nothing that is known: Claim says ErrGone, Poll says why,
// and the next ask finds the job. What was assigned in an answer that is broken
// is refused; if not even the number arrived, the server's timeout ends it.
func TestFaultsOfFetchTask(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		fault fakegitea.Fault
		told  string // by Poll
		bad   string // of the job
		lost  bool
	}{
		"500":          {fault: fakegitea.Fault{Status: 500}, told: "FetchTask: HTTP 500"},
		"429":          {fault: fakegitea.Fault{Status: 429, RetryAfter: 1}, told: "HTTP 429"},
		"garbage":      {fault: fakegitea.Fault{Garbage: true}, told: "not understood"},
		"hang":         {fault: fakegitea.Fault{Hang: true}, told: "deadline exceeded"},
		"internal":     {fault: fakegitea.Fault{Message: "rpc error: code = Internal desc = pick\n\x1b[31mtask"}, told: "Internal: pick  [31mtask"},
		"cut":          {fault: fakegitea.Fault{Cut: true}, bad: "task 1: FetchTask: the answer was cut off"},
		"huge":         {fault: fakegitea.Fault{Huge: true}, bad: "task 1: FetchTask: the answer has more than 16777216 bytes"},
		"lost":         {fault: fakegitea.Fault{Lost: true}, told: "EOF", lost: true},
		"unregistered": {fault: fakegitea.Fault{Message: "rpc error: code = Unauthenticated desc = unregistered runner"}, told: "does not know this runner"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := instance(t)
			conf := config(s)
			if c.fault.Hang {
				conf.Timeout = 2 * time.Second
			}
			s.Fail("FetchTask", c.fault)
			if name == "unregistered" {
				conf.Ephemeral = true // registers again without being told to
			}
			p := open(t, conf)
			first, second := s.Submit(simple("echo x")), s.Submit(simple("echo y"))
			job, told, err := take(t, p, "c")
			if c.bad != "" {
				if !errors.Is(err, providers.ErrBadJob) || !strings.Contains(err.Error(), c.bad) || len(job.Ref) == 0 {
					t.Fatalf("Claim = %v, want ErrBadJob with %q", err, c.bad)
				}
				if err := p.Complete(t.Context(), "c", job.Ref, providers.Result{Conclusion: providers.Failure}); err != nil {
					t.Error(err)
				}
				if task := s.Task(first); task.Status != fakegitea.Failure {
					t.Errorf("the task that cannot be run is %s, want a failure", task.Status)
				}
				return
			}
			if err != nil || told == nil || !strings.Contains(told.Error(), c.told) || strings.ContainsRune(told.Error(), '\x1b') {
				t.Fatalf("Claim = %v, Poll told %v; want the job, and to be told of %q", err, told, c.told)
			}
			id := first
			if c.lost {
				id = second
			}
			live(t, p, "c", job, "x")
			green(t, s, id, "x")
		})
	}
}

// Names that lead elsewhere, and text that is more than a name, do not get into
// a job.
func TestHostileContext(t *testing.T) {
	t.Parallel()
	s := instance(t)
	p := open(t, config(s))
	good := map[string]any{"repository": "acme/app.go"}
	for i, c := range []struct {
		context map[string]any
		want    string
	}{
		{good, ""},
		{map[string]any{"repository": "acme/../evil"}, "repository"},
		{map[string]any{"repository": "../etc"}, "repository"},
		{map[string]any{"repository": "acme/.."}, "repository"},
		{map[string]any{"repository": "acme/app/more"}, "repository"},
		{map[string]any{"repository": "acme\x00/app"}, "repository: it has control"},
		{map[string]any{"repository": 5}, "repository"},
		{map[string]any{"workflow": "../../../etc/passwd"}, "workflow"},
		{map[string]any{"workflow": "a/b.yml"}, "workflow"},
		{map[string]any{"workflow": ""}, "workflow"},
		{map[string]any{"sha": "--upload-pack=x"}, "sha"},
		{map[string]any{"ref": "main"}, "ref"},
		{map[string]any{"ref": "refs/heads/../../x"}, "ref"},
		{map[string]any{"ref": "refs/heads/a\nb"}, "ref: it has control"},
		{map[string]any{"actor": strings.Repeat("x", 5000)}, "actor: it has control"},
		{map[string]any{"a\x1b[2Jb": "\x1b"}, "a [2Jb: it has control"},
		{map[string]any{"server_url": "file:///etc/passwd"}, "server_url"},
		{map[string]any{"server_url": "https://user:pass@host/"}, "server_url"},
	} {
		j := simple("echo x")
		j.Context = c.context
		name := fmt.Sprintf("c-%d", i)
		id := s.Submit(j)
		job, _, err := take(t, p, name)
		if c.want == "" {
			if err != nil {
				t.Errorf("%v: Claim = %v, want the job", c.context, err)
			}
		} else if !errors.Is(err, providers.ErrBadJob) || !strings.Contains(err.Error(), c.want) || strings.ContainsAny(err.Error(), "\x00\x1b") {
			t.Errorf("%v: Claim = %q, want ErrBadJob with %q", c.context, err, c.want)
		}
		if err := p.Complete(t.Context(), name, job.Ref, providers.Result{Conclusion: providers.Failure}); err != nil {
			t.Errorf("%v: Complete = %v", c.context, err)
		}
		if task := s.Task(id); task.Status != fakegitea.Failure {
			t.Errorf("%v: the task is %s, want it to be reported", c.context, task.Status)
		}
	}
}

// What names are made of text of strangers stays text: a branch is no template.
func TestNamesAreNoTemplates(t *testing.T) {
	t.Parallel()
	s := instance(t)
	p := open(t, config(s))
	j := simple("echo x")
	evil := "${{ secrets.GITEA_TOKEN }}"
	j.Context = map[string]any{"head_ref": evil, "ref_name": evil, "actor": evil, "server_url": "https://gitea.test/" + evil, "run_id": evil}
	job, _ := claimed(t, s, p, "c", j)
	for k, v := range job.Env.Vars {
		if strings.Contains(v, evil) {
			t.Errorf("env %s is the template %q", k, v)
		}
	}
	if job.Env.Vars["GITHUB_HEAD_REF"] != "${{ github.head_ref }}" || job.Env.Vars["GITHUB_SERVER_URL"] != "${{ github.server_url }}" {
		t.Errorf("env = %v, want templates that name the context", job.Env.Vars)
	}
}

func TestTaskTwice(t *testing.T) {
	t.Parallel()
	s := instance(t)
	p := open(t, config(s))
	job, id := claimed(t, s, p, "c-1", simple("echo x"))
	for _, when := range []string{"while it runs", "after it ended"} {
		s.AssignAgain(id)
		_, err := p.Poll(t.Context())
		if err == nil {
			_, err = p.Claim(t.Context(), "c-2", providers.Offer{})
		}
		_, told := p.Poll(t.Context())
		if !errors.Is(err, providers.ErrGone) || told == nil || !strings.Contains(told.Error(), "assigned task 1 again") {
			t.Errorf("%s: Claim = %v, Poll told %v; want ErrGone, and why", when, err, told)
		}
		if when == "while it runs" {
			live(t, p, "c-1", job, "x")
		}
	}
	green(t, s, id, "x")
	// An agent that was started again knows the tasks that it recovers.
	q := open(t, config(s))
	c2, id2 := claimed(t, s, q, "c-3", simple("echo y"))
	r := open(t, q.config)
	if _, err := r.find("c-3", c2.Ref); err != nil {
		t.Fatal(err)
	}
	s.AssignAgain(id2)
	if _, err := r.Claim(t.Context(), "c-4", providers.Offer{}); !errors.Is(err, providers.ErrGone) {
		t.Errorf("after a restart: Claim = %v, want ErrGone", err)
	}
}

func TestHostileNames(t *testing.T) {
	t.Parallel()
	s := instance(t)
	p := open(t, config(s))
	for _, name := range []string{"", "..", "../x", "A", "a/b", "a.b", strings.Repeat("a", 41), "a\x00"} {
		_, cerr := p.Claim(t.Context(), name, providers.Offer{})
		_, lerr := p.Log(t.Context(), name, nil)
		for call, err := range map[string]error{
			"Claim": cerr, "Log": lerr, "Watch": p.Watch(t.Context(), name, nil), "Complete": p.Complete(t.Context(), name, nil, providers.Result{}),
		} {
			if err == nil || errors.Is(err, providers.ErrGone) {
				t.Errorf("%s with the name %q = %v, want it to be refused", call, name, err)
			}
		}
	}
	if n := s.Calls("FetchTask"); n > 0 {
		t.Errorf("the server was asked %d times", n)
	}
	for _, ref := range []string{"{", `{"task":"-1"}`, `{"task":"x"}`} {
		if err := p.Complete(t.Context(), "c", []byte(ref), providers.Result{}); err != nil {
			t.Errorf("Complete with the damaged reference %q = %v, want nil: there is nothing to be told", ref, err)
		}
	}
}

// The runner's token goes to the configured instance and nowhere else.
func TestRedirectIsNotFollowed(t *testing.T) {
	t.Parallel()
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		t.Errorf("the redirect was followed, with %v", slices.Sorted(maps.Keys(r.Header)))
	}))
	defer other.Close()
	here := httptest.NewServer(http.RedirectHandler(other.URL, http.StatusTemporaryRedirect))
	defer here.Close()
	p := open(t, Config{URL: here.URL, Labels: []string{"linux"}, Store: &memory{}, Token: func() (creds.Secret, error) { return creds.NewSecret("x"), nil }})
	if _, err := p.Poll(t.Context()); err == nil || !strings.Contains(err.Error(), "redirected to \""+other.URL) {
		t.Errorf("Poll = %v, want to be told of the redirect", err)
	}
}
