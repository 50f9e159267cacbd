package gitea_test

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/test/agenttest"
	"github.com/mayfly-ci/mayfly/test/giteatest"
)

const narrowPolicy = `version: 1
rules:
  - name: narrow
    match: {repository: lab/narrow, trust: [fork, branch, protected]}
    narrow: true
    timeout: 5m
    limits: {memory: 512MiB, pids: 128}
    egress:
      - {name: gate.test, port: %[1]d, protocol: http, resolve: [127.0.0.1]}
      - {name: spare.test, port: %[1]d, protocol: http, resolve: [127.0.0.1]}
`

// A narrowing changes the file of a repository by the server's API.
type narrowing struct {
	in *installation
	r  *giteatest.Repository
}

// write has the file say text on branch, which is made from main if it is not
// there, and returns the commit.
func (n narrowing) write(t *testing.T, branch, text string) string {
	t.Helper()
	path := "/repos/" + n.r.Name() + "/contents/.mayfly/policy.yaml"
	in := map[string]string{"content": base64.StdEncoding.EncodeToString([]byte(text)), "message": "narrow", "branch": "main"}
	if branch != "main" {
		in["new_branch"] = branch
	}
	var old struct{ SHA string }
	method := http.MethodPost
	if n.in.server.API(n.in.ctx, http.MethodGet, path, nil, &old) == nil {
		method, in["sha"] = http.MethodPut, old.SHA
	}
	var answer struct{ Commit struct{ SHA string } }
	agenttest.Must(t, n.in.server.API(n.in.ctx, method, path, in, &answer))
	return answer.Commit.SHA
}

// runs wants the job of a commit to end so, and to print that.
func (n narrowing) runs(t *testing.T, what, sha, conclusion, printed string) {
	t.Helper()
	jobs := must(n.r.Wait(n.in.ctx, must(n.r.Pushed(n.in.ctx, sha))(t)))(t)
	log := n.in.printed(t, n.r, jobs[0])
	if c := conclusions(jobs); c != "try "+conclusion || !strings.Contains(log, printed) {
		t.Errorf("%s: %s, want %s and %q:\n%s", what, c, conclusion, printed, log)
	}
}

// TestNarrow: the protected default branch alone decides what a repository does
// without, and none decides that it has more.
func TestNarrow(t *testing.T) {
	s := open(t, engines()[0])
	in := s.install(t, "narrow", "")
	in.world.SetPolicy(t, fmt.Sprintf(narrowPolicy, s.gates.port))
	s.gates.open("/narrow")
	a := in.world.Start(t)
	n := narrowing{in, must(s.server.NewRepository(s.ctx, "narrow"))(t)}
	protection := "/repos/" + n.r.Name() + "/branch_protections"
	agenttest.Must(t, s.server.API(s.ctx, http.MethodPost, protection, map[string]any{"rule_name": "main", "enable_push": true}, nil))
	workflow := fmt.Sprintf("on: push\njobs:\n  try:\n    runs-on: mayfly\n    steps:\n      - run: curl -sS -f http://gate.test:%d/narrow && echo reached || echo not reached\n", s.gates.port)

	spare := fmt.Sprintf("version: 1\negress: [{name: spare.test, port: %d}]\n", s.gates.port)
	n.runs(t, "no file", in.push(t, n.r, workflow), "success", "open\nreached\n")
	n.runs(t, "a file of a branch", n.write(t, "feature", "version: 1\negress: []\n"), "success", "open\nreached\n")
	n.runs(t, "a file of the default branch", n.write(t, "main", spare), "success", "not reached\n")
	n.runs(t, "a branch that wants more", n.write(t, "wider", fmt.Sprintf("version: 1\negress: [{name: gate.test, port: %d}]\n", s.gates.port)), "success", "not reached\n")
	n.runs(t, "a file that widens", n.write(t, "main", "version: 1\negress: [{name: more.test, port: 443}]\n"), "failure", "may only narrow")
	n.runs(t, "a file that is not understood", n.write(t, "main", "version: 1\negres: []\n"), "failure", "unknown key")
	agenttest.Must(t, s.server.API(s.ctx, http.MethodDelete, protection+"/main", nil, nil))
	n.runs(t, "a default branch that is not protected", n.write(t, "main", spare), "failure", "is not protected")
	a.Stop(t)
	out, code := in.world.Run(t, "audit", "show", "--output", "json")
	if code != 0 || strings.Count(out, `"narrow":"sha256:`) != 2 || !strings.Contains(out, `"narrow_branch":"main"`) {
		t.Errorf("audit show: %d, %s; want the digest of the file in two admissions", code, out)
	}
	if !strings.Contains(out, `"action":"agent.request"`) || !strings.Contains(out, `"object":"provider gitea"`) {
		t.Errorf("the audit lacks the agent's own requests:\n%s", out)
	}
}
