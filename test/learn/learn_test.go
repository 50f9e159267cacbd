// Package learn_test has a job learn which names it needs, makes a policy of what
// the record says of it, and runs the same job under that policy.
package learn_test

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/runner/audit"
	"github.com/mayfly-ci/mayfly/test/agenttest"
)

func TestMain(m *testing.M) { agenttest.Main(m) }

// bound is for anything that takes seconds on a quiet machine.
const bound = 2 * time.Minute

const policy = `version: 1
rules:
  - name: new
    match: {trust: local}
    mode: audit
    timeout: 2m
    limits: {memory: 512MiB, pids: 128, cpu: 1, disk: 64MiB, log: 1MiB}
`

const steps = `      - id: fetch
        run: |
          set -e
          curl -sS http://web.corp:%[1]d/releases/v1
          curl -sS -X POST -d x http://web.corp:%[1]d/hook
      - run: |
          exec 3<>/dev/tcp/echo.corp/%[2]d; echo ping >&3; read -r line <&3; echo "echo $line"
`

// names makes this machine, which is the test's own, know names.
func names(t *testing.T) {
	t.Helper()
	hosts := filepath.Join(t.TempDir(), "hosts")
	agenttest.Must(t, os.WriteFile(hosts, []byte("127.0.0.1 localhost web.corp echo.corp\n"), 0o644))
	agenttest.Must(t, unix.Mount(hosts, "/etc/hosts", "", unix.MS_BIND, ""))
	t.Cleanup(func() { agenttest.Must(t, unix.Unmount("/etc/hosts", unix.MNT_DETACH)) })
}

// serve is what is outside: a server for HTTP and one that says what it hears.
func serve(t *testing.T) (web, echo int) {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, "got", r.Method, r.URL.Path) }))
	t.Cleanup(s.Close)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	agenttest.Must(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				b := make([]byte, 64)
				n, _ := conn.Read(b) // nothing is answered with nothing
				_, _ = conn.Write(b[:n])
			}()
		}
	}()
	return s.Listener.Addr().(*net.TCPAddr).Port, l.Addr().(*net.TCPAddr).Port
}

// record is what the audit has of the last job.
func record(t *testing.T, w *agenttest.World) (job string, events []audit.Event) {
	t.Helper()
	out, code := w.Run(t, "audit", "show", "--output", "json")
	if code != 0 {
		t.Fatalf("audit show: %d %s", code, out)
	}
	for line := range strings.Lines(out) {
		var e audit.Event
		agenttest.Must(t, json.Unmarshal([]byte(line), &e))
		if e.Action == "job.admit" {
			job, events = e.Job, nil
		}
		if e.Job == job {
			events = append(events, e)
		}
	}
	return job, events
}

// TestLearnAndEnforce is the way from no rules to few.
func TestLearnAndEnforce(t *testing.T) {
	names(t)
	web, echo := serve(t)
	w := agenttest.New(t, agenttest.Config{Policy: policy})
	agent, err := os.ReadFile(w.Config())
	agenttest.Must(t, err)
	const learn = "gateway: {learn: {repositories: [\"**\"], private: [127.0.0.1]}}\n"
	agenttest.Must(t, os.WriteFile(w.Config(), append(agent, learn...), 0o600))
	workflow := w.Workflow(t, "learn", fmt.Sprintf(steps, web, echo))
	run := func() string {
		t.Helper()
		a := w.Start(t)
		defer a.Stop(t)
		id := w.Submit(t, workflow)
		if r, log := w.Result(t, id, bound), w.Log(t, id); r.Conclusion != "success" || !strings.Contains(log, "got POST /hook\n") || !strings.Contains(log, "echo ping\n") {
			t.Fatalf("%s (%s):\n%s", r.Conclusion, r.Reason, log)
		}
		return w.Log(t, id)
	}

	log := run()
	job, events := record(t, w)
	who := 0
	for _, e := range events {
		if e.Detail["mode"] != "audit" {
			t.Errorf("not marked: %+v", e)
		}
		if e.Action == "egress.tcp" && e.Object == "web.corp" && e.Detail["step"] == "fetch" && strings.HasSuffix(e.Detail["executable"], "/curl") && e.Detail["pid"] != "" {
			who++
		}
	}
	if who != 4 {
		t.Errorf("%d lines name curl in step fetch, want those of two requests: %+v", who, events)
	}
	said := func(want []string, args ...string) string {
		t.Helper()
		out, code := w.Run(t, args...)
		for _, text := range want {
			if !strings.Contains(out, text) {
				t.Errorf("mayfly %s: %d, lacks %q:\n%s", strings.Join(args, " "), code, text, out)
			}
		}
		return out
	}
	said([]string{job + "  success", "trust      local", "mode       audit", "job.complete", fmt.Sprintf("learned  web.corp:%d  2 times", web)}, "job", job)
	said([]string{"mode: audit in policy.yaml:3 new: jobs of these rules reach every name"}, "doctor")
	if out := said(nil, "logs", job); out != log || !strings.Contains(out, "mayfly: mode audit: ") {
		t.Errorf("logs: got %q, want %q", out, log)
	}
	suggestion := said([]string{"step: fetch", `{methods: [POST], path: "/hook"}`, `path: "/releases/v1"`, "protocol: tcp", "used by /usr/bin/curl"}, "policy", "suggest", job)

	// Enforced, without a way to learn.
	w.SetPolicy(t, suggestion)
	agenttest.Must(t, os.WriteFile(w.Config(), agent, 0o600))
	if out, code := w.Run(t, "config", "check", w.Config()); code != 0 {
		t.Fatalf("config check: %d %s\n%s", code, out, suggestion)
	}
	if log := run(); strings.Contains(log, "mode audit") {
		t.Errorf("it still learns:\n%s", log)
	}
	_, events = record(t, w)
	for _, e := range events {
		if v := e.Detail["verdict"]; v == "learned" || v == "refused" || e.Detail["mode"] != "" {
			t.Errorf("under the suggestion: %+v", e)
		}
	}

	// The same rule is refused where the configuration does not allow it.
	w.SetPolicy(t, policy)
	if out, code := w.Run(t, "config", "check", w.Config()); code != 2 || !strings.Contains(out, "the configuration lets no job learn") {
		t.Errorf("config check of mode audit without learn: %d %s", code, out)
	}
	if out, code := w.Run(t, "job", "mf-unknown"); code != 1 || !strings.Contains(out, "the record has nothing of it") {
		t.Errorf("an unknown job: %d %s", code, out)
	}
}
