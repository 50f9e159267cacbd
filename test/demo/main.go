// Command demo shows Mayfly whole, on one machine and with nothing installed
// but Debian's packages: a real PostgreSQL, a git server, a web server and an
// agent, all on loopback; one job that clones, builds, writes to a database
// with a role of its own and tries what it may not; and then what is left of it.
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/mayfly-ci/mayfly/providers/local"
	"github.com/mayfly-ci/mayfly/test/postgrestest"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// A stage is the world of the demo.
type stage struct {
	dir      string
	mayfly   string
	database *postgrestest.Server
	gitPort  int
	webPort  int
}

func run(ctx context.Context) (err error) {
	dir, err := os.MkdirTemp("", "mayfly-demo-")
	if err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o755); err != nil { // PostgreSQL runs as a user of its own
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	binary, err := filepath.Abs("bin/mayfly")
	if err != nil {
		return err
	}
	s := &stage{dir: dir, mayfly: binary}

	say("a PostgreSQL, a git server and two web servers on loopback")
	if s.database, err = postgrestest.New(ctx, filepath.Join(dir, "postgres")); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.database.Close()) }()
	end, err := s.servers(ctx)
	if err != nil {
		return err
	}
	defer end()
	if err := errors.Join(s.prepareDatabase(ctx), s.configure()); err != nil {
		return err
	}

	say("mayfly doctor")
	_ = s.show(ctx, "doctor") // it says what is missing; the job below says if that matters
	say("mayfly agent, and one job in its spool")
	result, err := s.job(ctx)
	if err != nil {
		return err
	}
	return s.after(ctx, result)
}

func say(what string) { fmt.Printf("\n\033[1m== %s\033[0m\n", what) }

// servers starts what the job will want to reach.
func (s *stage) servers(ctx context.Context) (end func(), err error) {
	web, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s.webPort = web.Addr().(*net.TCPAddr).Port
	server := &http.Server{ReadHeaderTimeout: time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "you reached %s\n", r.Host)
	})}
	served := make(chan error, 1)
	go func() { served <- server.Serve(web) }()

	if err := s.repository(ctx); err != nil {
		return nil, err
	}
	if s.gitPort, err = freePort(); err != nil {
		return nil, err
	}
	daemon := exec.CommandContext(ctx, "git", "daemon", "--listen=127.0.0.1", "--port="+strconv.Itoa(s.gitPort),
		"--base-path="+filepath.Join(s.dir, "git"), "--export-all", "--reuseaddr")
	daemon.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := daemon.Start(); err != nil {
		return nil, fmt.Errorf("git daemon: %w", err)
	}
	return func() {
		_ = daemon.Process.Signal(syscall.SIGTERM)
		_ = daemon.Wait()
		_ = server.Close()
		<-served
	}, nil
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	return l.Addr().(*net.TCPAddr).Port, l.Close()
}

// repository makes the git repository that the job is about.
func (s *stage) repository(ctx context.Context) error {
	work, bare := filepath.Join(s.dir, "work"), filepath.Join(s.dir, "git", "project.git")
	if err := os.CopyFS(work, os.DirFS("test/demo/project")); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"init", "-q", "-b", "main", work},
		{"-C", work, "add", "."},
		{"-C", work, "-c", "user.name=demo", "-c", "user.email=demo@example.com", "commit", "-q", "-m", "demo: greet"},
		{"clone", "-q", "--bare", work, bare},
	} {
		if out, err := exec.CommandContext(ctx, "git", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("git %s: %w: %s", args[0], err, out)
		}
	}
	return nil
}

// configure writes the two files that a user would write.
func (s *stage) configure() error {
	agent := fmt.Sprintf(`version: 1
state: state
slots: 2
policy: policy.yaml
providers:
  local: {dir: spool}
issuers:
  build-db:
    type: postgres
    host: 127.0.0.1
    port: %d
    database: postgres
    user: postgres
    password_file: db.pass
    sslmode: disable
    job_host: db.demo
log: {level: warn, format: console}
`, s.database.Port())
	policy := fmt.Sprintf(`version: 1
rules:
  - name: demo
    match: {provider: local, repository: "%s", ref: refs/heads/main, trust: local}
    timeout: 10m
    limits: {memory: 2GiB, pids: 512, cpu: 2, disk: 2GiB}
    egress:
      - {name: git.demo, port: %d, protocol: tcp, resolve: [127.0.0.1], purpose: clone}
      - {name: allowed.demo, port: %d, protocol: http, resolve: [127.0.0.1]}
      - {name: db.demo, port: %d, protocol: tcp, resolve: [127.0.0.1], step: migrate}
    leases:
      - name: db
        issuer: build-db
        step: migrate
        ttl: 5m
        scope: {schemas: [{name: public, tables: [{names: [builds], privileges: [insert, select]}]}]}
        env: {PGUSER: username, PGPASSWORD: password, PGPORT: port}
`, filepath.Join(s.dir, "git", "project.git"), s.gitPort, s.webPort, s.database.Port())
	return errors.Join(
		os.WriteFile(filepath.Join(s.dir, "agent.yaml"), []byte(agent), 0o600),
		os.WriteFile(filepath.Join(s.dir, "policy.yaml"), []byte(policy), 0o600),
		os.WriteFile(filepath.Join(s.dir, "db.pass"), []byte(s.database.Password()), 0o600))
}

// job starts an agent, puts the job into its spool, shows its log, and stops
// the agent by the first signal, which waits.
func (s *stage) job(ctx context.Context) (local.Result, error) {
	agent := exec.CommandContext(ctx, s.mayfly, "agent", "--config", filepath.Join(s.dir, "agent.yaml"))
	agent.Stderr = os.Stderr
	agent.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := agent.Start(); err != nil {
		return local.Result{}, err
	}
	spool := filepath.Join(s.dir, "spool")
	id, err := local.Submit(spool, local.Job{
		Repository: filepath.Join(s.dir, "git", "project.git"), Ref: "refs/heads/main", Workflow: ".github/workflows/ci.yml",
		Inputs: map[string]any{"git_port": s.gitPort, "web_port": s.webPort},
	})
	var result local.Result
	if err == nil {
		wait, cancel := context.WithTimeout(ctx, 5*time.Minute)
		defer cancel()
		result, err = local.Wait(wait, spool, id)
	}
	err = errors.Join(err, agent.Process.Signal(syscall.SIGTERM), agent.Wait())
	if err != nil {
		return result, err
	}
	log, err := os.ReadFile(filepath.Join(spool, "done", id, "log"))
	if err != nil {
		return result, err
	}
	fmt.Print(indent(string(log)))
	fmt.Printf("  → %s after %v\n", result.Conclusion, result.CompletedAt.Sub(result.ClaimedAt).Round(time.Millisecond))
	if result.Conclusion != "success" {
		return result, fmt.Errorf("the job ended as %s: %s", result.Conclusion, result.Reason)
	}
	return result, nil
}

func indent(s string) string {
	return "  " + strings.ReplaceAll(strings.TrimSuffix(s, "\n"), "\n", "\n  ") + "\n"
}

// show runs a command of mayfly to the terminal.
func (s *stage) show(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, s.mayfly, append(args, "--config", filepath.Join(s.dir, "agent.yaml"))...)
	out, err := cmd.CombinedOutput()
	fmt.Print(indent(string(out)))
	return err
}
