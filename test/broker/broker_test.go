// Package broker_test runs git and curl in a real box against a real Gitea, with
// a token that the box does not hold.
package broker_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/local"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/audit"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/egress/gateway"
	"github.com/mayfly-ci/mayfly/sandbox/guest"
	"github.com/mayfly-ci/mayfly/sandbox/native"
	"github.com/mayfly-ci/mayfly/test/agenttest"
	"github.com/mayfly-ci/mayfly/test/giteatest"
	"github.com/mayfly-ci/mayfly/test/servertest"
)

func TestMain(m *testing.M) {
	if err := errors.Join(giteatest.Prepare(), servertest.Prepare("minio", "clients", "actions")); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	agenttest.Main(m)
}

// bound is for anything that takes seconds on a quiet machine.
const bound = 3 * time.Minute

// tokens issues access tokens of a Gitea, each for one job.
type tokens struct {
	server *giteatest.Server
	mu     sync.Mutex
	last   string
}

func (i *tokens) Issue(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
	token, err := i.server.NewToken(ctx, name, "write:repository", "read:user")
	i.mu.Lock()
	i.last = token
	i.mu.Unlock()
	return creds.Lease{
		Values: map[string]creds.Secret{"token": creds.NewSecret(token)}, Facts: map[string]string{"username": giteatest.Admin},
		Handle: []byte(token), ByName: true, ExpiresAt: g.Expires,
	}, err
}

func (i *tokens) Revoke(ctx context.Context, name string, _ []byte) error {
	return i.server.DeleteToken(ctx, name)
}

func (i *tokens) Probe(ctx context.Context, _ string, token []byte) (creds.Proof, error) {
	status, err := i.use(ctx, string(token))
	if err == nil && status != http.StatusUnauthorized {
		err = creds.ErrStillValid
	}
	return creds.Proof{At: time.Now(), How: "GET /api/v1/user", Refusal: fmt.Sprint(status)}, err
}

func (i *tokens) List(context.Context) ([]creds.Info, error) { return nil, errors.ErrUnsupported }

// use shows a token to the server.
func (i *tokens) use(ctx context.Context, token string) (int, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, i.server.URL()+"/api/v1/user", nil)
	if err != nil {
		return 0, err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	return resp.StatusCode, resp.Body.Close()
}

// front puts TLS before the server, and says at /echo what it was sent.
func front(t *testing.T, server *giteatest.Server) (port int, ca string) {
	t.Helper()
	cert, ca := certificate(t, "git.corp")
	to, err := url.Parse(server.URL())
	agenttest.Must(t, err)
	mux := http.NewServeMux()
	mux.Handle("/", httputil.NewSingleHostReverseProxy(to))
	mux.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Echo", r.Header.Get("Authorization"))
		fmt.Fprintf(w, "echo %s\n", r.Header.Get("Authorization"))
	})
	mux.HandleFunc("/v2/", func(w http.ResponseWriter, r *http.Request) { registry(w, r, server.URL()) })
	return serve(t, cert, mux), ca
}

// registry is one of images that takes the server's tokens for passwords.
func registry(w http.ResponseWriter, r *http.Request, server string) {
	user, password, _ := r.BasicAuth()
	req, err := http.NewRequestWithContext(r.Context(), http.MethodGet, server+"/api/v1/user", nil)
	if err == nil {
		req.SetBasicAuth(user, password)
	}
	res, err := http.DefaultClient.Do(req)
	if err == nil {
		err = res.Body.Close()
	}
	if err != nil || res.StatusCode != http.StatusOK {
		w.Header().Set("WWW-Authenticate", `Basic realm="registry"`)
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	fmt.Fprint(w, `{"name": "lab/app", "tags": ["v1"]}`)
}

// serve serves https on this machine.
func serve(t *testing.T, cert tls.Certificate, h http.Handler) (port int) {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	s.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
	s.EnableHTTP2 = true
	s.StartTLS()
	t.Cleanup(s.Close)
	return s.Listener.Addr().(*net.TCPAddr).Port
}

// certificate is one that signs itself, for a name and for this machine.
func certificate(t *testing.T, name string) (tls.Certificate, string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	agenttest.Must(t, err)
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{name}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	agenttest.Must(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// indented is text below a key of the policy that stands n columns in.
func indented(n int, text string) string {
	return strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n"+strings.Repeat(" ", n))
}

// policyText has two ways to authenticate to one server.
const policyText = `version: 1
rules:
  - name: all
    match: {trust: local}
    timeout: 3m
    limits: {memory: 1GiB, pids: 256, disk: 512MiB, log: 4MiB}
    egress:
      - {name: files.corp, port: %[3]d, protocol: http, resolve: [127.0.0.1]}
    leases:
      - issuer: gitea
        name: git
        env: {GIT_TOKEN: token, GIT_USER: username}
        tools: [git, docker]
        files: {token: token}
        broker:
          - name: git.corp
            port: %[1]d
            as: basic
            value: token
            absent: pass
            resolve: [127.0.0.1]
            ca: |
              %[2]s
            requests:
              - {methods: [GET], path: /lab/app.git/info/refs, query: [service]}
              - {methods: [POST], path: /lab/app.git/git-upload-pack}
              - {methods: [POST], path: /lab/app.git/git-receive-pack}
              - {methods: [GET], path: "/v2/**"}
          - name: git.corp
            port: %[1]d
            as: bearer
            value: token
            resolve: [127.0.0.1]
            ca: |
              %[2]s
            requests:
              - {methods: [GET], path: /api/v1/user}
              - {methods: [GET], path: /echo}
`

// steps say what they see backwards, since the log is masked.
const steps = `      - run: |
          set -e
          U=https://git.corp:%[1]d
          git clone -q https://$GIT_USER:$GIT_TOKEN@git.corp:%[1]d/lab/app.git work
          cd work
          git -c user.name=a -c user.email=a@b.c commit -q --allow-empty -m pushed
          GIT_TRACE_CURL=1 GIT_TRACE_REDACT=0 git push -q origin HEAD:main 2>&1 | rev
          git ls-remote origin
          git clone -q $U/lab/app.git ../helped
          git -C ../helped push -q origin HEAD:helped
          GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=a.b GIT_CONFIG_VALUE_0=c GIT_TERMINAL_PROMPT=0 git ls-remote $U/lab/app.git 2>&1 | sed 's/^/unhelped /'
          curl -sS -o ../clients http://files.corp:%[2]d/clients
          chmod +x ../clients
          ../clients registry git.corp:%[1]d lab/app
          DOCKER_CONFIG=/nowhere ../clients registry git.corp:%[1]d lab/app
          echo "user $(curl -sS -H "Authorization: Bearer $GIT_TOKEN" $U/api/v1/user)"
          curl -sSv -H "Authorization: Bearer $GIT_TOKEN" $U/echo 2>&1 | rev
          curl -sS $U/echo
          echo "foreign $(curl -sS -H 'Authorization: Bearer attacker' $U/api/v1/user)"
          echo "trip $(curl -sS -H "X-Note: $GIT_TOKEN" $U/api/v1/user)"
          if git clone -q https://$GIT_USER:$GIT_TOKEN@git.corp:%[1]d/lab/other.git; then exit 1; fi
          cat /proc/*/environ /run/mayfly/secrets/* /proc/*/cmdline 2>/dev/null | tr '\0' '\n' | rev
          grep -rhs . .git/config | rev
          env | rev
`

// TestGit: git and curl use a token that is not in the box; the server refuses
// what is in the box, and after the job the token too.
func TestGit(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	server := giteatest.Start(t, giteatest.Config{})
	for _, name := range []string{"app", "other"} {
		_, err := server.NewRepository(ctx, name)
		agenttest.Must(t, err)
		agenttest.Must(t, server.API(ctx, http.MethodPatch, "/repos/lab/"+name, map[string]any{"private": true}, nil))
	}
	port, ca := front(t, server)
	programs, err := servertest.Dir(ctx, "clients")
	agenttest.Must(t, err)
	files := httptest.NewServer(http.FileServer(http.Dir(programs)))
	t.Cleanup(files.Close)
	at := files.Listener.Addr().(*net.TCPAddr).Port
	issuer := &tokens{server: server}
	a := newAgent(t, map[string]creds.Issuer{"gitea": issuer}, fmt.Sprintf(policyText, port, indented(14, ca), at))
	conclusion, log := a.run(ctx, t, fmt.Sprintf(steps, port, at))
	if conclusion != providers.Success {
		t.Fatalf("%s:\n%s", conclusion, log)
	}
	for _, want := range []string{
		`"login":"lab"`, "refs/heads/main", "tags [v1]: ok", "tags []: failed: ", "unhelped fatal: could not read Username", "echo Bearer ***", "foreign Refused by the policy of this job: the rule has a credential of its own",
		"trip Refused by the policy of this job: tripwire: the placeholder of lease git",
	} {
		if !strings.Contains(log, want) {
			t.Errorf("the log lacks %q:\n%s", want, log)
		}
	}
	var commits []struct{ Commit struct{ Message string } }
	agenttest.Must(t, server.API(ctx, http.MethodGet, "/repos/lab/app/commits", nil, &commits))
	if len(commits) == 0 || commits[0].Commit.Message != "pushed\n" && commits[0].Commit.Message != "pushed" {
		t.Errorf("the server has %+v", commits)
	}
	seen := reverse(log)
	m := regexp.MustCompile(`GIT_TOKEN=([0-9a-f]{40})\n`).FindStringSubmatch(seen)
	if m == nil || m[1] == issuer.last || strings.Count(seen, m[1]) < 4 {
		t.Fatalf("the job sees no placeholder (%v):\n%s", m, seen)
	}
	for _, text := range []string{log, seen} {
		if strings.Contains(text, issuer.last) {
			t.Errorf("the job sees the token:\n%s", text)
		}
	}
	for what, token := range map[string]string{"placeholder": m[1], "token after the job": issuer.last} {
		if status, err := issuer.use(ctx, token); err != nil || status != http.StatusUnauthorized {
			t.Errorf("the server takes the %s: %d %v", what, status, err)
		}
	}
	a.search(t, issuer.last, m[1])
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

func newAgent(t *testing.T, issuers map[string]creds.Issuer, text string) *agent {
	t.Helper()
	a := &agent{dir: t.TempDir()}
	var err error
	a.state, err = runner.OpenState(filepath.Join(a.dir, "state"))
	agenttest.Must(t, err)
	t.Cleanup(func() { agenttest.Must(t, a.state.Close()) })
	program, err := guest.Binary()
	agenttest.Must(t, err)
	boxes, err := native.New(native.Config{
		StateDir: filepath.Join(a.dir, "native"), Owner: a.state.Owner, Guest: program, FirstID: 1<<30 + 1<<27, Slots: 4,
		CgroupParent: fmt.Sprintf("mayfly-broker-%d", os.Getpid()),
	})
	agenttest.Must(t, err)
	rules, err := policy.Parse([]byte(text), "policy.yaml")
	agenttest.Must(t, err)
	way, err := gateway.New(gateway.Config{})
	agenttest.Must(t, err)
	spool, err := local.New(local.Config{Dir: filepath.Join(a.dir, "spool")})
	agenttest.Must(t, err)
	record, err := audit.OpenFile(filepath.Join(a.dir, "audit"), audit.FileOptions{})
	agenttest.Must(t, err)
	a.cfg = runner.Config{
		Providers: map[string]providers.Provider{"local": spool}, Runtimes: map[string]sandbox.Runtime{"native": boxes},
		Issuers: issuers, Gateway: way, Policy: rules, Audit: record, Log: zerolog.Nop(), Slots: 1, Once: true,
	}
	return a
}

// run runs one job of these steps to its end.
func (a *agent) run(ctx context.Context, t *testing.T, steps string) (providers.Conclusion, string) {
	t.Helper()
	w := agenttest.World{Repository: filepath.Join(a.dir, "repository"), Spool: filepath.Join(a.dir, "spool")}
	agenttest.Must(t, os.MkdirAll(w.Repository, 0o755))
	gitInit(t, w.Repository)
	id := w.Submit(t, w.Workflow(t, "git", steps))
	r, err := runner.New(a.cfg, a.state)
	agenttest.Must(t, err)
	agenttest.Must(t, r.Run(ctx, ctx))
	return providers.Conclusion(w.Result(t, id, bound).Conclusion), w.Log(t, id)
}

// search wants neither the token nor what stood in its place in what the agent
// keeps.
func (a *agent) search(t *testing.T, words ...string) {
	t.Helper()
	n := 0
	err := filepath.WalkDir(a.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || strings.HasPrefix(path, filepath.Join(a.dir, "spool")) {
			return err
		}
		if strings.HasPrefix(d.Name(), "disk-") { // what boxes begin with: gigabytes of holes, older than the token
			return nil
		}
		b, err := os.ReadFile(path)
		for i, w := range words {
			if strings.Contains(string(b), w) {
				t.Errorf("%s has word %d", path, i)
			}
		}
		n++
		return err
	})
	if err != nil || n < 3 {
		t.Errorf("searched %d files: %v", n, err)
	}
}

func gitInit(t *testing.T, dir string) {
	t.Helper()
	if out, err := exec.Command("git", "init", "-q", "-b", "main", dir).CombinedOutput(); err != nil {
		t.Fatalf("git init: %v: %s", err, out)
	}
}
