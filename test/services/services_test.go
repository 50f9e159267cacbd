// Package services_test runs jobs with services on the real agent, in each
// runtime that has images.
package services_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/test/agenttest"
	"github.com/mayfly-ci/mayfly/test/containerdtest"
	"github.com/mayfly-ci/mayfly/test/dockertest"
	"github.com/mayfly-ci/mayfly/test/servertest"
)

// runscEnv says where gVisor's program is.
const runscEnv = "MAYFLY_TEST_RUNSC"

func TestMain(m *testing.M) {
	agenttest.Main(m, func(string) error {
		runsc, err := servertest.Runsc(context.Background())
		return errors.Join(err, os.Setenv(runscEnv, runsc), dockertest.Prepare(), containerdtest.Prepare())
	})
}

// bound is for anything that takes seconds on a quiet machine.
const bound = 3 * time.Minute

// images are those of the services: in a Docker daemon, and in the archive that
// it saved.
type images struct {
	daemon *dockertest.Daemon
	file   string
}

// A way is one of running boxes.
type way struct {
	name, rule string                                      // what the rules say of it
	tell       func(*testing.T, *agenttest.Config, images) // tells the agent
}

func ways() []way {
	return []way{
		{"containerd", "runtime: containerd", func(t *testing.T, c *agenttest.Config, i images) {
			d := containerdtest.Start(t, containerdtest.Packaged)
			f, err := os.Open(i.file)
			agenttest.Must(t, err)
			agenttest.Must(t, errors.Join(d.Import(t.Context(), f), f.Close()))
			c.Sandbox = fmt.Sprintf("  containerd: {image: %q, address: %q}\n", containerdtest.Debian, d.Address())
		}},
		{"docker", "runtime: docker", func(_ *testing.T, c *agenttest.Config, i images) {
			c.Sandbox = fmt.Sprintf("  docker: {image: %q, host: %q}\n", dockertest.Debian, i.daemon.Host())
		}},
		{"native", "runtime: native", func(_ *testing.T, c *agenttest.Config, i images) { c.Native = i.sources() }},
		{"gVisor", "isolation: gvisor", func(_ *testing.T, c *agenttest.Config, i images) {
			c.Native = i.sources() + fmt.Sprintf(", gvisor: {runsc: %q}", os.Getenv(runscEnv))
		}},
	}
}

// sources has the native runtime take the images from the file, and never from a
// registry.
func (i images) sources() string {
	return fmt.Sprintf("images: {pull: never, sources: {%q: %q, %q: %[2]q}}", postgresImage, i.file, webImage)
}

const policy = `version: 1
rules:
  - name: services
    match: {trust: local, workflow: "**/services.yml"}
    %[1]s
    images: ["docker.io/mayfly-test/*:*"]
    timeout: 3m
    limits: {memory: 512MiB, pids: 128, disk: 256MiB, log: 1MiB}
  - name: others
    match: {trust: local}
    %[1]s
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
	given := saved(t)
	for _, way := range ways() {
		t.Run(way.name, func(t *testing.T) {
			c := agenttest.Config{Policy: fmt.Sprintf(policy, way.rule)}
			way.tell(t, &c, given)
			w := agenttest.New(t, c)
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
