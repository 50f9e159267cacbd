package runner_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

const servicesPolicy = `version: 1
rules:
  - name: all
    match: {trust: [local]}
    images: ["docker.io/**"]
    timeout: 10m
    limits: {log: 1MiB, memory: 1GiB}
    egress:
      - {name: everywhere.example, port: 443, protocol: tls}
      - {name: mirror.example, port: 443, protocol: tls, service: db}
`

// serving is a runtime with images, each of which is for the words of its name:
// what stands behind "run" in the test's table.
type serving struct {
	worldRuntime
	programs map[string]string // image → script
	mu       *sync.Mutex
	pulls    *[]sandbox.Pull
	specs    map[string]sandbox.Spec
	last     string // what the first service says when it ends
}

func (s serving) Pull(_ context.Context, p sandbox.Pull) (sandbox.Image, error) {
	if err := s.w.note("pull", p.Image); err != nil {
		return sandbox.Image{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	*s.pulls = append(*s.pulls, p)
	image := sandbox.Image{Ref: "digest-of-" + p.Image, Digest: "sha256:" + p.Image, Env: []string{"OF_IMAGE=yes", "BOTH=image"}}
	if script := s.programs[p.Image]; script != "" {
		image.Entrypoint, image.Cmd = []string{"/bin/sh", "-c"}, []string{script}
	}
	return image, nil
}

func (s serving) Create(ctx context.Context, name string, spec sandbox.Spec) (sandbox.Sandbox, error) {
	s.mu.Lock()
	s.specs[name[len("mf-")+16:]] = spec
	s.mu.Unlock()
	box, err := s.worldRuntime.Create(ctx, name, spec)
	if b, ok := box.(worldBox); ok && s.last != "" && strings.HasSuffix(name, "-s0") {
		return lingering{b, s.last}, err
	}
	return box, err
}

// lingering is a box whose process has something to say when it is told to end.
type lingering struct {
	worldBox
	last string
}

func (b lingering) Run(ctx context.Context, p sandbox.Process) (sandbox.Exit, error) {
	exit, err := b.worldBox.Run(ctx, p)
	if ctx.Err() != nil {
		<-time.After(100 * time.Millisecond) // in which who does not wait goes on
		err = errors.Join(err, p.Stdout(time.Now(), []byte(b.last)))
	}
	return exit, err
}

// served is what a job with services did.
type served struct {
	*world
	result providers.Result
	pulls  []sandbox.Pull
	specs  map[string]sandbox.Spec // by the name without the job's
	opened map[string]egress.Opening
}

// serve runs a job with containers. change may set up the world before.
func serve(t *testing.T, programs map[string]string, change func(*world, *providers.Job), containers ...providers.Container) served {
	t.Helper()
	return serveAnd(t, func(string, egress.Opening) {}, programs, change, containers...)
}

// serveAnd is serve that calls attached when a gateway is.
func serveAnd(t *testing.T, attached func(string, egress.Opening), programs map[string]string, change func(*world, *providers.Job), containers ...providers.Container) served {
	t.Helper()
	w := newWorld(t)
	rules, err := policy.Parse([]byte(servicesPolicy), "policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	out := served{world: w, specs: map[string]sandbox.Spec{}, opened: map[string]egress.Opening{}}
	j := job(providers.Step{Run: "print ran\nenv OF_CONTAINER\nprint ${{ job.services.db.ports['5432'] }} ${{ job.services.db.id != '' }} ${{ job.container.id != '' }}"})
	j.Containers = containers
	j.Secrets = map[string]creds.Secret{"PG": creds.NewSecret("pw-of-the-job")}
	if change != nil {
		change(w, &j)
	}
	w.offers <- j
	var mu sync.Mutex
	a := w.agent(func(c *runner.Config) {
		c.Policy = rules
		c.Runtimes["native"] = serving{worldRuntime{w.boxes, w}, programs, &mu, &out.pulls, out.specs, programs["last words of db"]}
		c.Gateway = remembering{(*worldGateway)(w), &mu, out.opened, attached}
	})
	ctx := lifetime(t)
	if err := a.Run(ctx, ctx); err != nil {
		t.Errorf("run: %v", err)
	}
	out.result = <-w.results
	w.clean()
	return out
}

// remembering is the world's gateway, which forgets what it has closed.
type remembering struct {
	*worldGateway
	mu     *sync.Mutex
	opened map[string]egress.Opening

	attached func(string, egress.Opening)
}

func (r remembering) Attach(ctx context.Context, name string, s egress.Sockets) error {
	r.mu.Lock()
	o := r.opened[name[len("mf-")+16:]]
	r.mu.Unlock()
	r.attached(name, o)
	return r.worldGateway.Attach(ctx, name, s)
}

func (r remembering) Open(ctx context.Context, name string, o egress.Opening) error {
	r.mu.Lock()
	r.opened[name[len("mf-")+16:]] = o
	r.mu.Unlock()
	return r.worldGateway.Open(ctx, name, o)
}

func container(name, image, options string, ports ...string) providers.Container {
	return providers.Container{Name: name, Image: image, Options: options, Ports: ports, Position: "ci.yml:7:7"}
}

// TestServices: each service has a gateway and a box of its own around the
// job's, is ready before the first step, and is gone before the report.
func TestServices(t *testing.T) {
	t.Parallel()
	db := container("DB", "postgres:${{ vars.V }}", "--health-cmd 'print healthy' --memory 64m", "5432")
	db.Env = providers.Env{Vars: map[string]string{"PASSWORD": "${{ secrets.PG }}", "BOTH": "service"}}
	db.Username, db.Password = "me", "${{ secrets.PG }}"
	var destroyed []string
	got := serve(t, map[string]string{
		"docker.io/library/postgres:16":  "print the database starts\nenv PASSWORD\nenv OF_IMAGE\nenv BOTH\nblock",
		"docker.io/library/redis:latest": "print the cache starts\nblock",
	}, func(w *world, j *providers.Job) {
		j.Contexts = map[string]any{"vars": map[string]any{"V": "16"}}
		w.fail = func(call, name string) error { // w.mu is held
			if call == "box.destroy" {
				destroyed = append(destroyed, name[len("mf-")+16:])
			}
			return nil
		}
	}, container("", "build:1", "-e OF_CONTAINER=yes"), db, container("cache", "redis", "", "5432"), container("none", "${{ vars.NONE }}", ""))
	if got.result.Conclusion != providers.Success {
		t.Fatalf("got %+v; log:\n%s", got.result, got.shown())
	}
	// When a service's process begins is nobody's order.
	happened := slices.DeleteFunc(got.happened(), func(call string) bool { return call == "box.run" })
	order := strings.Join(happened, " ")
	want := "claim pull pull pull open box.create attach box.probe open box.create attach box.probe open box.create attach box.probe "
	if !strings.HasPrefix(order, want) {
		t.Errorf("order: got %s, want it to begin with %s", order, want)
	}
	if want := "box.probe box.destroy close box.destroy close box.destroy close log.close complete"; !strings.HasSuffix(order, want) {
		t.Errorf("order: got %s, want it to end with %s", order, want)
	}
	if !slices.Equal(destroyed, []string{"-box", "-s1", "-s0"}) {
		t.Errorf("destroyed: got %v, want the job's box first", destroyed)
	}
	if len(got.pulls) != 3 || got.pulls[1].User != "me" || got.pulls[1].Password.Reveal() != "pw-of-the-job" || got.pulls[0].User+got.pulls[2].User != "" {
		t.Errorf("pulled: got %d with users, want the credentials of the service for its own image alone", len(got.pulls))
	}
	for name, image := range map[string]string{"-box": "docker.io/library/build:1", "-s0": "docker.io/library/postgres:16", "-s1": "docker.io/library/redis:latest"} {
		if got.specs[name].Image != "digest-of-"+image {
			t.Errorf("box %s: made of %q, want what Pull gave for %s", name, got.specs[name].Image, image)
		}
	}
	if m := got.specs["-s0"].Limits.Memory; m != 64<<20 || got.specs["-s1"].Limits.Memory != 1<<30 {
		t.Errorf("memory of the services: got %d and %d, want what the first asks for and the plan's", m, got.specs["-s1"].Limits.Memory)
	}
	got.gateways(t)
	got.log(t)
}

// gateways checks what the job and its services may reach.
func (s served) gateways(t *testing.T) {
	t.Helper()
	show := func(o egress.Opening) string {
		var all []string
		for _, r := range o.Rules.Allow {
			all = append(all, fmt.Sprintf("%s:%d>%.4s", r.Name, r.Port, r.Service[min(len(r.Service), len("mf-")+16):]))
		}
		for _, p := range o.Publish {
			all = append(all, fmt.Sprintf("localhost:%d=%s:%d", p.Port, p.Rule.Name, p.Rule.Port))
		}
		return strings.Join(all, " ")
	}
	for name, want := range map[string]string{
		"-gw":    "db:0>-s0- cache:0>-s1- everywhere.example:443> localhost:5432=db:5432 localhost:61000=cache:5432",
		"-s0-gw": "mirror.example:443>",
		"-s1-gw": "",
	} {
		if got := show(s.opened[name]); got != want {
			t.Errorf("gateway %s: got %q, want %q", name, got, want)
		}
	}
}

// log checks what the job's log shows of the services.
func (s served) log(t *testing.T) {
	t.Helper()
	log := s.shown()
	for _, want := range []string{
		"ran\nyes\n5432 true true\n",
		"::group::service DB\nthe database starts\n***\nyes\nservice\n::endgroup::\n",
		"::group::service cache\nthe cache starts\n::endgroup::\n",
	} {
		if !strings.Contains(log, want) {
			t.Errorf("log: got %q, want %q in it", log, want)
		}
	}
}

// TestServiceTrouble: a service that does not come up ends the job before its
// first step, with what it said, and nothing is left of it.
func TestServiceTrouble(t *testing.T) {
	t.Parallel()
	const pg = "docker.io/library/postgres:16"
	fails := func(what, whose string) func(*world, *providers.Job) {
		return func(w *world, _ *providers.Job) {
			w.fail = func(call, name string) error {
				if call == what && strings.HasSuffix(name, whose) {
					return fmt.Errorf("no %s today", call)
				}
				return nil
			}
		}
	}
	for name, tt := range map[string]struct {
		program, options string
		change           func(*world, *providers.Job)
		image            string
		conclusion       providers.Conclusion
		reason, log      string
	}{
		"dies":           {"print out of luck\nexit 3", "--health-cmd 'exit 1'", nil, "postgres:16", providers.Failure, "service db ended with exit status 3 before it was ready", "out of luck"},
		"never healthy":  {"print busy\nblock", "--health-cmd 'print not yet\nexit 7' --health-interval 1s --health-retries 3", nil, "postgres:16", providers.Failure, "its health check failed 3 times in a row: exit status 7: not yet", "busy"},
		"check hangs":    {"block", "--health-cmd block --health-timeout 2s --health-interval 1s --health-retries 2", nil, "postgres:16", providers.Failure, "2 times in a row: no answer within 2s", ""},
		"no program":     {"", "", nil, "postgres:16", providers.Failure, "names no program", ""},
		"refused image":  {"block", "", nil, "ghcr.io/x/y:1", providers.Refused, `ci.yml:7:7: denied by policy: policy.yaml:3 all: the workflow names the image ghcr.io/x/y:1, which none`, ""},
		"bad options":    {"block", "${{ vars.O }}", func(_ *world, j *providers.Job) { j.Contexts["vars"] = map[string]any{"O": "--privileged"} }, "postgres:16", providers.Failure, "ci.yml:7:7: service db: options: option --privileged is refused", ""},
		"no image there": {"block", "", fails("pull", pg), "postgres:16", providers.Failure, "no pull today", ""},
		"no box":         {"block", "", fails("box.create", "-s0"), "postgres:16", providers.Failure, "no box.create today", ""},
		"leaks": {"print ran", "", func(w *world, _ *providers.Job) {
			w.probed = func(o []sandbox.Outcome) { o[0].Err = nil }
		}, "postgres:16", providers.Failure, "service db: the wall of the box does not hold: tcp 169.254.169.254:80: went through", ""},
		"no gateway": {"block", "", fails("open", "-s0-gw"), "postgres:16", providers.Failure, "no open today", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got := serve(t, map[string]string{pg: tt.program}, tt.change, container("db", tt.image, tt.options))
			if got.result.Conclusion != tt.conclusion || !strings.Contains(got.result.Reason, tt.reason) {
				t.Errorf("got %+v, want %s with %q", got.result, tt.conclusion, tt.reason)
			}
			if log := got.shown(); strings.Contains(log, "ran\n") || !strings.Contains(log, tt.log) {
				t.Errorf("log: got %q, want no step in it, and %q", log, tt.log)
			}
		})
	}
}

// TestServiceImageNeedsRule: without a word of the rule no workflow brings an
// image, and without images in the runtime no rule helps.
func TestServiceImageNeedsRule(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	j := job(providers.Step{Run: "print ran"})
	j.Containers = []providers.Container{container("db", "postgres", "")}
	w.offers <- j
	ctx := lifetime(t)
	if err := w.agent(nil).Run(ctx, ctx); err != nil {
		t.Error(err)
	}
	if r := <-w.results; r.Conclusion != providers.Refused || !strings.Contains(r.Reason, `add images: ["docker.io/library/postgres:latest"]`) {
		t.Errorf("got %+v, want a refusal that says what to add", r)
	}
	w.clean()
}

// TestServiceWithoutHealth: a service without a health check is ready when its
// port answers, and one that never does holds the job up for a minute only.
func TestServiceWithoutHealth(t *testing.T) {
	t.Parallel()
	tries := 0
	late := func(w *world, _ *providers.Job) {
		w.fail = func(call, _ string) error {
			if call != "probe port" {
				return nil
			}
			if tries++; tries < 4 {
				return fmt.Errorf("connection refused")
			}
			return nil
		}
	}
	got := serve(t, map[string]string{"docker.io/library/postgres:16": "block"}, late, container("db", "postgres:16", "", "5432"))
	if got.result.Conclusion != providers.Success || got.made("probe port") != 4 || got.made("box.run") != 2 {
		t.Errorf("got %+v after %v, want the step after the fourth look", got.result, got.happened())
	}
}

// TestServicesEndWithTheJob: whatever ends a job ends its services, within the
// agent's bounds and before the report.
func TestServicesEndWithTheJob(t *testing.T) {
	t.Parallel()
	programs := map[string]string{"docker.io/library/postgres:16": "print up\nblock"}
	cancelled := serve(t, programs, func(w *world, j *providers.Job) {
		j.Steps = []providers.Step{{ID: "a", Run: "block"}, {ID: "b", If: "always()", Run: "print still"}}
		go func() {
			for w.made("box.run") < 2 {
				<-time.After(time.Millisecond)
			}
			close(w.cancel)
		}()
	}, container("db", "postgres:16", ""))
	if r := cancelled.result; r.Conclusion != providers.Cancelled || !strings.Contains(cancelled.shown(), "still\n") || !strings.Contains(cancelled.shown(), "::group::service db\nup\n") {
		t.Errorf("cancelled: got %+v, log %q", r, cancelled.shown())
	}
	late := serve(t, programs, func(_ *world, j *providers.Job) {
		j.Timeout = 5 * time.Second // the service begins before that
		j.Steps[0].Run = "block"
	}, container("db", "postgres:16", ""))
	if r := late.result; r.Conclusion != providers.TimedOut || !strings.Contains(late.shown(), "::group::service db\nup\n") {
		t.Errorf("too late: got %+v, log %q", r, late.shown())
	}
}

// TestServiceLastWords: a service is waited for, so that what it says when it is
// told to end is in the log.
func TestServiceLastWords(t *testing.T) {
	t.Parallel()
	programs := map[string]string{"docker.io/library/postgres:16": "print up\nblock", "last words of db": "shut down\n"}
	got := serve(t, programs, nil, container("db", "postgres:16", ""))
	if r := got.result; r.Conclusion != providers.Success || !strings.Contains(got.shown(), "::group::service db\nup\nshut down\n") {
		t.Errorf("got %+v, log %q, want the last words of the service", r, got.shown())
	}
}
