// Package gitea_test runs jobs of a real Gitea on the real agent, in each
// runtime: what the server is told, what it shows, and what is left.
package gitea_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/test/agenttest"
	"github.com/mayfly-ci/mayfly/test/dockertest"
	"github.com/mayfly-ci/mayfly/test/giteatest"
)

func TestMain(m *testing.M) {
	if err := errors.Join(giteatest.Prepare(), dockertest.Prepare()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	agenttest.Main(m)
}

// bound is for anything that takes seconds on a quiet machine.
const bound = 3 * time.Minute

// An engine is a runtime that the tests run on.
type engine struct {
	name    string
	sandbox func(*testing.T) string // its lines of agent.yaml
}

func engines() []engine {
	return []engine{
		{"native", func(*testing.T) string { return "" }},
		{"docker", func(t *testing.T) string {
			return fmt.Sprintf("  docker: {image: %q, host: %q}\n", dockertest.Debian, dockertest.Start(t).Host())
		}},
	}
}

// TestGitea runs everything once for each runtime.
func TestGitea(t *testing.T) {
	for _, e := range engines() {
		t.Run(e.name, func(t *testing.T) {
			s := open(t, e)
			t.Run("jobs", func(t *testing.T) { jobs(t, s.install(t, "mayfly", "")) })
			t.Run("ephemeral", func(t *testing.T) { ephemeral(t, s.install(t, "once", ", ephemeral: true")) })
			t.Run("large", func(t *testing.T) { large(t, s.install(t, "large", "")) })
			t.Run("killed", func(t *testing.T) { killed(t, s.install(t, "mortal", "")) })
		})
	}
}

// policy lets jobs of two repositories reach something: the server, and a canary.
const policy = `version: 1
rules:
  - name: itself
    match: {repository: lab/itself, trust: [fork, branch, protected]}
    runtime: %[1]s
    timeout: 5m
    egress: [{name: gitea.test, port: %[2]d, protocol: http, resolve: [127.0.0.1]}]
  - name: large
    match: {repository: "lab/large*", trust: [fork, branch, protected]}
    runtime: %[1]s
    timeout: 5m
    egress: [{name: gitea.test, port: %[2]d, protocol: http, resolve: [127.0.0.1]}]
  - name: canary
    match: {repository: lab/canary, trust: [fork, branch, protected]}
    runtime: %[1]s
    timeout: 5m
    egress:
      - {name: gitea.test, port: %[2]d, protocol: http, resolve: [127.0.0.1]}
      - {name: canary.test, port: %[3]d, protocol: http, resolve: [127.0.0.1]}
  - name: gates
    match: {repository: lab/*, trust: [fork, branch, protected]}
    runtime: %[1]s
    timeout: 5m
    limits: {memory: 512MiB, pids: 128}
    egress: [{name: gate.test, port: %[3]d, protocol: http, resolve: [127.0.0.1]}]
`

// A site is a Gitea and a place for boxes. Agents come and go.
type site struct {
	ctx     context.Context
	server  *giteatest.Server
	gates   *gates
	policy  string
	sandbox string
}

func open(t *testing.T, e engine) *site {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 9*time.Minute)
	t.Cleanup(cancel)
	s := &site{ctx: ctx, server: giteatest.Start(t, giteatest.Config{}), gates: openGates(t), sandbox: e.sandbox(t)}
	s.policy = fmt.Sprintf(policy, e.name, s.server.Port(), s.gates.port)
	return s
}

// An installation is an agent of a site, which is not started.
type installation struct {
	*site
	name  string // of the runner, and its label
	world *agenttest.World
}

// install makes an installation. registration is more of its provider's section.
func (s *site) install(t *testing.T, name, registration string) *installation {
	t.Helper()
	file := filepath.Join(t.TempDir(), "registration")
	agenttest.Must(t, os.WriteFile(file, []byte(must(s.server.RegistrationToken(s.ctx))(t)+"\n"), 0o600))
	return &installation{s, name, agenttest.New(t, agenttest.Config{
		Slots: 4, Policy: s.policy, Sandbox: s.sandbox, Git: name == "large",
		Providers: fmt.Sprintf("  gitea: {url: %q, token_file: %s, name: %s, labels: [%s]%s}\n", s.server.URL(), file, name, name, registration),
	})}
}

// repository makes a repository with that workflow, if it is one, and returns
// the commit.
func (in *installation) repository(t *testing.T, name, workflow string) (*giteatest.Repository, string) {
	t.Helper()
	r := must(in.server.NewRepository(in.ctx, name))(t)
	return r, in.push(t, r, workflow)
}

// push commits a workflow that asks for this agent.
func (in *installation) push(t *testing.T, r *giteatest.Repository, workflow string) string {
	t.Helper()
	text := strings.ReplaceAll(workflow, "runs-on: mayfly", "runs-on: "+in.name)
	return must(r.Push(in.ctx, map[string]string{".gitea/workflows/ci.yml": text}))(t)
}

// pushed makes a repository with one workflow that runs at the push, and waits
// for the end of its jobs.
func (in *installation) pushed(t *testing.T, name, workflow string) (*giteatest.Repository, []giteatest.Job) {
	t.Helper()
	r, sha := in.repository(t, name, workflow)
	return r, must(r.Wait(in.ctx, must(r.Pushed(in.ctx, sha))(t)))(t)
}

// printed is what a job printed, as the server has it.
func (in *installation) printed(t *testing.T, r *giteatest.Repository, j giteatest.Job) string {
	t.Helper()
	return giteatest.Printed(must(r.Log(in.ctx, j.ID))(t))
}

func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		agenttest.Must(t, err)
		return v
	}
}

// conclusions are how the jobs ended, in their order.
func conclusions(jobs []giteatest.Job) string {
	var all []string
	for _, j := range jobs {
		all = append(all, j.Name+" "+j.Conclusion)
	}
	return strings.Join(all, ", ")
}
