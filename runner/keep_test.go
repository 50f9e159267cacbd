package runner_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox"
)

// keeping makes an agent that keeps boxes of failed jobs for ten minutes.
func (w *world) keeping(most int) *runner.Agent {
	w.t.Helper()
	return w.agent(func(c *runner.Config) {
		p, err := policy.Parse([]byte(policyText+"    keep-on-failure: 10m\n"), "policy.yaml")
		if err != nil {
			w.t.Fatal(err)
		}
		c.Policy, c.Keep, c.Once = p, most, false
	})
}

// serve runs the agent until stop is called, which wants it to end well.
func (w *world) serve(a *runner.Agent) (stop func()) {
	drain, cancel := context.WithCancel(lifetime(w.t))
	done := make(chan error, 1)
	go func() { done <- a.Run(drain, lifetime(w.t)) }()
	return func() {
		w.t.Helper()
		cancel()
		if err := <-done; err != nil {
			w.t.Errorf("run: %v", err)
		}
	}
}

// fail offers a job that fails and returns its name when it was reported.
func (w *world) failing(steps ...providers.Step) (name string, r providers.Result) {
	w.t.Helper()
	if len(steps) == 0 {
		steps = []providers.Step{{Run: "print one\nexit 3"}}
	}
	w.offers <- job(steps...)
	r = <-w.results
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, e := range w.events {
		if e.Action == "job.complete" {
			name = e.Job
		}
	}
	return name, r
}

// boxNames are those of the boxes that exist.
func (w *world) boxNames() (names []string) {
	entries, err := w.boxesLeft()
	if err != nil {
		w.t.Error(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// actions are those of the audit that begin with one of the prefixes.
func (w *world) actions(prefixes ...string) (all []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, e := range w.events {
		if slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(e.Action, p) }) {
			all = append(all, e.Action)
		}
	}
	return all
}

// kept wants exactly these jobs' boxes to exist.
func (w *world) kept(when string, jobs ...string) {
	w.t.Helper()
	var want []string
	for _, j := range jobs {
		want = append(want, j+"-box")
	}
	slices.Sort(want)
	if got := w.boxNames(); !slices.Equal(got, want) {
		w.t.Errorf("%s: got boxes %v, want %v", when, got, want)
	}
}

func TestBoxOfAFailedJobIsKeptForItsTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		stop := w.serve(w.keeping(2))
		began := time.Now()
		name, r := w.failing()
		if r.Conclusion != providers.Failure {
			t.Errorf("got %+v, want a failure", r)
		}
		want := []string{
			"claim", "box.pull", "open", "box.create", "attach", "box.probe", "issue", "box.run", "box.probe", "box.alone",
			"revoke", "probe", "close", "log.close", "complete",
		}
		if got := w.happened(); !slices.Equal(got, want) {
			t.Errorf("order:\n got %v\nwant %v", got, want)
		}
		w.kept("after the report", name)
		says := "mayfly: the box is kept until " + began.Add(10*time.Minute).UTC().Format(time.RFC3339) + ": mayfly shell " + name + "\n"
		if !strings.HasSuffix(w.shown(), says) {
			t.Errorf("log: got %q, want the last line %q", w.shown(), says)
		}
		if len(w.leases)+len(w.gates)+len(w.claims) != 0 {
			t.Errorf("beside the box: got leases %v, gateways %v, claims %v", w.leases, w.gates, w.claims)
		}
		state, err := runner.PeekState(filepath.Join(w.dir, "state"))
		if err != nil {
			t.Fatal(err)
		}
		jobs, err := state.Jobs()
		if err != nil || len(jobs) != 1 || len(jobs[0].Owes) != 1 || !jobs[0].Owes[0].Until.Equal(began.Add(10*time.Minute)) {
			t.Errorf("jobs: got %+v and %v, want one that owes a box until %v", jobs, err, began.Add(10*time.Minute))
		}
		infos, err := w.boxes.List(t.Context())
		if err != nil || len(infos) != 1 || infos[0].Expires.Before(began.Add(20*time.Minute)) {
			t.Errorf("expiry at birth: got %v and %v, want it behind the timeout and the time that it is kept", infos, err)
		}
		// The slot is free: there is one, and another job runs.
		w.offers <- job(providers.Step{Run: "print two"})
		if r := <-w.results; r.Conclusion != providers.Success {
			t.Errorf("next job: got %+v, want success", r)
		}
		time.Sleep(9 * time.Minute) // the reaper goes round
		w.kept("a minute before its time", name)
		time.Sleep(2 * time.Minute)
		w.kept("after its time")
		if got, want := w.actions("box.keep", "box.leave"), []string{"box.keep", "box.leave"}; !slices.Equal(got, want) {
			t.Errorf("audit: got %v, want %v", got, want)
		}
		if got := w.actions("lease.revoke", "box.keep", "job.complete")[:3]; !slices.Equal(got, []string{"lease.revoke", "box.keep", "job.complete"}) {
			t.Errorf("audit: got %v, want the revocation, then the box, then the report", got)
		}
		stop()
		w.clean()
	})
}

func TestOtherBoxesAreNotKept(t *testing.T) {
	t.Parallel()
	for name, steps := range map[string][]providers.Step{
		"success":    {{Run: "print fine"}},
		"tolerated":  {{Run: "exit 3", ContinueOnError: "true"}},
		"cancelled":  {{Run: "block"}},
		"no box yet": {{Run: "exit 3"}},
		"died":       {{Run: "exit 3"}},
		"unreadable": {{Run: "exit 3"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.failWith(func(call, _ string) error {
					if (name == "no box yet" && call == "attach") || (name == "died" && call == "box.alone") || (name == "unreadable" && call == "audit.box.keep") {
						return errors.Join(errDown, sandbox.ErrDied)
					}
					return nil
				})
				stop := w.serve(w.keeping(2))
				if name == "cancelled" {
					time.AfterFunc(time.Second, func() { close(w.cancel) })
				}
				w.offers <- job(steps...)
				if name == "unreadable" { // the record: then it is not reported either
					time.Sleep(20 * time.Minute)
				} else {
					<-w.results
				}
				synctest.Wait()
				w.kept(name)
				if said := strings.Contains(w.shown(), "mayfly: the box is not kept: "); said != (name == "died") {
					t.Errorf("log: got %q", w.shown())
				}
				w.failWith(func(string, string) error { return nil })
				stop()
				w.clean()
			})
		})
	}
}

// The deadline is a failure too, and its box is kept by an agent that keeps any.
func TestKeptAfterTheDeadlineOrNotAtAll(t *testing.T) {
	t.Parallel()
	for _, most := range []int{0, 1} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			stop := w.serve(w.keeping(most))
			name, r := w.failing(providers.Step{Run: "block"})
			if r.Conclusion != providers.TimedOut {
				t.Errorf("got %+v, want timed out", r)
			}
			if most == 0 {
				w.kept("none is kept")
				if !strings.Contains(w.shown(), "mayfly: the box is not kept: this agent keeps none\n") {
					t.Errorf("log: got %q, want that it was not kept", w.shown())
				}
			} else {
				w.kept("one is kept", name)
			}
			stop() // the agent stops: nothing is kept
			w.clean()
		})
	}
}

func TestOldestBoxMakesRoom(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		stop := w.serve(w.keeping(2))
		var names []string
		for range 2 {
			name, _ := w.failing()
			names = append(names, name)
		}
		w.kept("two", names...)
		// The oldest does not go away: the new one is not kept.
		w.failWith(func(call, name string) error {
			if call == "box.destroy" && name == names[0]+"-box" {
				return errDown
			}
			return nil
		})
		w.failing()
		if !strings.Contains(w.shown(), "the box is not kept: 2 boxes are kept, and the oldest, of "+names[0]+", does not go away") {
			t.Errorf("log: got %q, want that it was not kept", w.shown())
		}
		w.kept("the oldest is stuck", names...)
		w.failWith(func(string, string) error { return nil })
		time.Sleep(time.Minute)
		w.kept("it goes when it can", names[1])
		for range 2 {
			name, _ := w.failing()
			names = append(names, name)
		}
		w.kept("two again", names[2], names[3])
		stop()
		w.clean()
	})
}

// A box is not kept beside a credential that lives.
func TestNotKeptBesideALease(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.failWith(func(call, _ string) error {
			if call == "revoke" {
				return errDown
			}
			return nil
		})
		a := w.keeping(2)
		stop := w.serve(a)
		w.offers <- job(providers.Step{Run: "exit 3"})
		time.Sleep(time.Minute)
		names := w.boxNames()
		if len(names) != 1 {
			t.Fatalf("got boxes %v, want the one of the job", names)
		}
		name := strings.TrimSuffix(names[0], "-box")
		if _, err := a.Shell(t.Context(), runner.Shell{Job: name}); !errors.Is(err, runner.ErrNotKept) {
			t.Errorf("shell beside a lease: got %v, want ErrNotKept", err)
		}
		if r := <-w.results; r.Conclusion != providers.Failure {
			t.Errorf("got %+v, want the failure, late", r)
		}
		time.Sleep(time.Minute)
		w.kept("a lease lives")
		if got := w.actions("box.", "release.stuck"); slices.Contains(got, "box.keep") || len(got) == 0 {
			t.Errorf("audit: got %v, want that the release is stuck, and no box kept", got)
		}
		w.failWith(func(string, string) error { return nil })
		time.Sleep(time.Minute)
		stop()
		w.clean()
	})
}

// seen collects what a shell prints.
type seen struct{ strings.Builder }

func (s *seen) output(_ time.Time, b []byte) error { s.Write(b); return nil }

// typing is an input of these lines.
func typing(lines ...string) <-chan []byte {
	in := make(chan []byte, len(lines))
	for _, l := range lines {
		in <- []byte(l)
	}
	return in
}

func TestShell(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.keeping(2)
		stop := w.serve(a)
		j := job(providers.Step{ID: "deploy", Run: "print ${{ secrets.TOKEN }}\nexit 3", Env: providers.Env{Vars: map[string]string{"PLAIN": "p", "TOKEN": "${{ secrets.TOKEN }}"}}})
		j.Secrets = map[string]creds.Secret{"TOKEN": creds.NewSecret("a-token-of-the-provider")}
		w.offers <- j
		<-w.results
		synctest.Wait()
		name := strings.TrimSuffix(w.boxNames()[0], "-box")
		var out seen
		typed := []string{"env PLAIN\n", "env TOKEN\n", "env PGPASSWORD\n", "env DEPLOY_KEY\n", "env GITHUB_REPOSITORY\n", "env TERM\n", "\xff\n", "exit 7\n"}
		exit, err := a.Shell(t.Context(), runner.Shell{
			Job: name, Who: map[string]string{"user": "root", "uid": "0"}, Term: "xterm", Stdin: typing(typed...),
			TTY: &sandbox.TTY{Size: sandbox.Size{Rows: 24, Cols: 80}}, Stdout: out.output,
		})
		if err != nil || exit.Code != 7 || out.String() != "24 80\np\n\n\n\nacme/app\nxterm\n" {
			t.Errorf("got %+v, %v and %q, want code 7 and the environment of the step without secrets", exit, err, out.String())
		}
		w.recorded(name, strings.Join(typed[:6], ""))
		// Again, and what it says of itself is the script of the step, masked.
		out.Reset()
		if _, err := a.Shell(t.Context(), runner.Shell{Job: name, Args: []string{"x"}, Stdout: out.output}); err != nil || out.String() != "***\n" {
			t.Errorf("step again: got %v and %q, want ***", err, out.String())
		}
		for _, other := range []string{"mf-aaaaaaaaaaaaaaaa", "", "../" + name} {
			if _, err := a.Shell(t.Context(), runner.Shell{Job: other}); !errors.Is(err, runner.ErrNotKept) {
				t.Errorf("shell %q: got %v, want ErrNotKept", other, err)
			}
		}
		stop()
		if _, err := a.Shell(t.Context(), runner.Shell{Job: name}); !errors.Is(err, runner.ErrNotKept) {
			t.Errorf("shell after the end: got %v, want ErrNotKept", err)
		}
		w.clean()
	})
}

// recorded wants the audit to have the hash of what was typed, and nobody else
// to be able to read it.
func (w *world) recorded(job, typed string) {
	w.t.Helper()
	files, err := filepath.Glob(filepath.Join(w.dir, "state", "shells", "*-"+job+"-*.jsonl"))
	if err != nil || len(files) != 1 {
		w.t.Fatalf("recordings: got %v and %v, want one", files, err)
	}
	b, err := os.ReadFile(files[0])
	info, serr := os.Stat(files[0])
	if err := errors.Join(err, serr); err != nil || info.Mode().Perm() != 0o600 {
		w.t.Fatalf("recording: got %v with mode %v, want 0600", err, info.Mode())
	}
	for line := range strings.Lines(typed) {
		if !strings.Contains(string(b), strings.TrimSuffix(line, "\n")) {
			w.t.Errorf("recording: got %s, want %q in it", b, line)
		}
	}
	if !strings.Contains(string(b), `"bytes":"/wo="`) {
		w.t.Errorf("recording: got %s, want what is no text too", b)
	}
	sum := sha256.Sum256(b)
	w.mu.Lock()
	defer w.mu.Unlock()
	var actions []string
	for _, e := range w.events {
		if !strings.HasPrefix(e.Action, "box.shell") {
			continue
		}
		actions = append(actions, e.Action)
		if e.Action == "box.shell" && (e.Detail["user"] != "root" || e.Detail["uid"] != "0" || e.Job != job) {
			w.t.Errorf("audit: got %+v, want who opened it", e)
		}
		if e.Action == "box.shell.end" && (e.Detail["sha256"] != hex.EncodeToString(sum[:]) || e.Detail["exit"] != "7") {
			w.t.Errorf("audit: got %+v, want exit 7 and the hash %x", e, sum)
		}
	}
	if want := []string{"box.shell", "box.shell.end"}; !slices.Equal(actions, want) {
		w.t.Errorf("audit: got %v, want %v", actions, want)
	}
}

func TestShellEnds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.keeping(2)
		stop := w.serve(a)
		name, _ := w.failing()
		type ended struct {
			exit sandbox.Exit
			err  error
		}
		open := func(ctx context.Context, sh runner.Shell) <-chan ended {
			done := make(chan ended, 1)
			sh.Job = name
			go func() {
				exit, err := a.Shell(ctx, sh)
				done <- ended{exit, err}
			}()
			synctest.Wait()
			return done
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		first := open(ctx, runner.Shell{Stdin: make(chan []byte)})
		if _, err := a.Shell(t.Context(), runner.Shell{Job: name}); !errors.Is(err, runner.ErrShellOpen) {
			t.Errorf("second shell: got %v, want ErrShellOpen", err)
		}
		gone := errors.New("disconnected")
		cancel(gone)
		if e := <-first; !errors.Is(e.err, gone) {
			t.Errorf("got %+v, want %v", e, gone)
		}
		// What cannot be written down does not reach the box.
		var out seen
		flood := make(chan []byte, 1)
		flood <- make([]byte, 17<<20)
		if e := <-open(t.Context(), runner.Shell{Stdin: flood, Stdout: out.output}); e.err == nil || !strings.Contains(e.err.Error(), "recording: more than") {
			t.Errorf("17 MiB typed: got %+v, want a refusal", e)
		}
		w.failWith(func(call, _ string) error {
			if call == "audit.box.shell" {
				return errDown
			}
			return nil
		})
		if e := <-open(t.Context(), runner.Shell{Stdin: typing("append touched yes\n")}); !errors.Is(e.err, errDown) {
			t.Errorf("without an audit: got %+v, want its error", e)
		}
		w.failWith(func(string, string) error { return nil })
		// The end of the box's time is the end of its shell.
		last := open(t.Context(), runner.Shell{Stdin: make(chan []byte)})
		w.kept("a shell is open", name)
		if e := <-last; e.err == nil || !strings.Contains(e.err.Error(), "not kept any longer") {
			t.Errorf("got %+v, want the end of the time", e)
		}
		synctest.Wait()
		w.kept("after its time")
		stop()
		w.clean()
	})
}

// A box that dies is not kept: there is nothing to look at.
func TestShellInABoxThatDies(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.keeping(2)
		stop := w.serve(a)
		name, _ := w.failing()
		w.failWith(func(call, _ string) error {
			if call == "box.alone" {
				return sandbox.ErrDied
			}
			return nil
		})
		if _, err := a.Shell(t.Context(), runner.Shell{Job: name}); !errors.Is(err, sandbox.ErrDied) {
			t.Errorf("got %v, want ErrDied", err)
		}
		synctest.Wait()
		w.kept("it died")
		if _, err := os.Stat(filepath.Join(w.dir, "state", "shells")); errors.Is(err, fs.ErrNotExist) {
			t.Error("the shell was not recorded")
		}
		stop()
		w.clean()
	})
}
