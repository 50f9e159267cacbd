package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/mayfly-ci/mayfly/creds/postgres"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/local"
	"github.com/mayfly-ci/mayfly/test/postgrestest"
)

// workflowFiles are the jobs. A step that prints the time takes it in its own
// process, right before it writes.
func workflowFiles() map[string]string {
	job := func(steps ...string) string {
		text := "on: push\njobs:\n  j:\n    runs-on: linux\n    steps:\n"
		for _, s := range steps {
			text += "      - run: " + s + "\n"
		}
		return text
	}
	return map[string]string{
		"lease.yml":         job("echo $EPOCHREALTIME"),
		"bare.yml":          job("echo $EPOCHREALTIME"),
		"true.yml":          job(`"true"`),
		"leases.yml":        job(`"true"`),
		"steps.yml":         job(slices.Repeat([]string{`"true"`}, stepsOfAJob)...),
		nativeFile:          job(`"true"`),
		imageFile:           job(`"true"`),
		gvisorFile:          job(`"true"`),
		dockerFile:          job(`"true"`),
		containerdFile:      job(`"true"`),
		"sleep.yml":         job("exec sleep 1000"),
		"stream.yml":        job("$CLIENT stream $SERVER"),
		"connect.yml":       job("$CLIENT connect $SERVER " + strconv.Itoa(connectsOfAJob)),
		"http-stream.yml":   job("$CLIENT download $PLAIN/stream"),
		"http-connect.yml":  job("$CLIENT requests $PLAIN/ " + strconv.Itoa(connectsOfAJob)),
		"https-stream.yml":  job("$CLIENT download $WEB/stream"),
		"https-connect.yml": job("$CLIENT requests $WEB/ " + strconv.Itoa(connectsOfAJob)),
	}
}

// The policy: two workflows have a lease, the others only the gateway.
const policyText = `version: 1
rules:
%[2]s  - name: with-lease
    match: {workflow: ["lease.yml", "leases.yml"], trust: [local]}
    timeout: 5m
    egress: [{name: server.bench, port: %[1]d, protocol: tcp, resolve: [127.0.0.1]}]
    leases: [{name: db, issuer: db, ttl: 4m, env: {PGUSER: username, PGPASSWORD: password}}]
  - name: without
    match: {trust: [local]}
    timeout: 5m
    egress: [{name: server.bench, port: %[1]d, protocol: tcp, resolve: [127.0.0.1]}]
`

const configText = `version: 1
state: %[1]s
slots: %[2]d
policy: %[3]s/policy.yaml
providers: {local: {dir: %[1]s/spool}}
sandbox: {native: {base: [%[4]s]}}
issuers:
  db: {type: postgres, host: 127.0.0.1, port: %[5]d, database: postgres, user: postgres, password_file: %[3]s/password, sslmode: disable}
log: {level: warn}
`

// A world is a directory with all that the benchmark makes, and what runs.
type world struct {
	dir      string
	bin      string // mayfly
	commit   string // of the repository in dir/repo
	postgres *postgrestest.Server
	issuer   *postgres.Issuer // what the agents have, to be timed alone
	server   *server
	web      *web
	plain    *web // without TLS
	agents   []*agent
}

func newWorld(ctx context.Context) (w *world, err error) {
	bin, err := filepath.Abs("bin/mayfly")
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(bin); err != nil {
		return nil, fmt.Errorf("run make build first, and this from the top of the repository: %w", err)
	}
	dir, err := os.MkdirTemp("", "mayfly-bench-")
	if err != nil {
		return nil, err
	}
	w = &world{dir: dir, bin: bin}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	if err := errors.Join(os.Chmod(dir, 0o711), os.Mkdir(w.path("tools"), 0o755)); err != nil {
		return nil, err
	}
	for _, tool := range []string{"floor", "client"} {
		if _, err := output(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", w.path("tools/"+tool), "./test/bench/"+tool); err != nil {
			return nil, err
		}
	}
	if w.postgres, err = postgrestest.New(ctx, w.path("pg")); err != nil {
		return nil, err
	}
	if w.server, err = listen(); err != nil {
		return nil, err
	}
	if w.web, err = listenTLS(); err != nil {
		return nil, err
	}
	if w.plain, err = listenPlain(); err != nil {
		return nil, err
	}
	if err := w.files(ctx); err != nil {
		return nil, err
	}
	w.issuer, err = postgres.New(postgres.Config{
		Host: w.postgres.Host(), Port: w.postgres.Port(), Database: postgrestest.Database, User: postgrestest.User,
		PasswordFile: w.path("password"), SSLMode: "disable", Owner: "bench",
	})
	return w, err
}

func (w *world) path(name string) string { return filepath.Join(w.dir, name) }

// files writes the policy, the password and the repository.
func (w *world) files(ctx context.Context) error {
	repo := w.path("repo")
	err := errors.Join(
		os.WriteFile(w.path("policy.yaml"), fmt.Appendf(nil, policyText, w.server.port, w.web.rule()+w.plain.plainRule()), 0o600),
		os.WriteFile(w.path("password"), []byte(w.postgres.Password()), 0o600),
		os.Mkdir(repo, 0o755),
	)
	replace := strings.NewReplacer("$CLIENT", w.path("tools/client"), "$SERVER", fmt.Sprintf("server.bench:%d", w.server.port), "$WEB", w.web.url(""), "$PLAIN", fmt.Sprintf("http://plain.bench:%d", w.plain.port))
	for name, text := range workflowFiles() {
		err = errors.Join(err, os.WriteFile(filepath.Join(repo, name), []byte(replace.Replace(text)), 0o644))
	}
	for _, args := range [][]string{
		{"init", "-q"},
		{"add", "."},
		{"-c", "user.name=bench", "-c", "user.email=bench@localhost", "commit", "-q", "-m", "bench"},
	} {
		if err == nil {
			_, err = output(ctx, "git", append([]string{"-C", repo}, args...)...)
		}
	}
	if err == nil {
		w.commit, err = output(ctx, "git", "-C", repo, "rev-parse", "HEAD")
	}
	return err
}

// close ends all that runs and removes the directory.
func (w *world) close() error {
	var errs []error
	for _, a := range w.agents {
		errs = append(errs, a.stop())
	}
	if w.issuer != nil {
		w.issuer.Close()
	}
	if w.server != nil {
		errs = append(errs, w.server.close())
	}
	for _, web := range []*web{w.web, w.plain} {
		if web != nil {
			errs = append(errs, web.close())
		}
	}
	if w.postgres != nil {
		errs = append(errs, w.postgres.Close())
	}
	return errors.Join(append(errs, os.RemoveAll(w.dir))...)
}

// An agent is a process of the product.
type agent struct {
	world *world
	state string
	warm  int // boxes that it has ready
	cmd   *exec.Cmd
	log   bytes.Buffer
	ended chan struct{}
}

// start starts an agent with a state of its own. base is a directory that its
// boxes see too, "" is none; more are further lines of its configuration.
func (w *world) start(name string, slots int, base string, more ...string) (*agent, error) {
	state, config := w.path(name), w.path(name+".yaml")
	text := fmt.Sprintf(configText, state, slots, w.dir, base, w.postgres.Port()) + strings.Join(more, "")
	if err := errors.Join(os.Mkdir(state, 0o700), os.WriteFile(config, []byte(text), 0o600)); err != nil {
		return nil, err
	}
	return w.launch(state, config)
}

// startWarm starts one that has boxes ready; both rules of the policy are of one
// class.
func (w *world) startWarm(name string, slots int) (*agent, error) {
	a, err := w.start(name, slots, "", fmt.Sprintf("warm: {boxes: %d}\n", warmBoxes))
	if err == nil {
		a.warm = warmBoxes
	}
	return a, err
}

// launch starts an agent that is configured.
func (w *world) launch(state, config string) (*agent, error) {
	a := &agent{world: w, state: state, ended: make(chan struct{})}
	a.cmd = exec.Command(w.bin, "agent", "--config", config)
	a.cmd.Stdout, a.cmd.Stderr = &a.log, &a.log
	if err := a.cmd.Start(); err != nil {
		return nil, err
	}
	w.agents = append(w.agents, a)
	go func() { // stop waits for it
		_ = a.cmd.Wait()
		close(a.ended)
	}()
	return a, nil
}

// stop drains the agent, and kills it if that takes too long. Stopping twice is
// no error.
func (a *agent) stop() error {
	for _, sig := range []os.Signal{syscall.SIGTERM, syscall.SIGTERM, syscall.SIGKILL} {
		if err := a.cmd.Process.Signal(sig); errors.Is(err, os.ErrProcessDone) {
			break
		}
		select {
		case <-a.ended:
		case <-time.After(10 * time.Second):
		}
	}
	<-a.ended
	if s := a.cmd.ProcessState; !s.Success() {
		return fmt.Errorf("agent in %s: %v: %s", a.state, s, tail(a.log.String()))
	}
	return nil
}

func (a *agent) spool() string { return filepath.Join(a.state, "spool") }

// submit puts a job on offer.
func (a *agent) submit(file string) (string, error) {
	return local.Submit(a.spool(), local.Job{Repository: a.world.path("repo"), SHA: a.world.commit, Workflow: file})
}

// wait returns the result of a job, which must be a success.
func (a *agent) wait(ctx context.Context, id string) (local.Result, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	r, err := local.Wait(ctx, a.spool(), id)
	if err == nil && r.Conclusion != providers.Success {
		err = fmt.Errorf("job %s: %s: %s: %s", id, r.Conclusion, r.Reason, tail(a.log.String()))
	}
	return r, err
}

func (a *agent) run(ctx context.Context, file string) (local.Result, error) {
	id, err := a.submit(file)
	if err != nil {
		return local.Result{}, err
	}
	return a.wait(ctx, id)
}

// printed is what a job printed: its log without the lines of the agent.
func (a *agent) printed(id string) (string, error) {
	b, err := os.ReadFile(filepath.Join(a.spool(), "done", id, "log"))
	var own strings.Builder
	for line := range strings.Lines(string(b)) {
		if !strings.HasPrefix(line, "mayfly: ") {
			own.WriteString(line)
		}
	}
	return own.String(), err
}

// output runs a command for what it prints.
func output(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, tail(complaint.String()))
	}
	return strings.TrimSpace(out.String()), nil
}

func tail(s string) string { return strings.TrimSpace(s[max(0, len(s)-2000):]) }
