// Package login_test runs git, ssh and psql in a real box against a real OpenSSH
// server and a real PostgreSQL, with a key and a password that the box does not
// hold.
package login_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/postgres"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/local"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/audit"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/egress/gateway"
	"github.com/mayfly-ci/mayfly/sandbox/guest"
	"github.com/mayfly-ci/mayfly/sandbox/native"
	"github.com/mayfly-ci/mayfly/test/agenttest"
	"github.com/mayfly-ci/mayfly/test/gitsshtest"
	"github.com/mayfly-ci/mayfly/test/postgrestest"
)

func TestMain(m *testing.M) { agenttest.Main(m) }

// bound is for anything that takes seconds on a quiet machine.
const bound = 3 * time.Minute

// keys issues the one key that a server knows.
type keys struct{ key string }

func (k keys) Issue(_ context.Context, _ string, g creds.Grant) (creds.Lease, error) {
	return creds.Lease{
		Values: map[string]creds.Secret{"key": creds.NewSecret(k.key)}, Facts: map[string]string{"username": gitsshtest.User},
		Handle: []byte("key"), ByName: true, ExpiresAt: g.Expires,
	}, nil
}

func (keys) Revoke(context.Context, string, []byte) error { return nil }

func (keys) Probe(context.Context, string, []byte) (creds.Proof, error) {
	return creds.Proof{At: time.Now(), How: "none", Refusal: "not asked"}, nil
}

func (keys) List(context.Context) ([]creds.Info, error) { return nil, errors.ErrUnsupported }

const policyHead = `version: 1
rules:
  - name: all
    match: {trust: local}
    timeout: 3m
    limits: {memory: 1GiB, pids: 256, disk: 512MiB, log: 8MiB}
    leases:
`

const sshPolicy = policyHead + `      - issuer: keys
        name: deploy
        files: {key: key}
        login:
          - protocol: ssh
            name: git.corp
            port: 22
            value: key
            user: username
            host-keys: ["%s"]
            resolve: [127.0.0.1]
            commands:
              - git-upload-pack 'acme/app.git'
              - git-receive-pack 'acme/app.git'
              - git-upload-archive 'acme/*.git'
              - exit-with *
`

const sshSteps = `      - run: |
          try() { echo "$1: $(shift; "$@" 2>&1 </dev/null | tr '\r\n' '  '; echo "status ${PIPESTATUS[0]}")"; }
          set -e
          git clone -q git@git.corp:acme/app.git work
          cd work
          git -c user.name=a -c user.email=a@b.c commit -q --allow-empty -m pushed
          git push -q origin HEAD:main
          git archive --remote=git@git.corp:acme/app.git HEAD | tar t
          cd ..
          set +e
          try other git clone -q git@git.corp:acme/other.git
          try id ssh git@git.corp id
          try inject ssh git@git.corp "git-upload-archive 'acme/x.git'; id"
          try climb ssh git@git.corp "git-upload-archive 'acme/../../x.git'"
          try shell ssh -tt git@git.corp
          try sftp sftp -q git@git.corp:file
          try user ssh root@git.corp "git-upload-pack 'acme/app.git'"
          try remote ssh -o ExitOnForwardFailure=yes -R 4711:127.0.0.1:22 git@git.corp "git-upload-pack 'acme/app.git'"
          ssh -o ControlMaster=no -L 4712:127.0.0.1:22 -N git@git.corp & forward=$!
          for i in $(seq 100); do if (exec 3<>/dev/tcp/127.0.0.1/4712) 2>/dev/null; then break; fi; sleep 0.1; done
          try local bash -c 'exec 3<>/dev/tcp/127.0.0.1/4712; head -c 3 <&3'
          kill $forward
          try agent ssh -A git@git.corp "git-upload-archive 'acme/none.git'"
          try status ssh git@git.corp 'exit-with 7'
          cat /run/mayfly/secrets/key | rev
`

// TestSSH: git works with its usual URLs, and nothing else does.
func TestSSH(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	server := gitsshtest.Start(t)
	server.Repository(t, "acme/app.git")
	server.Repository(t, "acme/other.git")
	// With the key all of it would work.
	if out, err := server.Direct(t, "id; exit 3"); !strings.Contains(out, "uid=65534(git)") || err == nil {
		t.Fatalf("the server does not take the key: %v %s", err, out)
	}
	a := newAgent(t, fmt.Sprintf(sshPolicy, server.HostKey), server.Port, 0)
	a.cfg.Issuers = map[string]creds.Issuer{"keys": keys{server.Key}}
	conclusion, log := a.run(ctx, t, sshSteps)
	if conclusion != providers.Success {
		t.Fatalf("%s:\n%s\n%s", conclusion, log, server.Log())
	}
	for _, want := range []string{
		"file\n", "other: mayfly: refused by the policy of this job: no rule allows this", "id: mayfly: refused by the policy of this job: no rule allows this  status 255",
		"inject: mayfly: refused", "climb: mayfly: refused", "shell: PTY allocation request failed", "sftp: mayfly: refused",
		"user: mayfly: refused by the policy of this job: the lease is for user git, and the job asks for root",
		"remote: Error: remote port forwarding failed", "status: sh: 1: exit-with: not found status 127",
	} {
		if !strings.Contains(log, want) {
			t.Errorf("the log lacks %q:\n%s", want, log)
		}
	}
	if strings.Contains(log, "local: SSH") || strings.Contains(log, "uid=") {
		t.Errorf("something passed:\n%s", log)
	}
	if out, err := exec.Command("git", "-c", "safe.directory=*", "-C", filepath.Join(server.Home, "acme/app.git"), "log", "-1", "--format=%s").CombinedOutput(); err != nil || string(out) != "pushed\n" {
		t.Errorf("the server has %s %v", out, err)
	}
	body := strings.Split(strings.TrimSpace(server.Key), "\n")[1]
	for _, text := range []string{log, reverse(log)} {
		if strings.Contains(text, body) {
			t.Errorf("the job sees the key:\n%s", text)
		}
	}
	a.ledger(t, []egress.Line{
		{Verdict: egress.Ended, Protocol: egress.SSH, Name: "git.corp", Request: egress.Exchange{Method: "exec", Path: "git-receive-pack 'acme/app.git'", Lease: "deploy"}},
		{Verdict: egress.Ended, Protocol: egress.SSH, Name: "git.corp", Request: egress.Exchange{Method: "exec", Path: "exit-with *", Status: 127, Lease: "deploy"}},
		{Verdict: egress.Refused, Protocol: egress.SSH, Name: "git.corp", Request: egress.Exchange{Method: "exec", Path: "git-upload-archive *"}},
		{Verdict: egress.Refused, Protocol: egress.SSH, Name: "git.corp", Request: egress.Exchange{Method: "exec", Path: "id"}},
		{Verdict: egress.Refused, Protocol: egress.SSH, Name: "git.corp", Request: egress.Exchange{Method: "subsystem", Path: "sftp"}},
		{Verdict: egress.Refused, Protocol: egress.SSH, Name: "git.corp", Request: egress.Exchange{Method: "request", Path: "tcpip-forward"}},
		{Verdict: egress.Refused, Protocol: egress.SSH, Name: "git.corp", Request: egress.Exchange{Method: "channel", Path: "direct-tcpip"}},
	}, body)
}

// TestStranger: a destination with another host key hears nothing of the job.
func TestStranger(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	server, other := gitsshtest.Start(t), gitsshtest.Start(t)
	a := newAgent(t, fmt.Sprintf(sshPolicy, other.HostKey), server.Port, 0)
	a.cfg.Issuers = map[string]creds.Issuer{"keys": keys{server.Key}}
	_, log := a.run(ctx, t, "      - run: ssh git@git.corp \"exit-with 7\"\n")
	if !strings.Contains(log, "its host key is none of those that the rule has") || strings.Contains(server.Log(), "Accepted") {
		t.Errorf("got\n%s\n%s", log, server.Log())
	}
}

const postgresPolicy = policyHead + `      - issuer: db
        name: db
        scope: {database: app}
        env: {PGUSER: username, PGPASSWORD: password, PGDATABASE: database, PGHOST: host, PGPORT: port}
        login:
          - protocol: postgres
            name: db.corp
            port: 5432
            value: password
            resolve: [127.0.0.1]
            ca: |
              %s
`

const postgresSteps = `      - run: |
          set -e
          tell() { echo "$1 $(psql -XAtc "select 'hello' || ' ' || current_database() || ' ' || (ssl)::text from pg_stat_ssl where pid = pg_backend_pid()" 2>&1 | tr '\n' ' ')"; }
          PGSSLMODE=verify-full tell full
          PGSSLMODE=disable tell plain
          tell prefer
          PGOPTIONS="-c work_mem=7777kB" psql -XAtc "show work_mem"
          set +e
          PGPASSWORD=wrong tell wrong
          PGUSER=postgres tell user
          PGDATABASE=postgres tell database
          psql -X "replication=database" -c "IDENTIFY_SYSTEM" 2>&1
          echo "long $(seq 200000 | psql -XAtc 'create temp table t (n int); copy t from stdin; select count(*) from t' -c 'x' 2>&1 | tr '\n' ' ')"
          (psql -Xc "select 'slept', pg_sleep(170)" 2>&1 | sed 's/^/cancel /') &
          for i in $(seq 300); do
            if [ "$(psql -XAtc "select count(*) from pg_stat_activity where query like 'select ''slept''%%'")" = 1 ]; then break; fi; sleep 0.1
          done
          pkill -INT -x psql; wait
          env | grep PGPASSWORD | rev
`

// TestPostgres: psql works with a placeholder, and with nothing else.
func TestPostgres(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	server, ca := database(ctx, t)
	issuer, err := postgres.New(postgres.Config{
		Host: server.Host(), Port: server.Port(), Database: postgrestest.Database, User: postgrestest.User, Password: creds.NewSecret(server.Password()),
		SSLMode: "require", JobHost: "db.corp", JobPort: 5432, Owner: "owner1",
	})
	agenttest.Must(t, err)
	spy := &spy{Issuer: issuer}
	a := newAgent(t, fmt.Sprintf(postgresPolicy, strings.ReplaceAll(strings.TrimSpace(ca), "\n", "\n              ")), 0, server.Port())
	a.cfg.Issuers = map[string]creds.Issuer{"db": spy}
	conclusion, log := a.run(ctx, t, postgresSteps)
	if conclusion != providers.Success {
		t.Fatalf("%s:\n%s", conclusion, log)
	}
	for _, want := range []string{
		"full hello app true", "plain hello app true", "prefer hello app true", "7777kB\n",
		"FATAL:  mayfly: refused by the policy of this job: the password is not the placeholder of lease db",
		"no lease is for user postgres at database app", "a session for replication is not carried",
		"200000", "cancel ERROR:  canceling statement due to user request",
	} {
		if !strings.Contains(log, want) {
			t.Errorf("the log lacks %q:\n%s", want, log)
		}
	}
	for _, text := range []string{log, reverse(log)} {
		if strings.Contains(text, spy.password) || !strings.Contains(reverse(log), "PGPASSWORD=") {
			t.Errorf("the job sees the password:\n%s", text)
		}
	}
	role := "mayfly_"
	a.ledger(t, []egress.Line{
		{Verdict: egress.Ended, Protocol: egress.Postgres, Name: "db.corp", Request: egress.Exchange{Method: "login", Path: "app", Lease: "db"}},
		{Verdict: egress.Ended, Protocol: egress.Postgres, Name: "db.corp", Request: egress.Exchange{Method: "cancel"}},
		{Verdict: egress.Refused, Protocol: egress.Postgres, Name: "db.corp", Request: egress.Exchange{Method: "login", Path: "app"}},
	}, spy.password)
	if !strings.HasPrefix(spy.user, role) {
		t.Errorf("the role is %q", spy.user)
	}
}

// spy remembers what was issued.
type spy struct {
	creds.Issuer
	user, password string
}

func (s *spy) Issue(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
	l, err := s.Issuer.Issue(ctx, name, g)
	s.user, s.password = l.Facts["username"], l.Values["password"].Reveal()
	return l, err
}

func reverse(s string) string {
	lines := strings.Split(s, "\n")
	for i, l := range lines {
		b := []rune(l)
		slices.Reverse(b)
		lines[i] = string(b)
	}
	return strings.Join(lines, "\n")
}

// An agent is one in this process, over real boxes.
type agent struct {
	dir   string
	state *runner.State
	cfg   runner.Config
}

func newAgent(t *testing.T, text string, sshPort, dbPort int) *agent {
	t.Helper()
	a := &agent{dir: t.TempDir()}
	var err error
	a.state, err = runner.OpenState(filepath.Join(a.dir, "state"))
	agenttest.Must(t, err)
	t.Cleanup(func() { agenttest.Must(t, a.state.Close()) })
	program, err := guest.Binary()
	agenttest.Must(t, err)
	boxes, err := native.New(native.Config{
		StateDir: filepath.Join(a.dir, "native"), Owner: a.state.Owner, Guest: program, FirstID: 1<<30 + 1<<28, Slots: 4,
		CgroupParent: fmt.Sprintf("mayfly-login-%d", os.Getpid()),
	})
	agenttest.Must(t, err)
	rules, err := policy.Parse([]byte(text), "policy.yaml")
	agenttest.Must(t, err)
	way, err := gateway.New(gateway.Config{Dial: ports(sshPort, dbPort)})
	agenttest.Must(t, err)
	spool, err := local.New(local.Config{Dir: filepath.Join(a.dir, "spool")})
	agenttest.Must(t, err)
	record, err := audit.OpenFile(filepath.Join(a.dir, "audit"), audit.FileOptions{})
	agenttest.Must(t, err)
	a.cfg = runner.Config{
		Providers: map[string]providers.Provider{"local": spool}, Runtimes: map[string]sandbox.Runtime{"native": boxes},
		Gateway: way, Policy: rules, Audit: record, Log: zerolog.Nop(), Slots: 1, Once: true,
	}
	return a
}

// run runs one job of these steps to its end.
func (a *agent) run(ctx context.Context, t *testing.T, steps string) (providers.Conclusion, string) {
	t.Helper()
	w := agenttest.World{Repository: filepath.Join(a.dir, "repository"), Spool: filepath.Join(a.dir, "spool")}
	agenttest.Must(t, os.MkdirAll(w.Repository, 0o755))
	if out, err := exec.Command("git", "init", "-q", "-b", "main", w.Repository).CombinedOutput(); err != nil {
		t.Fatalf("git init: %v: %s", err, out)
	}
	id := w.Submit(t, w.Workflow(t, "login", steps))
	r, err := runner.New(a.cfg, a.state)
	agenttest.Must(t, err)
	agenttest.Must(t, r.Run(ctx, ctx))
	return providers.Conclusion(w.Result(t, id, bound).Conclusion), w.Log(t, id)
}
