// Package services_test runs jobs with services on the real agent, in each
// runtime that has images.
package services_test

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/test/agenttest"
	"github.com/mayfly-ci/mayfly/test/containerdtest"
	"github.com/mayfly-ci/mayfly/test/dockertest"
)

func TestMain(m *testing.M) {
	agenttest.Main(m, func(string) error { return errors.Join(dockertest.Prepare(), containerdtest.Prepare()) })
}

// bound is for anything that takes seconds on a quiet machine.
const bound = 3 * time.Minute

// An engine is a runtime that the tests run on.
type engine struct {
	name    string
	sandbox func(*testing.T) string // its lines of agent.yaml; the images are there then
}

func engines() []engine {
	return []engine{
		{"containerd", func(t *testing.T) string {
			d := containerdtest.Start(t, containerdtest.Packaged)
			agenttest.Must(t, d.Import(t.Context(), archive(t)))
			return fmt.Sprintf("  containerd: {image: %q, address: %q}\n", containerdtest.Debian, d.Address())
		}},
		{"docker", func(t *testing.T) string {
			d := dockertest.Start(t)
			load(t, d)
			return fmt.Sprintf("  docker: {image: %q, host: %q}\n", dockertest.Debian, d.Host())
		}},
	}
}

const policy = `version: 1
rules:
  - name: services
    match: {trust: local, workflow: "**/services.yml"}
    runtime: %[1]s
    images: ["docker.io/mayfly-test/*:*"]
    timeout: 3m
    limits: {memory: 512MiB, pids: 128, disk: 256MiB, log: 1MiB}
  - name: others
    match: {trust: local}
    runtime: %[1]s
    timeout: 3m
    limits: {memory: 512MiB, pids: 128, disk: 256MiB, log: 1MiB}
`

// workflow has two services at the same port, one of them PostgreSQL with a
// health check. The job runs in the image of one of them, for its psql.
const workflow = `on: push
jobs:
  job:
    runs-on: linux
    container: mayfly-test/postgres:1
    services:
      postgres:
        image: mayfly-test/postgres:1
        env: {POSTGRES_PASSWORD: "${{ github.job }}-password"}
        ports: ["15432:5432"]
        options: >-
          --health-cmd "pg_isready -h 127.0.0.1" --health-interval 2s --health-timeout 20s --health-retries 60
      web:
        image: mayfly-test/web:1
        ports: [5432]
    env: {PGPASSWORD: "${{ github.job }}-password", PGUSER: postgres, LC_ALL: C}
    steps:
      - run: |
          set -e
          psql -At -h postgres -c "select 'by name ' || 40 + 2"
          psql -At -h 127.0.0.1 -p ${{ job.services.postgres.ports['5432'] }} -c "select 'by port ' || 41 + 2"
          wget -q -O - http://web:5432/passwd | grep nobody
          wget -q -O - http://localhost:${{ job.services.web.ports[5432] }}/group | grep nogroup
          psql -At -h postgres -c "select count(*) from generate_series(1, 200000)"
      - run: |
          if PGPASSWORD=wrong psql -At -h postgres -c "select 1"; then exit 1; fi
          if psql -At -h postgres.example -c "select 1"; then exit 1; fi
          echo refused
`

// TestServices: a job uses two services of one port by their names and by ports
// of its localhost, and nobody else can.
func TestServices(t *testing.T) {
	for _, e := range engines() {
		t.Run(e.name, func(t *testing.T) {
			w := agenttest.New(t, agenttest.Config{Policy: fmt.Sprintf(policy, e.name), Sandbox: e.sandbox(t)})
			a := w.Start(t)
			id := w.Submit(t, w.Commit(t, "services", workflow))
			r := w.Result(t, id, bound)
			log := w.Log(t, id)
			if r.Conclusion != "success" {
				t.Fatalf("%s (%s), want a success:\n%s", r.Conclusion, r.Reason, log)
			}
			for _, want := range []string{
				"by name 42\n", "by port 43\n", "nobody:x:", "nogroup:x:", "200000\n", "refused\n",
				"::group::service postgres\nthe database starts with job-password\n", "ready to accept connections",
				"::group::service web\nthe web starts\n::endgroup::\n",
			} {
				if !strings.Contains(log, want) {
					t.Errorf("the log lacks %q:\n%s", want, log)
				}
			}
			record, code := w.Run(t, "audit", "show")
			for _, want := range []string{`egress\.tcp +postgres +ok\n`, `egress\.tcp +web +ok\n`, `egress\.dns +postgres\.example +refused`, `image\.pull +docker\.io/mayfly-test/web:1 +ok\n`} {
				if code != 0 || !regexp.MustCompile(want).MatchString(record) {
					t.Errorf("the audit lacks %q (%d):\n%s", want, code, record)
				}
			}
			refused(t, w)
			a.Stop(t)
		})
	}
}

// refused: no service of another job is there, and a rule that says nothing of
// images lets a workflow bring none.
func refused(t *testing.T, w *agenttest.World) {
	t.Helper()
	id := w.Submit(t, w.Workflow(t, "stranger", "      - run: |\n          if getent hosts postgres || (echo >/dev/tcp/127.0.0.1/15432) 2>/dev/null; then exit 1; fi\n          echo nobody there\n"))
	if r := w.Result(t, id, bound); r.Conclusion != "success" || !strings.Contains(w.Log(t, id), "nobody there\n") {
		t.Errorf("a stranger: %s (%s)\n%s", r.Conclusion, r.Reason, w.Log(t, id))
	}
	id = w.Submit(t, w.Commit(t, "bold", strings.ReplaceAll(workflow, "on: push", "on: [push]")))
	if r := w.Result(t, id, bound); r.Conclusion != "refused" || !strings.Contains(r.Reason, "add images:") {
		t.Errorf("a workflow that brings an image without a rule: %s (%s), want it refused", r.Conclusion, r.Reason)
	}
}
