package issuers_test

import (
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/providers/local"
	"github.com/mayfly-ci/mayfly/test/agenttest"
)

const policyText = `version: 1
rules:
  - name: all
    match: {trust: local}
    timeout: 20m
    limits: {memory: 1GiB, pids: 256, disk: 768MiB, log: 4MiB}
    egress:
      - {name: files.corp, port: %d, protocol: http, resolve: [127.0.0.1]}
    leases:
      - name: key
        issuer: real
        step: use
        ttl: 15m
%s`

// neighbour is a step that the policy does not name.
const neighbour = `echo "neighbour has ${KEY:-nothing}, and it is $(reach)"`

// TestIssuers: a job uses the credential, its neighbours have none, and after the
// job the provider refuses it to whoever has it.
func TestIssuers(t *testing.T) {
	t.Parallel()
	for kind, start := range rows() {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			w, p := newWorld(t, start)
			a := w.Start(t)
			id := w.Submit(t, w.Workflow(t, kind, p.steps()))
			r := w.Result(t, id, bound)
			log := w.Log(t, id)
			secret, err := p.refused(t.Context())
			if r.Conclusion != "success" || err != nil {
				t.Fatalf("%s (%s), %v:\n%s", r.Conclusion, r.Reason, err, log)
			}
			for text, n := range map[string]int{p.want: 1, "neighbour has nothing, and it is alone": 2, "named has something, and it is there": 1} {
				if strings.Count(log, text) < n {
					t.Errorf("the log lacks %q:\n%s", text, log)
				}
			}
			a.Stop(t)
			receipt, code := w.Run(t, "audit", "show", "--action", "lease.revoke")
			if code != 0 || !strings.Contains(receipt, p.refusal) || !strings.Contains(receipt, " ok") {
				t.Errorf("no receipt with %q: %d %s", p.refusal, code, receipt)
			}
			w.nowhere(t, secret, log)
		})
	}
}

// TestOthers: what stands for a credential in one job is good for nothing in
// another, while the first goes on using it; and a job of a branch that the
// provider does not mean gets none.
func TestOthers(t *testing.T) {
	t.Parallel()
	w, p := newWorld(t, oauth)
	a := w.Start(t)
	first := w.Submit(t, w.Workflow(t, "first", useStep(p.url(), `echo "$KEY" | rev | curl -sS -f --data-binary @- $U/tell
for i in $(seq 900); do if curl -sS -f $U/gate 2>/dev/null; then break; fi; sleep 0.1; done
ask first "$KEY"`)))
	agenttest.Eventually(t, bound, "the first job has a placeholder", func() bool { return p.heard() != "" })
	foreign := reverse(p.heard())
	second := w.Submit(t, w.Workflow(t, "second", useStep(p.url(), `ask foreign `+foreign+`
ask own "$KEY"`)))
	if r := w.Result(t, second, bound); r.Conclusion != "success" {
		t.Errorf("the second job: %s (%s)", r.Conclusion, r.Reason)
	}
	p.let()
	if r := w.Result(t, first, bound); r.Conclusion != "success" {
		t.Errorf("the first job: %s (%s)", r.Conclusion, r.Reason)
	}
	log := w.Log(t, first) + w.Log(t, second)
	for _, want := range []string{"first: 200", "own: 200", "foreign: 403", "Refused by the policy of this job: the rule has a credential of its own"} {
		if !strings.Contains(log, want) {
			t.Errorf("the logs lack %q:\n%s", want, log)
		}
	}
	if record, code := w.Run(t, "audit", "show", "--output", "json"); code != 0 || !strings.Contains(record, "a credential of its own") {
		t.Errorf("the audit does not say that it was refused: %d %s", code, record)
	}
	for _, s := range p.all() {
		if strings.Contains(fmt.Sprint(s.header), foreign) {
			t.Errorf("the provider was shown the placeholder: %+v", s)
		}
	}
	before := len(p.all())
	path := w.Workflow(t, "other", useStep(p.url(), `ask other "$KEY"`))
	if out, err := exec.Command("git", "-C", w.Repository, "branch", "other").CombinedOutput(); err != nil {
		t.Fatalf("git branch: %v: %s", err, out)
	}
	id, err := local.Submit(w.Spool, local.Job{Repository: w.Repository, Ref: "refs/heads/other", Workflow: path})
	agenttest.Must(t, err)
	r := w.Result(t, id, bound)
	if said := r.Reason + w.Log(t, id); r.Conclusion == "success" || !strings.Contains(said, "not for this branch") || len(p.all()) != before {
		t.Errorf("a job of another branch: %s, and the provider was asked %d times: %s", r.Conclusion, len(p.all())-before, said)
	}
	a.Stop(t)
}

// useStep is the step that the policy names, with "ask WHAT TOKEN".
func useStep(url, script string) string {
	return "      - id: use\n        run: |\n" + indented("          ", `U=`+url+`
ask() { echo "$1: $(curl -sS -o answer -w '%{http_code}' -H "Authorization: Bearer $2" $U/api)"; cat answer; }
`+script)
}

func reverse(s string) string {
	b := []rune(s)
	slices.Reverse(b)
	return string(b)
}

// steps are a step that has the credential, between two that have not.
func (p *provider) steps() string {
	reach := fmt.Sprintf("reach() { if (exec 3<>/dev/tcp/%s/%d) 2>/dev/null; then echo there; else echo alone; fi; }\n", p.name, p.port)
	fetch := ""
	if p.tool != "" {
		fetch = fmt.Sprintf("curl -sS -f -o tool http://files.corp:%d/%s && chmod +x tool\n", p.files, filepath.Base(p.tool))
	}
	text := ""
	for _, s := range [][2]string{
		{"before", reach + fetch + neighbour},
		{"use", reach + "set -e\necho \"named has ${KEY:+something}, and it is $(reach)\"\nenv | rev\n" + p.script},
		{"after", reach + neighbour},
	} {
		text += "      - id: " + s[0] + "\n        run: |\n" + indented("          ", s[1])
	}
	return text
}

// A world is that of an agent with one issuer.
type world struct{ *agenttest.World }

func newWorld(t *testing.T, start func(*testing.T, string) provider) (world, provider) {
	t.Helper()
	documents := t.TempDir()
	web := httptest.NewServer(http.FileServer(http.Dir(documents)))
	t.Cleanup(web.Close)
	p := start(t, web.URL)
	p.files = 9 // nobody
	if p.tool != "" {
		files := httptest.NewServer(http.FileServer(http.Dir(filepath.Dir(p.tool))))
		t.Cleanup(files.Close)
		p.files = files.Listener.Addr().(*net.TCPAddr).Port
	}
	w := world{agenttest.New(t, agenttest.Config{
		Policy: fmt.Sprintf(policyText, p.files, indented("        ", p.lease)),
		More:   fmt.Sprintf("issuers:\n  identity: {type: oidc, url: '%s'}\n  real: {%s}\n", web.URL, p.section),
	})}
	if out, code := w.Run(t, "oidc", "export", documents); code != 0 {
		t.Fatalf("oidc export: %d %s", code, out)
	}
	if p.trust != nil {
		p.trust()
	}
	return w, p
}

// nowhere wants the secret neither in the log, also backwards as the job wrote it,
// nor in what the agent keeps.
func (w world) nowhere(t *testing.T, secret, log string) {
	t.Helper()
	if secret == "" {
		return
	}
	if strings.Contains(log, secret) || strings.Contains(reverse(log), secret) {
		t.Errorf("the job saw the credential:\n%s", log)
	}
	read := 0
	err := filepath.WalkDir(w.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || strings.HasPrefix(d.Name(), "disk-") { // gigabytes of holes, older than the secret
			return err
		}
		b, err := os.ReadFile(path)
		if strings.Contains(string(b), secret) {
			t.Errorf("%s has the credential", path)
		}
		read++
		return err
	})
	if err != nil || read < 3 {
		t.Errorf("read %d files: %v", read, err)
	}
}
