//go:build failpoint

package runner_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/gitea/fakegitea"
	"github.com/mayfly-ci/mayfly/providers/local"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/audit"
	"github.com/mayfly-ci/mayfly/runner/internal/failpoint"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/sandboxtest"
	"github.com/mayfly-ci/mayfly/test/containerdtest"
	"github.com/mayfly-ci/mayfly/test/dockertest"
)

const crashJob = "crash"

// crashPolicy has every kind of hold: gateway, box, a lease of the job, and
// rules and a lease of one step.
const crashPolicy = `version: 1
rules:
  - name: all
    match: {trust: [local, branch]}
    runtime: native
    timeout: 2m
    limits: {memory: 256MiB, pids: 64, disk: 64MiB, inodes: 8192, log: 1MiB}
    egress:
      - {name: everywhere.example, port: 443, protocol: tls}
      - {name: deploy.example, port: 443, protocol: tls, step: deploy}
    leases:
      - {name: db, issuer: pg, env: {PGPASSWORD: password}}
      - {name: key, issuer: pg, step: deploy, ttl: 1m, files: {key: password}}
`

// crashPull has leases below that whose values the gateway adds, an image, and
// what it is pulled with.
const crashPull = `      - {name: api, issuer: pg, env: {T: password}, broker: [{name: api.example, port: 443, as: bearer, value: password}]}
      - {name: up, issuer: pg, step: deploy, broker: [{name: up.example, port: 443, as: basic, value: password}]}
      - {name: registry, issuer: pg}
    image: registry.example/a/b:1
    pull: registry
`

// The steps are words of the fake runtime and, on the real one, commands.
const crashWorkflow = `on: push
jobs:
  build:
    runs-on: linux
    steps:
      - run: %s one
      - id: deploy
        run: %s two
      - run: %s
`

// A scene is one world of the crash test; it is handed to the agent's process.
type scene struct {
	Kind string
	Warm bool // a box is ready before the job
	Lane int  // scenes of different lanes run at the same time
	Dir  string

	Postgres realPostgres

	Forge  string            // URL of the instance, if the kind is gitea
	forge  *fakegitea.Server // the instance itself, in the test's process
	silent bool              // the kill came before the journal heard of the task
	Server serverLane        // the real one, if the kind is server

	Engine string // address of the lane's daemon

	daemon     *dockertest.Daemon
	containerd *containerdtest.Daemon
}

func newScene(t *testing.T, kind string, lane int) *scene {
	t.Helper()
	kind, warm := strings.CutPrefix(kind, "warm ")
	s := &scene{Kind: kind, Warm: warm, Lane: lane, Dir: filepath.Join(t.TempDir(), "world")}
	if kind == "real" {
		s.Postgres = startPostgres(t)
	}
	if kind == "real" || kind == "server" {
		t.Cleanup(func() { s.removeCgroups(t) })
	}
	switch kind {
	case "docker":
		s.startEngine(t)
	case "containerd":
		s.startContainerd(t)
	}
	return s
}

func (s *scene) spool(parts ...string) string {
	return filepath.Join(append([]string{s.Dir, "spool"}, parts...)...)
}

// prepare makes the world afresh, with one job on offer.
func (s *scene) prepare(t *testing.T) {
	t.Helper()
	say := "print"
	if s.Kind != "fake" && s.Kind != "services" {
		say = "echo"
	}
	repo := filepath.Join(s.Dir, "repo", ".github", "workflows")
	for _, dir := range []string{repo, s.spool("new"), filepath.Join(s.Dir, "boxes"), filepath.Join(s.Dir, "leases"), filepath.Join(s.Dir, "audit")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if s.Kind == "server" {
		return // it has the job
	}
	if out, err := exec.Command("git", "init", "-q", filepath.Join(s.Dir, "repo")).CombinedOutput(); err != nil {
		t.Fatalf("git init: %v: %s", err, out)
	}
	if s.Kind == "gitea" {
		s.startForge(t)
		return
	}
	last := say + " three"
	if s.Kind == "kept" {
		last = "exit 3"
	}
	workflow := fmt.Sprintf(crashWorkflow, say, say, last)
	if s.Kind == "services" {
		workflow += crashServices
	}
	job := fmt.Sprintf(`{"repository": %q, "workflow": ".github/workflows/ci.yml", "event": "push", "worktree": true}`,
		filepath.Join(s.Dir, "repo"))
	err := errors.Join(
		os.WriteFile(filepath.Join(repo, "ci.yml"), []byte(workflow), 0o600),
		os.WriteFile(s.spool("new", crashJob+".json"), []byte(job), 0o600))
	if err != nil {
		t.Fatal(err)
	}
}

func (s *scene) remove(t *testing.T) {
	t.Helper()
	if s.Kind == "gitea" {
		s.stopForge(t)
	}
	if err := os.RemoveAll(s.Dir); err != nil {
		t.Fatal(err)
	}
}

// config is the agent of this world.
func (s *scene) config(state *runner.State) (runner.Config, error) {
	text := crashPolicy
	switch {
	case s.Kind == "fake" && s.Warm:
		text += "    image: registry.example/a/b:1\n" // without a lease, or it would not be warm
	case s.Kind == "fake":
		text += crashPull
	}
	if s.Kind == "kept" {
		text += "    keep-on-failure: 1h\n"
	}
	if s.Kind == "services" {
		text += "    images: [\"docker.io/library/*:*\"]\n"
	}
	p, err := policy.Parse([]byte(text), "policy.yaml")
	if err != nil {
		return runner.Config{}, err
	}
	spool, err := local.New(local.Config{Dir: s.spool(), Trace: failpoint.Here})
	if err != nil {
		return runner.Config{}, err
	}
	record, err := audit.OpenFile(filepath.Join(s.Dir, "audit"), audit.FileOptions{Trace: failpoint.Here})
	if err != nil {
		return runner.Config{}, err
	}
	cfg := runner.Config{
		Providers: map[string]providers.Provider{"local": &counted{spool, s.Dir}},
		Policy:    p, Audit: record, Log: zerolog.Nop(), Slots: 1, Keep: 2, Once: true,
	}
	switch s.Kind {
	case "real":
		return cfg, s.real(&cfg, state)
	case "docker":
		runtime, err := s.dockerRuntime(state.Owner)
		return cfg, s.overEngine(&cfg, runtime, err)
	case "containerd":
		runtime, err := s.containerdRuntime(state.Owner)
		return cfg, s.overEngine(&cfg, runtime, err)
	case "server":
		return cfg, s.realServer(&cfg, state)
	case "gitea":
		forge, err := s.gitea(state)
		if err != nil {
			return cfg, err
		}
		cfg.Providers = map[string]providers.Provider{"gitea": forge}
	}
	cfg.Runtimes = map[string]sandbox.Runtime{"native": &sandboxtest.Fake{Dir: filepath.Join(s.Dir, "boxes"), Trace: failpoint.Here}}
	if s.Kind == "services" {
		cfg.Runtimes["native"] = s.overImages()
	}
	cfg.Issuers = map[string]creds.Issuer{"pg": fileIssuer(filepath.Join(s.Dir, "leases"))}
	cfg.Gateway = noGateway{dir: filepath.Join(s.Dir, "leases")}
	return cfg, nil
}

// left names everything that is still there.
func (s *scene) left() ([]string, error) {
	var left []string
	dirs := []string{filepath.Join(s.Dir, "boxes"), filepath.Join(s.Dir, "leases"), filepath.Join(s.Dir, "state", "jobs"), s.spool("claimed")}
	for _, dir := range dirs {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		for _, e := range entries {
			left = append(left, filepath.Join(filepath.Base(dir), e.Name()))
		}
	}
	var more []string
	var err error
	switch s.Kind {
	case "real":
		more, err = s.realLeft()
	case "docker":
		more, err = s.dockerLeft()
	case "containerd":
		more, err = s.containerdLeft()
	case "server":
		if more, err = s.boxesLeft(); s.Engine != "" {
			more, err = s.dockerLeft()
		}
	}
	return append(left, more...), err
}

// reports counts how often a report of the job took effect.
func (s *scene) reports(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(s.Dir, "reports"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return len(b)
}

// counted is the spool; it notes each report that changed something.
type counted struct {
	*local.Provider
	dir string
}

func (c *counted) Complete(ctx context.Context, name string, ref []byte, r providers.Result) error {
	if r.Conclusion == providers.Failure {
		if err := c.onlyBox(); err != nil {
			return err
		}
	}
	result := filepath.Join(c.dir, "spool", "done", crashJob, "result.json")
	before, _ := os.ReadFile(result)
	if err := c.Provider.Complete(ctx, name, ref, r); err != nil {
		return err
	}
	after, _ := os.ReadFile(result)
	if string(before) == string(after) {
		return nil
	}
	f, err := os.OpenFile(filepath.Join(c.dir, "reports"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString("!")
	return errors.Join(err, f.Close())
}

// onlyBox wants no lease beside a box that is kept.
func (c *counted) onlyBox() error {
	leases, err := os.ReadDir(filepath.Join(c.dir, "leases"))
	if len(leases) > 0 {
		err = errors.Join(err, fmt.Errorf("reported beside %d leases", len(leases)))
	}
	return err
}

// fileIssuer issues leases that are files, named after them.
type fileIssuer string

func (dir fileIssuer) Issue(_ context.Context, name string, g creds.Grant) (creds.Lease, error) {
	failpoint.Here("fake.lease.asked")
	if err := os.WriteFile(filepath.Join(string(dir), name), nil, 0o600); err != nil {
		return creds.Lease{}, err
	}
	failpoint.Here("fake.lease.made")
	return creds.Lease{
		Values: map[string]creds.Secret{"password": creds.NewSecret("pw-" + name)},
		Handle: []byte("handle"), ByName: true, ExpiresAt: g.Expires,
	}, nil
}

func (dir fileIssuer) Revoke(_ context.Context, name string, _ []byte) error {
	failpoint.Here("fake.lease.revoking")
	if err := os.Remove(filepath.Join(string(dir), name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	failpoint.Here("fake.lease.revoked")
	return nil
}

func (dir fileIssuer) Probe(_ context.Context, name string, _ []byte) (creds.Proof, error) {
	if _, err := os.Stat(filepath.Join(string(dir), name)); err == nil {
		return creds.Proof{}, creds.ErrStillValid
	}
	return creds.Proof{At: time.Now(), How: "looked", Refusal: "no such file"}, nil
}

func (fileIssuer) List(context.Context) ([]creds.Info, error) { return nil, errors.ErrUnsupported }

// noGateway lets nothing through and holds nothing: gateways end with the agent.
//
// Rules with a credential are opened and closed while their lease is there.
type noGateway struct{ dir string }

func (g noGateway) Open(_ context.Context, name string, o egress.Opening) error {
	if len(o.Rules.Allow) == 0 || o.Rules.Allow[0].Inject == nil {
		return nil
	}
	_, err := os.Stat(filepath.Join(g.dir, strings.Replace(name, "-i-", "-l-", 1)))
	return err
}

func (noGateway) Authority(string) ([]byte, error)                     { return []byte(authorityText), nil }
func (noGateway) Attach(context.Context, string, egress.Sockets) error { return nil }
func (noGateway) Probe(context.Context, string, uint16) error          { return nil }
func (noGateway) Close(context.Context, string) error                  { return nil }
