package outbound_test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/test/agenttest"
	"github.com/mayfly-ci/mayfly/test/squidtest"
)

const policy = `version: 1
rules:
  - name: all
    match: {trust: local}
    timeout: 2m
    limits: {memory: 512MiB, pids: 128, cpu: 1, disk: 64MiB, log: 1MiB}
    egress:
      - {name: far.corp, port: 8080, protocol: http}
      - {name: far.corp, port: 8081, protocol: tcp}
      - {name: pinned.corp, port: 8080, protocol: http, resolve: [127.0.0.2]}
      - {name: near.corp, port: %d, protocol: http, resolve: [127.0.0.1]}
`

// TestJobs: the whole agent behind a proxy. A job reaches by it what its rules
// allow, and what cannot be held there is refused; nothing of the agent is told
// the proxy's password but its file.
func TestJobs(t *testing.T) {
	s := squidtest.Start(t, hosts+"127.0.0.2 pinned.corp\n")
	l, err := s.Net.Listen("tcp", far)
	serve(t, l, err)
	l, err = s.Net.Listen("tcp", "127.0.0.2:8081")
	serve(t, l, err)
	near, err := net.Listen("tcp", "127.0.0.1:0")
	serve(t, near, err)
	port := near.Addr().(*net.TCPAddr).Port

	const script = `      - run: |
          curl -sS -f http://far.corp:8080/ && echo " http"
          curl -sS -f http://far.corp:8080/a http://far.corp:8080/b && echo " again"
          curl -sS -f http://far.corp:8081/ && echo " tcp"
          curl -sS -f http://near.corp:%d/ && echo " near"
          curl -sS -f http://pinned.corp:8080/ || echo "pinned refused"
`
	run := func(outbound string) (log, audit string) {
		t.Helper()
		w := agenttest.New(t, agenttest.Config{Policy: fmt.Sprintf(policy, port), More: outbound})
		agenttest.Must(t, os.WriteFile(filepath.Join(w.Dir, "proxy.pass"), []byte(s.Password+"\n"), 0o600))
		a := w.Start(t)
		id := w.Submit(t, w.Workflow(t, "job", fmt.Sprintf(script, port)))
		w.Result(t, id, 3*time.Minute)
		log = w.Log(t, id)
		a.Stop(t)
		audit, code := w.Run(t, "audit", "show", "--output", "json")
		if code != 0 {
			t.Fatalf("audit show: %d %s", code, audit)
		}
		return log, audit
	}

	log, _ := run("")
	if strings.Contains(log, "hello http") || strings.Contains(log, "hello tcp") || !strings.Contains(log, "hello near") {
		t.Errorf("without the proxy the job reached what is behind it:\n%s", log)
	}
	section := fmt.Sprintf("outbound:\n  proxy: http://%s\n  proxy_user: %s\n  proxy_password_file: proxy.pass\n  no_proxy: [near.corp]\n", s.Address, squidtest.User)
	log, audit := run(section)
	for _, want := range []string{"hello http", "hellohello again", "hello tcp", "hello near", "pinned refused", "the parent proxy looks it up unseen"} {
		if !strings.Contains(log, want) {
			t.Errorf("the log lacks %q:\n%s", want, log)
		}
	}
	s.Await(t, "CONNECT far.corp:8081 agent 200")
	for _, want := range []string{`"dialled":"proxy ` + s.Address + `"`, `"object":"far.corp"`} {
		if !strings.Contains(audit, want) {
			t.Errorf("the audit lacks %s:\n%s", want, audit)
		}
	}
	if strings.Contains(log+audit, s.Password) {
		t.Error("the password of the proxy is in the log or the audit")
	}
	s.Stop()
	if log, _ = run(section); strings.Contains(log, "hello http") || !strings.Contains(log, "hello near") {
		t.Errorf("with the proxy gone:\n%s", log)
	}
}
