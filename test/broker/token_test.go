package broker_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httputil"
	"net/url"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/gitea"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/test/agenttest"
	"github.com/mayfly-ci/mayfly/test/giteatest"
)

// kept is where the registration of a runner is kept, for one life.
type kept struct {
	mu   sync.Mutex
	text []byte
}

func (k *kept) Load() ([]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.text, nil
}

func (k *kept) Save(b []byte) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.text = b
	return nil
}

// A wire is TLS before a Gitea, which notes what it was sent.
type wire struct {
	to   atomic.Pointer[url.URL]
	mu   sync.Mutex
	sent map[string]bool // passwords of Basic and tokens of API calls
}

func (f *wire) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	_, password, ok := r.BasicAuth()
	if !ok {
		_, password, _ = strings.Cut(r.Header.Get("Authorization"), " ")
	}
	f.mu.Lock()
	f.sent[password] = true
	f.mu.Unlock()
	(&httputil.ReverseProxy{Rewrite: func(p *httputil.ProxyRequest) {
		p.SetURL(f.to.Load())
		p.Out.Host = p.In.Host
		p.Out.Header.Set("X-Forwarded-Proto", "https")
	}}).ServeHTTP(w, r)
}

const tokenPolicy = `version: 1
rules:
  - name: clear
    match: {repository: lab/clear, trust: [fork, branch, protected]}
    timeout: 3m
    provider-token: clear
    egress: &way
      - name: git.corp
        port: %[1]d
        protocol: https
        resolve: [127.0.0.1]
        ca: |
          %[2]s
  - name: withheld
    match: {repository: lab/withheld, trust: [fork, branch, protected]}
    timeout: 3m
    provider-token: withheld
  - name: all
    match: {repository: lab/*, trust: [fork, branch, protected]}
    timeout: 3m
    egress:
      - name: git.corp
        port: %[1]d
        protocol: https
        resolve: [127.0.0.1]
        ca: |
          %[2]s
`

// tokenWorkflow uses the token as jobs do, and says backwards what it is.
const tokenWorkflow = `on: push
jobs:
  job:
    runs-on: mayfly
    env: {T: "${{ secrets.GITEA_TOKEN }}", C: "${{ github.token }}"}
    steps:
      - run: |
          echo "plain $T"
          test "$T" = "$C"
          env | rev
          test -n "$T" || exit 0
          git clone --quiet "https://x:${{ secrets.GITHUB_TOKEN }}@git.corp:%[1]d/$GITHUB_REPOSITORY.git" here
          cd here
          test "$(git rev-parse HEAD)" = "$GITHUB_SHA"
          git tag v1
          git push --quiet origin v1
          echo "repository $(curl -sS -H "Authorization: token $T" https://git.corp:%[1]d/api/v1/repos/$GITHUB_REPOSITORY | head -c 30)"
          echo "foreign $(curl -sS -H "Authorization: token another-token-altogether" https://git.corp:%[1]d/api/v1/user)"
          echo "trip $(curl -sS -H "X-Note: $T" https://git.corp:%[1]d/api/v1/version)"
`

// TestProviderToken: the token that a Gitea gives a job is not in the box, whose
// checkout, push and calls work with what stands in its place; and the two other
// ways that a policy can say.
func TestProviderToken(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	f := &wire{sent: map[string]bool{}}
	cert, ca := certificate(t, "git.corp")
	port := serve(t, cert, f)
	server := giteatest.Start(t, giteatest.Config{Settings: fmt.Sprintf("[server]\nROOT_URL = https://git.corp:%d/\n", port)})
	to, err := url.Parse(server.URL())
	agenttest.Must(t, err)
	f.to.Store(to)
	a := newAgent(t, nil, strings.Replace(fmt.Sprintf(tokenPolicy, port, indented(10, ca)), "&way", "", 1))
	registration, err := server.RegistrationToken(ctx)
	agenttest.Must(t, err)
	provider, err := gitea.New(gitea.Config{
		URL: server.URL(), Runner: "mayfly", Labels: []string{"mayfly"}, Store: &kept{},
		Token: func() (creds.Secret, error) { return creds.NewSecret(registration), nil },
	})
	agenttest.Must(t, err)
	a.cfg.Providers, a.cfg.Once = map[string]providers.Provider{"gitea": provider}, false
	r, err := runner.New(a.cfg, a.state)
	agenttest.Must(t, err)
	lived := make(chan error, 1)
	alive, drain := context.WithCancel(ctx)
	go func() { lived <- r.Run(alive, ctx) }()
	defer func() {
		drain()
		agenttest.Must(t, <-lived)
	}()
	run := func(name string) (log, seen, token string) {
		t.Helper()
		log = pushed(ctx, t, server, name, fmt.Sprintf(tokenWorkflow, port))
		seen = reverse(log)
		if m := regexp.MustCompile(`\nT=(\S*)\n`).FindStringSubmatch(seen); m != nil {
			return log, seen, m[1]
		}
		t.Fatalf("%s: no variable in the log:\n%s", name, log)
		return
	}
	log, _, place := run("app")
	for _, want := range []string{"plain ***\n", `repository {"id":`, "foreign Refused by the policy", "trip Refused by the policy of this job: tripwire"} {
		if !strings.Contains(log, want) {
			t.Errorf("the log lacks %q:\n%s", want, log)
		}
	}
	f.mu.Lock()
	sent := f.sent
	f.sent = map[string]bool{}
	f.mu.Unlock()
	if len(place) != 40 || sent[place] || sent["another-token-altogether"] || len(sent) < 2 {
		t.Errorf("the job has %q; the server was sent %d credentials, %v", place, len(sent), sent[place])
	}
	for token := range sent {
		if token != "" && strings.Contains(log+reverse(log), token) {
			t.Errorf("the job sees the token:\n%s", log)
		}
	}
	a.search(t, place)
	_, _, token := run("clear")
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.sent[token] {
		t.Errorf("in clear the job has %q, which nobody sent", token)
	}
	if _, _, token := run("withheld"); token != "" {
		t.Errorf("a job that gets no token has %q", token)
	}
}

// pushed runs a workflow, which must succeed, and returns what it printed.
func pushed(ctx context.Context, t *testing.T, server *giteatest.Server, name, workflow string) string {
	t.Helper()
	r, err := server.NewRepository(ctx, name)
	agenttest.Must(t, err)
	agenttest.Must(t, server.API(ctx, http.MethodPatch, "/repos/lab/"+name, map[string]any{"private": true}, nil))
	sha, err := r.Push(ctx, map[string]string{filepath.Join(".gitea/workflows/ci.yml"): workflow})
	agenttest.Must(t, err)
	id, err := r.Pushed(ctx, sha)
	agenttest.Must(t, err)
	jobs, err := r.Wait(ctx, id)
	agenttest.Must(t, err)
	log, err := r.Log(ctx, jobs[0].ID)
	agenttest.Must(t, err)
	log = giteatest.Printed(log)
	if len(jobs) != 1 || jobs[0].Conclusion != "success" {
		t.Fatalf("%s: %+v:\n%s", name, jobs, log)
	}
	return log
}
