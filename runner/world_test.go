package runner_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/audit"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/sandboxtest"
)

// A world is everything outside the agent, in memory but for the boxes: it
// remembers what exists, in which order things went, and who was told what.
type world struct {
	probed  func([]sandbox.Outcome) // of each look at a box, to be changed
	t       *testing.T
	dir     string
	boxes   *sandboxtest.Fake
	offers  chan providers.Job
	cancel  chan struct{} // closed: the provider wants the job stopped
	stops   string        // and only those whose last step runs this, if it is set
	results chan providers.Result

	mu     sync.Mutex
	leases map[string]creds.Grant
	gates  map[string]egress.Opening
	claims map[string]providers.Job
	log    strings.Builder
	steps  []providers.StepState
	events []audit.Event
	order  []string
	fail   func(call, name string) error

	// abandons is set by tests that stop an agent while something is owed: then
	// alone a claim may stand that nobody watches.
	abandons bool
	latest   time.Time         // when a lease may end; zero is not looked at
	generous time.Duration     // by which leases outlive their grant
	hang     string            // "put" or "get": then the box's guest does not answer
	deploy   []string          // what lay in the file of the step's lease when each step ran
	files    map[string]string // of the workspace, for actions
	dead     map[string]bool   // boxes, by name
}

const policyText = `version: 1
rules:
  - name: all
    match: {trust: [local]}
    runtime: native
    timeout: 10m
    limits: {log: 1MiB}
    egress:
      - {name: everywhere.example, port: 443, protocol: tls}
      - {name: deploy.example, port: 443, protocol: tls, step: deploy}
    leases:
      - {name: db, issuer: pg, env: {PGPASSWORD: password, PGUSER: username}, files: {db.pass: password}}
      - {name: key, issuer: pg, step: deploy, ttl: 1m, env: {DEPLOY_KEY: password}, files: {deploy.key: password}}
`

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{
		t: t, dir: t.TempDir(), offers: make(chan providers.Job, 100), cancel: make(chan struct{}),
		results: make(chan providers.Result, 100), leases: map[string]creds.Grant{},
		gates: map[string]egress.Opening{}, claims: map[string]providers.Job{},
		fail: func(string, string) error { return nil },
	}
	boxes := filepath.Join(w.dir, "boxes")
	if err := os.Mkdir(boxes, 0o700); err != nil {
		t.Fatal(err)
	}
	w.boxes = &sandboxtest.Fake{Dir: boxes, Fail: func(call, name string) error { return w.note("box."+call, name) }}
	return w
}

// lifetime ends an agent that would retry for ever: in a bubble its clock would
// run on, and nothing would show.
func lifetime(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Hour)
	t.Cleanup(cancel)
	return ctx
}

// note records a call and asks whether it shall fail.
func (w *world) note(call, name string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !strings.HasSuffix(call, ".list") {
		w.order = append(w.order, call)
	}
	return w.fail(call, name)
}

func (w *world) failWith(f func(call, name string) error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fail = f
}

// agent makes one life of the agent in this world.
func (w *world) agent(change func(*runner.Config)) *runner.Agent {
	w.t.Helper()
	state, err := runner.OpenState(filepath.Join(w.dir, "state"))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = state.Close() })
	return w.beside(state, change)
}

// beside makes an agent with a state that it may only be able to read.
func (w *world) beside(state *runner.State, change func(*runner.Config)) *runner.Agent {
	w.t.Helper()
	p, err := policy.Parse([]byte(policyText), "policy.yaml")
	if err != nil {
		w.t.Fatal(err)
	}
	cfg := runner.Config{
		Providers: map[string]providers.Provider{"ci": (*worldProvider)(w)},
		Runtimes:  map[string]sandbox.Runtime{"native": worldRuntime{w.boxes, w}},
		Issuers:   map[string]creds.Issuer{"pg": (*worldIssuer)(w)},
		Gateway:   (*worldGateway)(w), Policy: p, Audit: (*worldAudit)(w),
		Log: zerolog.Nop(), Slots: 1, Once: true,
	}
	if change != nil {
		change(&cfg)
	}
	a, err := runner.New(cfg, state)
	if err != nil {
		w.t.Fatal(err)
	}
	return a
}

// freeState lets the next life of the agent have the state: the one before is
// dead, its descriptor is not.
func (w *world) freeState() {
	w.t.Helper()
	if err := os.Remove(filepath.Join(w.dir, "state", "lock")); err != nil {
		w.t.Fatal(err)
	}
}

// run puts one job of these steps into the world and runs it to its end.
func (w *world) run(ctx context.Context, change func(*runner.Config), steps ...providers.Step) providers.Result {
	w.t.Helper()
	w.offers <- job(steps...)
	a := w.agent(change)
	if err := a.Run(ctx, ctx); err != nil {
		w.t.Errorf("run: %v", err)
	}
	select {
	case r := <-w.results:
		return r
	default:
		w.t.Fatal("the job was never reported")
		return providers.Result{}
	}
}

// clean fails the test if anything of a job is left.
func (w *world) clean() {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	boxes, err := w.boxesLeft()
	wal, werr := filepath.Glob(filepath.Join(w.dir, "state", "jobs", "*"))
	if err != nil || werr != nil || len(boxes)+len(w.leases)+len(w.gates)+len(w.claims)+len(wal) != 0 {
		w.t.Errorf("left over: boxes %v, leases %v, gateways %v, claims %v, journal %v, errors %v %v",
			boxes, w.leases, w.gates, w.claims, wal, err, werr)
	}
}

func (w *world) boxesLeft() ([]os.DirEntry, error) { return os.ReadDir(w.boxes.Dir) }

func (w *world) shown() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.log.String()
}

func (w *world) happened() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.order)
}

func job(steps ...providers.Step) providers.Job {
	for i := range steps {
		if steps[i].ID == "" {
			steps[i].ID = fmt.Sprintf("s%d", i)
		}
	}
	return providers.Job{
		Subject: creds.Subject{Provider: "ci", Repository: "acme/app", Ref: "refs/heads/main", Job: "build"},
		Trust:   providers.TrustLocal, Steps: steps, Contexts: map[string]any{},
	}
}

type worldProvider world

func (p *worldProvider) Poll(ctx context.Context) (providers.Offer, error) {
	w := (*world)(p)
	select {
	case j := <-w.offers:
		w.mu.Lock()
		defer w.mu.Unlock()
		id := fmt.Sprint(len(w.claims))
		w.claims["offer-"+id] = j
		return providers.Offer{ID: id}, nil
	case <-ctx.Done():
		return providers.Offer{}, ctx.Err()
	}
}

func (p *worldProvider) Claim(_ context.Context, name string, o providers.Offer) (providers.Job, error) {
	w := (*world)(p)
	err := w.note("claim", name)
	w.mu.Lock()
	defer w.mu.Unlock()
	j := w.claims["offer-"+o.ID]
	delete(w.claims, "offer-"+o.ID)
	if errors.Is(err, providers.ErrGone) {
		return j, err
	}
	j.Ref = []byte("ref-" + o.ID)
	w.claims[name] = j
	return j, err
}

func (p *worldProvider) Watch(ctx context.Context, name string, _ []byte) error {
	p.mu.Lock()
	cancel := p.cancel
	if j := p.claims[name]; p.stops != "" && (len(j.Steps) == 0 || j.Steps[len(j.Steps)-1].Run != p.stops) {
		cancel = nil
	}
	p.mu.Unlock()
	select {
	case <-cancel:
		return providers.ErrCancelled
	case <-ctx.Done():
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, stands := p.claims[name]; stands && !p.abandons {
		p.t.Errorf("nobody watches %s any more, and its claim stands", name)
	}
	return nil
}

func (p *worldProvider) Complete(_ context.Context, name string, ref []byte, r providers.Result) error {
	w := (*world)(p)
	w.mu.Lock()
	if j, ok := w.claims[name]; ok && !bytes.Equal(ref, j.Ref) {
		w.t.Errorf("complete %s: got ref %q, want what Claim gave, %q", name, ref, j.Ref)
	}
	w.mu.Unlock()
	if err := w.note("complete", name); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, ok := w.claims[name]; ok {
		delete(w.claims, name)
		w.results <- r
	}
	return nil
}

func (p *worldProvider) Log(context.Context, string, []byte) (providers.Log, error) {
	return &worldLog{world: (*world)(p)}, nil
}

// A worldLog shows what is written while it is open.
type worldLog struct {
	*world
	closed bool
}

func (l *worldLog) Write(_ time.Time, _ int, b []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return os.ErrClosed
	}
	l.log.Write(b)
	return nil
}

func (l *worldLog) Step(s providers.StepState) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.steps = append(l.steps, s)
	return nil
}

func (l *worldLog) Close(context.Context) error {
	if l.closed {
		return os.ErrClosed
	}
	l.closed = true
	return l.note("log.close", "")
}

type worldIssuer world

func (i *worldIssuer) Issue(_ context.Context, name string, g creds.Grant) (creds.Lease, error) {
	w := (*world)(i)
	err := w.note("issue", name)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.leases[name] = g // even if it fails: the agent cannot know
	if !w.latest.IsZero() && g.Expires.After(w.latest) {
		w.t.Errorf("%s: asked for until %v, want the end of the job at the latest, %v", name, g.Expires, w.latest)
	}
	return creds.Lease{
		Values: map[string]creds.Secret{"password": creds.NewSecret("pw-" + name)},
		Facts:  map[string]string{"username": "u"}, Handle: []byte("h"), ByName: true, ExpiresAt: g.Expires.Add(w.generous),
	}, err
}

// knows fails the test if the agent forgot what Issue gave it.
func (i *worldIssuer) knows(call, name string, handle []byte) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if g, issued := i.leases[name]; issued && g.Subject.Job != "" && string(handle) != "h" {
		i.t.Errorf("%s %s: got handle %q, want what Issue gave", call, name, handle)
	}
}

func (i *worldIssuer) Revoke(_ context.Context, name string, handle []byte) error {
	w := (*world)(i)
	i.knows("revoke", name, handle)
	if err := w.note("revoke", name); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.leases, name)
	return nil
}

func (i *worldIssuer) Probe(_ context.Context, name string, handle []byte) (creds.Proof, error) {
	w := (*world)(i)
	i.knows("probe", name, handle)
	if err := w.note("probe", name); err != nil {
		return creds.Proof{}, err
	}
	return creds.Proof{At: time.Now(), How: "used it", Refusal: "no"}, nil
}

func (i *worldIssuer) List(context.Context) ([]creds.Info, error) { return nil, errors.ErrUnsupported }

// worldRuntime makes boxes of the fake that can be looked into.
type worldRuntime struct {
	*sandboxtest.Fake
	w *world
}

func (r worldRuntime) Create(ctx context.Context, name string, s sandbox.Spec) (sandbox.Sandbox, error) {
	box, err := r.Fake.Create(ctx, name, s)
	return worldBox{box, r.w, name}, err
}

type worldBox struct {
	sandbox.Sandbox
	w    *world
	name string
}

func (b worldBox) Run(ctx context.Context, p sandbox.Process) (sandbox.Exit, error) {
	if _, err := os.Stat(filepath.Join(b.w.boxes.Dir, b.name)); err != nil {
		return sandbox.Exit{}, fmt.Errorf("%w: somebody destroyed it: %w", sandbox.ErrDied, err)
	}
	key, err := b.Sandbox.Get(ctx, sandbox.Run+"/secrets/deploy.key", 1<<10)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return sandbox.Exit{}, err
	}
	b.w.mu.Lock()
	b.w.deploy = append(b.w.deploy, string(key))
	b.w.mu.Unlock()
	return b.Sandbox.Run(ctx, p)
}

func (b worldBox) Mount(ctx context.Context, mounts []sandbox.Mount) error {
	return b.Sandbox.(sandbox.Mounter).Mount(ctx, mounts)
}

func (b worldBox) Probe(ctx context.Context, attempts []sandbox.Attempt) ([]sandbox.Outcome, error) {
	outcomes, err := b.Sandbox.(sandbox.Prober).Probe(ctx, attempts)
	if err == nil && b.w.probed != nil {
		b.w.probed(outcomes)
	}
	return outcomes, err
}

func (b worldBox) Put(ctx context.Context, dir string, r io.Reader) error {
	if err := b.stuck(ctx, "put"); err != nil {
		return err
	}
	return b.Sandbox.Put(ctx, dir, r)
}

func (b worldBox) Get(ctx context.Context, name string, limit int64) ([]byte, error) {
	if err := b.stuck(ctx, "get"); err != nil {
		return nil, err
	}
	b.w.mu.Lock()
	died := b.w.dead[b.name]
	b.w.mu.Unlock()
	if died {
		return nil, sandbox.ErrDied
	}
	if text, ok := b.w.files[name]; ok {
		return []byte(text), nil
	}
	return b.Sandbox.Get(ctx, name, limit)
}

// stuck does not answer once the first step runs, if that is the test.
func (b worldBox) stuck(ctx context.Context, call string) error {
	b.w.mu.Lock()
	stuck := b.w.hang == call && len(b.w.deploy) > 0
	b.w.mu.Unlock()
	if !stuck {
		return nil
	}
	<-ctx.Done()
	return context.Cause(ctx)
}

type worldGateway world

func (g *worldGateway) Open(_ context.Context, name string, o egress.Opening) error {
	w := (*world)(g)
	if err := w.note("open", name); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.gates[name] = o
	return nil
}

func (g *worldGateway) Attach(_ context.Context, name string, _ egress.Sockets) error {
	return (*world)(g).note("attach", name)
}

func (g *worldGateway) Probe(_ context.Context, name string, _ uint16) error {
	return (*world)(g).note("probe port", name)
}

func (g *worldGateway) Close(_ context.Context, name string) error {
	w := (*world)(g)
	if err := w.note("close", name); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.gates, name)
	return nil
}

type worldAudit world

func (a *worldAudit) Append(_ context.Context, e audit.Event) error {
	w := (*world)(a)
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.fail("audit."+e.Action, e.Object); err != nil {
		return err
	}
	if b, err := json.Marshal(e); err != nil || strings.Contains(string(b), "pw-mf-") {
		w.t.Errorf("the audit shows a secret: %s, %v", b, err)
	}
	w.events = append(w.events, e)
	return nil
}
