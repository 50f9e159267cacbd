package hostile_test

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/test/agenttest"
)

// An outside is a server that counts who comes.
type outside struct {
	port  int
	mu    sync.Mutex
	hits  int
	conns map[net.Conn]bool
}

func newOutside(t *testing.T) *outside {
	t.Helper()
	o := &outside{conns: map[net.Conn]bool{}}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		o.mu.Lock()
		o.hits++
		o.mu.Unlock()
		fmt.Fprintln(w, "arrived")
		if r.URL.Path == "/held" {
			_ = http.NewResponseController(w).Flush() // the client may be gone
			<-r.Context().Done()
		}
	}))
	s.Config.ConnState = func(c net.Conn, state http.ConnState) {
		o.mu.Lock()
		defer o.mu.Unlock()
		if o.conns[c] = true; state == http.StateClosed {
			delete(o.conns, c)
		}
	}
	s.Start()
	t.Cleanup(s.Close)
	o.port = s.Listener.Addr().(*net.TCPAddr).Port
	return o
}

// seen is how many came, and how many are there.
func (o *outside) seen() (hits, conns int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.hits, len(o.conns)
}

// visit comes from this machine, on a connection of its own.
func (o *outside) visit(t *testing.T) {
	t.Helper()
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := c.Get(fmt.Sprintf("http://127.0.0.1:%d/", o.port))
	agenttest.Must(t, err)
	agenttest.Must(t, resp.Body.Close())
}

// way is a rule that leads there.
func (o *outside) way() string {
	return fmt.Sprintf("    egress:\n      - {name: web.corp, port: %d, protocol: http, resolve: [127.0.0.1]}\n", o.port)
}

// TestPolicyOfTheChange: what a change brings along as a policy, wherever it
// lies, gives its job nothing; neither does an empty list, nor a policy that the
// agent cannot read when it is told to. The same text as the agent's own policy
// opens the way.
func TestPolicyOfTheChange(t *testing.T) {
	t.Parallel()
	o := newOutside(t)
	w := agenttest.New(t, agenttest.Config{})
	open := agenttest.Policy + o.way()
	for _, file := range []string{".mayfly/policy.yaml", "policy.yaml", ".github/policy.yaml", "agent.yaml"} {
		path := filepath.Join(w.Repository, file)
		agenttest.Must(t, os.MkdirAll(filepath.Dir(path), 0o755))
		agenttest.Must(t, os.WriteFile(path, []byte(open), 0o644))
	}
	a := w.Start(t)
	workflow := w.Workflow(t, "job", fmt.Sprintf("      - run: |\n          mkdir -p .mayfly /etc/mayfly\n          cp policy.yaml .mayfly/ || true\n          curl -sS http://web.corp:%d/ || echo closed\n", o.port))
	reload := func(text, want string) {
		t.Helper()
		before := strings.Count(a.Log(), want)
		w.SetPolicy(t, text)
		a.Signal(t, syscall.SIGHUP)
		agenttest.Eventually(t, time.Minute, want, func() bool { return strings.Count(a.Log(), want) > before })
	}
	for _, step := range []struct {
		what, policy, want string // what the agent says of it
		open               bool
	}{
		{"the change's", "", "", false},
		{"an empty list", agenttest.Policy + "    egress: []\n", `"message":"reload"`, false},
		{"one that is broken", open + "    egres: []\n", "the policy stays", false},
		{"none", "", "the policy stays", false},
		{"the agent's own", open, `"message":"reload"`, true},
		{"one that is broken, after it", agenttest.Policy + "    egress: [{name: evil.corp}]\n", "the policy stays", true},
		{"an empty list, after it", agenttest.Policy + "    egress: []\n", `"message":"reload"`, false},
	} {
		if step.want != "" {
			reload(step.policy, step.want)
		}
		before, _ := o.seen()
		id := w.Submit(t, workflow)
		ends(t, w, id, providers.Success, "")
		hits, _ := o.seen()
		log := w.Log(t, id)
		if step.open != (hits > before) || step.open != strings.Contains(log, "arrived") || step.open == strings.Contains(log, "closed") {
			t.Errorf("%s: %d requests arrived; its log:\n%s", step.what, hits-before, log)
		}
	}
	out, code := w.Run(t, "audit", "show", "--output", "json")
	if code != 0 || !strings.Contains(out, `"refused"`) || !strings.Contains(out, "web.corp") {
		t.Errorf("the audit (%d) has no refusal:\n%s", code, out)
	}
	a.Stop(t)
	owesNothing(t, w)
}

// TestKilledGateway: with the agent its gateway goes, and with that every
// connection of a job, and no other begins: the job is without a network until it
// is gone.
func TestKilledGateway(t *testing.T) {
	t.Parallel()
	o := newOutside(t)
	w := agenttest.New(t, agenttest.Config{Policy: agenttest.Policy + o.way()})
	a := w.Start(t)
	at := fmt.Sprintf("http://web.corp:%d", o.port)
	id := w.Submit(t, w.Workflow(t, "job", fmt.Sprintf("      - run: |\n          curl -sS %[1]s/held &\n          while :; do curl -sS -m 5 %[1]s/ >/dev/null; done\n", at)))
	agenttest.Eventually(t, time.Minute, "the job has come by", func() bool {
		hits, conns := o.seen()
		return hits > 3 && conns > 0
	})
	a.Kill()
	gone := func() bool {
		_, conns := o.seen()
		return conns == 0
	}
	agenttest.Eventually(t, time.Minute, "no connection is left", gone)
	o.visit(t) // what waited to be accepted came before
	agenttest.Eventually(t, time.Minute, "no connection is left", gone)
	before, _ := o.seen()
	a = w.Start(t) // which ends what is left of the job
	if r := w.Result(t, id, time.Minute); r.Conclusion == providers.Success {
		t.Errorf("the job that nobody drove: %+v", r)
	}
	if after, _ := o.seen(); after != before {
		t.Errorf("%d requests arrived without a gateway", after-before)
	}
	w.Good(t)
	a.Stop(t)
	owesNothing(t, w)
}
