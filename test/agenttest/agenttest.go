// Package agenttest runs the real agent for tests: the program itself, built
// from this tree, with its configuration, spool and state in a directory of the
// test, and often a real PostgreSQL. Tests of a package run in namespaces of
// their own (Main), so that all they can see of processes, mounts, sockets and
// temporary files is theirs, whatever else the machine does.
package agenttest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/providers/local"
	"github.com/mayfly-ci/mayfly/test/postgrestest"
)

// Policy runs every local job with little; what needs more says so.
const Policy = `version: 1
rules:
  - name: all
    match: {trust: local}
    timeout: 2m
    limits: {memory: 512MiB, pids: 128, cpu: 1, disk: 64MiB, log: 1MiB}
`

// A Config says what is special about a World. The zero value is an agent of
// two slots with Policy and without a database.
type Config struct {
	Slots    int
	Policy   string               // content of policy.yaml
	Database *postgrestest.Server // reached by boxes as db.test through the issuer "db"
	State    string               // directory; "" is below the world's
	Spool    string               // directory; "" is below the world's

	Warm int // boxes of each class that are ready before there is a job

	// Providers and Sandbox are more of these sections of agent.yaml, lines
	// that are indented by two.
	Providers, Sandbox string

	// Native is more of the section of the native runtime, such as
	// "images: {pull: never}".
	Native string

	// More are more sections of agent.yaml.
	More string

	// Git gives the agent a git cache, which is the world's.
	Git bool
}

// A World is one installation of an agent, and a repository with workflows.
type World struct {
	Dir        string
	State      string
	Spool      string
	Repository string
	Cgroup     string // parent of the groups of its boxes, below each tree
	Database   *postgrestest.Server
	Program    string // the mayfly that is run

	// Engine, if there is one, lists what the agent's boxes have in it. What is at
	// Lazy is of no box any more, and the engine removes it in its own time.
	Engine func(context.Context) ([]string, error)
	Lazy   []string

	Git string // directory of the git cache, if there is one
}

// New makes a World below a directory that goes with tb. The agent is not
// started.
func New(tb testing.TB, c Config) *World {
	tb.Helper()
	dir := tb.TempDir()
	w := &World{
		Dir: dir, State: c.State, Spool: c.Spool, Repository: filepath.Join(dir, "repository"),
		Cgroup: "mayfly-test-" + strings.ToLower(rand.Text())[:12], Database: c.Database, Program: program(),
	}
	if w.State == "" {
		w.State = filepath.Join(dir, "state")
	}
	if w.Spool == "" {
		w.Spool = filepath.Join(dir, "spool")
	}
	if c.Slots == 0 {
		c.Slots = 2
	}
	if c.Policy == "" {
		c.Policy = Policy
	}
	own := "cgroup: " + w.Cgroup
	if c.Native != "" {
		own += ", " + c.Native
	}
	agent := fmt.Sprintf("version: 1\nstate: %s\nslots: %d\npolicy: policy.yaml\nproviders:\n  local: {dir: %s}\n%ssandbox:\n  native: {%s}\n%slog: {level: info, format: json}\n",
		w.State, c.Slots, w.Spool, c.Providers, own, c.Sandbox)
	agent += c.More
	if c.Git {
		w.Git = filepath.Join(dir, "git")
		agent += fmt.Sprintf("git_cache: {dir: %s}\n", w.Git)
		for up := dir; up != os.TempDir() && up != "/"; up = filepath.Dir(up) { // git does not run as root
			Must(tb, os.Chmod(up, 0o755))
		}
	}
	if c.Warm > 0 {
		agent += fmt.Sprintf("warm: {boxes: %d}\n", c.Warm)
	}
	if w.Database != nil {
		agent += fmt.Sprintf("issuers:\n  db: {type: postgres, host: 127.0.0.1, port: %d, database: postgres, user: postgres, password_file: db.pass, sslmode: disable, job_host: db.test}\n", w.Database.Port())
		Must(tb, os.WriteFile(filepath.Join(dir, "db.pass"), []byte(w.Database.Password()), 0o600))
	}
	Must(tb, os.WriteFile(w.Config(), []byte(agent), 0o600))
	w.SetPolicy(tb, c.Policy)
	w.git(tb, "init", "-q", "-b", "main", w.Repository)
	tb.Cleanup(func() { w.removeGroups(tb) })
	return w
}

// Config is the path of agent.yaml.
func (w *World) Config() string { return filepath.Join(w.Dir, "agent.yaml") }

// SetPolicy replaces policy.yaml.
func (w *World) SetPolicy(tb testing.TB, content string) {
	tb.Helper()
	Must(tb, os.WriteFile(filepath.Join(w.Dir, "policy.yaml"), []byte(content), 0o600))
}

// Workflow commits a workflow of one job with these steps and returns its path.
// Steps are YAML, indented by six.
func (w *World) Workflow(tb testing.TB, name, steps string) string {
	tb.Helper()
	return w.Commit(tb, name, "on: push\njobs:\n  job:\n    runs-on: linux\n    steps:\n"+steps)
}

// Commit commits a file of that content as a workflow and returns its path.
func (w *World) Commit(tb testing.TB, name, content string) string {
	tb.Helper()
	file := ".github/workflows/" + name + ".yml"
	path := filepath.Join(w.Repository, file)
	Must(tb, os.MkdirAll(filepath.Dir(path), 0o755))
	Must(tb, os.WriteFile(path, []byte(content), 0o644))
	w.git(tb, "-C", w.Repository, "add", ".")
	w.git(tb, "-C", w.Repository, "-c", "user.name=t", "-c", "user.email=t@example.com", "commit", "-q", "--allow-empty", "-m", name)
	return file
}

func (w *World) git(tb testing.TB, args ...string) {
	tb.Helper()
	if out, err := exec.Command("git", args...).CombinedOutput(); err != nil {
		tb.Fatalf("git %v: %v: %s", args, err, out)
	}
}

// Submit puts a job of the workflow on main into the spool.
func (w *World) Submit(tb testing.TB, workflow string) string {
	tb.Helper()
	id, err := local.Submit(w.Spool, local.Job{Repository: w.Repository, Ref: "refs/heads/main", Workflow: workflow})
	Must(tb, err)
	return id
}

// Result waits for the result of a job.
func (w *World) Result(tb testing.TB, id string, most time.Duration) local.Result {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), most)
	defer cancel()
	r, err := local.Wait(ctx, w.Spool, id)
	Must(tb, err)
	return r
}

// Good runs a job that does nothing, which must succeed: the agent is alive.
func (w *World) Good(tb testing.TB) {
	tb.Helper()
	r := w.Result(tb, w.Submit(tb, w.Workflow(tb, "good", "      - run: echo good $$\n")), time.Minute)
	if r.Conclusion != "success" {
		tb.Errorf("the next good job: %s (%s), want success", r.Conclusion, r.Reason)
	}
}

// Log is what the job printed; "" if there is no log.
func (w *World) Log(tb testing.TB, id string) string {
	tb.Helper()
	f, err := local.OpenLog(w.Spool, id)
	if errors.Is(err, os.ErrNotExist) {
		return ""
	}
	Must(tb, err)
	b, err := io.ReadAll(f)
	Must(tb, errors.Join(err, f.Close()))
	return string(b)
}

// Run runs a command of mayfly on this world and returns what it printed and
// its exit status.
func (w *World) Run(tb testing.TB, args ...string) (out string, code int) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, w.Program, append(args, "--config", w.Config())...)
	b, err := cmd.CombinedOutput()
	if _, ended := errors.AsType[*exec.ExitError](err); err != nil && !ended {
		tb.Fatalf("mayfly %v: %v", args, err)
	}
	return string(b), cmd.ProcessState.ExitCode()
}

// Must ends the test at an error.
func Must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// Eventually asks until ok says yes, and ends the test after most.
func Eventually(tb testing.TB, most time.Duration, what string, ok func() bool) {
	tb.Helper()
	if !Within(most, ok) {
		tb.Fatalf("not within %v: %s", most, what)
	}
}

// Within asks until ok says yes, or most is over.
func Within(most time.Duration, ok func() bool) bool {
	tick, over := time.NewTicker(10*time.Millisecond), time.After(most)
	defer tick.Stop()
	for {
		if ok() {
			return true
		}
		select {
		case <-over:
			return ok()
		case <-tick.C:
		}
	}
}
