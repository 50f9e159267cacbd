package broker_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/test/agenttest"
	"github.com/mayfly-ci/mayfly/test/giteatest"
	"github.com/mayfly-ci/mayfly/test/servertest"
)

// A depot is Debian's docker-registry, which takes the tokens of a realm that is
// this process.
type depot struct {
	password string
	cert     tls.Certificate
	port     int // of the registry

	mu     sync.Mutex
	tokens map[string]bool // that were given
	asked  []string        // scopes, of who had the password
	denied int             // who had not
}

const depotConfig = `version: 0.1
storage: {filesystem: {rootdirectory: %[1]s/data}, delete: {enabled: true}}
http: {addr: "127.0.0.1:%[2]d", tls: {certificate: %[1]s/cert.pem, key: %[1]s/key.pem}}
auth: {token: {realm: "https://auth.corp:%[3]d/token", service: images.corp, issuer: realm, rootcertbundle: %[1]s/cert.pem}}
`

// startDepot starts both.
func startDepot(t *testing.T) (d *depot, realm int, ca string) {
	t.Helper()
	d = &depot{password: "the-registrys-own-password-1", tokens: map[string]bool{}}
	d.cert, ca = certificate(t, "images.corp")
	realmCert, realmCA := certificate(t, "auth.corp")
	realm = serve(t, realmCert, d)
	dir := t.TempDir()
	key, err := x509.MarshalPKCS8PrivateKey(d.cert.PrivateKey)
	agenttest.Must(t, err)
	agenttest.Must(t, os.WriteFile(filepath.Join(dir, "cert.pem"), []byte(ca), 0o600))
	agenttest.Must(t, os.WriteFile(filepath.Join(dir, "key.pem"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}), 0o600))
	for range 5 { // the port may have been taken by somebody else
		if d.start(t, dir, realm) {
			return d, realm, ca + realmCA
		}
	}
	t.Fatal("docker-registry does not start")
	return nil, 0, ""
}

// start starts the registry and says whether it came to answer.
func (d *depot) start(t *testing.T, dir string, realm int) bool {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	agenttest.Must(t, err)
	d.port = l.Addr().(*net.TCPAddr).Port
	agenttest.Must(t, l.Close())
	agenttest.Must(t, os.WriteFile(filepath.Join(dir, "config.yml"), fmt.Appendf(nil, depotConfig, dir, d.port, realm), 0o600))
	ended := background(t, "docker-registry (make engine installs it)", exec.Command("docker-registry", "serve", filepath.Join(dir, "config.yml")))
	dead := false
	agenttest.Eventually(t, bound, "docker-registry answers", func() bool {
		select {
		case <-ended:
			dead = true
			return true
		default:
			return d.status(t, "") == http.StatusUnauthorized
		}
	})
	return !dead
}

// background starts a program that ends with the test at the latest.
func background(t *testing.T, what string, cmd *exec.Cmd) (ended chan struct{}) {
	t.Helper()
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	agenttest.Must(t, err)
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	ended = make(chan struct{})
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // the death signal is bound to the thread
		defer runtime.UnlockOSThread()
		defer close(ended)
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // it is killed
		}
	}()
	if err := <-started; err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may be gone
		<-ended
		if text, _ := os.ReadFile(log.Name()); t.Failed() {
			t.Logf("%s: %s", what, text)
		}
	})
	return ended
}

// status is how the registry answers who shows it a token.
func (d *depot) status(t *testing.T, token string) int {
	t.Helper()
	pool := x509.NewCertPool()
	leaf, err := x509.ParseCertificate(d.cert.Certificate[0])
	agenttest.Must(t, err)
	pool.AddCert(leaf)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, DisableKeepAlives: true}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, fmt.Sprintf("https://127.0.0.1:%d/v2/", d.port), nil)
	agenttest.Must(t, err)
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return 0
	}
	agenttest.Must(t, resp.Body.Close())
	return resp.StatusCode
}

// ServeHTTP is the realm: it gives whatever is asked for to who has the password.
func (d *depot) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if user, password, _ := r.BasicAuth(); user != "robot" || password != d.password {
		d.denied++
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	type access struct {
		Type    string   `json:"type"`
		Name    string   `json:"name"`
		Actions []string `json:"actions"`
	}
	var all []access
	for _, scope := range r.URL.Query()["scope"] {
		d.asked = append(d.asked, scope)
		if p := strings.Split(scope, ":"); len(p) == 3 {
			all = append(all, access{p[0], p[1], strings.Split(p[2], ",")})
		}
	}
	token, err := d.sign(map[string]any{
		"iss": "realm", "sub": "robot", "aud": r.URL.Query().Get("service"), "jti": rand.Text(), "access": all,
		"exp": time.Now().Add(5 * time.Minute).Unix(), "nbf": time.Now().Add(-time.Minute).Unix(), "iat": time.Now().Unix(),
	})
	if err != nil {
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	d.tokens[token] = true
	_ = json.NewEncoder(w).Encode(map[string]any{"token": token, "expires_in": 300}) // the client may be gone
}

// sign makes a token that has its certificate with it (RFC 7515).
func (d *depot) sign(claims any) (string, error) {
	header, err := json.Marshal(map[string]any{"typ": "JWT", "alg": "ES256", "x5c": []string{base64.StdEncoding.EncodeToString(d.cert.Certificate[0])}})
	if err != nil {
		return "", err
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		return "", err
	}
	text := base64.RawURLEncoding.EncodeToString(header) + "." + base64.RawURLEncoding.EncodeToString(payload)
	sum := sha256.Sum256([]byte(text))
	key, ok := d.cert.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		return "", fmt.Errorf("key of %T", d.cert.PrivateKey.(crypto.Signer))
	}
	r, s, err := ecdsa.Sign(rand.Reader, key, sum[:])
	if err != nil {
		return "", err
	}
	signature := append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)
	return text + "." + base64.RawURLEncoding.EncodeToString(signature), nil
}

// lasting is what issuers have in common that nobody can ask to end a credential.
type lasting struct{}

func (lasting) Revoke(context.Context, string, []byte) error { return creds.ErrNotRevocable }
func (lasting) Probe(context.Context, string, []byte) (creds.Proof, error) {
	return creds.Proof{}, creds.ErrNotRevocable
}
func (lasting) List(context.Context) ([]creds.Info, error) { return nil, nil }

// passwords issues the password of a registry.
type passwords struct {
	lasting
	password string
}

func (p passwords) Issue(_ context.Context, _ string, g creds.Grant) (creds.Lease, error) {
	return creds.Lease{
		Values: map[string]creds.Secret{"password": creds.NewSecret(p.password)}, Facts: map[string]string{"username": "robot"},
		ByName: true, ExpiresAt: g.Expires,
	}, nil
}

const registryPolicy = `version: 1
rules:
  - name: all
    match: {trust: local}
    timeout: 3m
    limits: {memory: 1GiB, pids: 256, disk: 512MiB, log: 4MiB}
    egress:
      - {name: files.corp, port: %[3]d, protocol: http, resolve: [127.0.0.1]}
    leases:
      - issuer: images
        name: images
        env: {IMAGES_USER: username, IMAGES_PASSWORD: password}
        broker:
          - name: %[5]s
            port: %[1]d
            as: oci-registry
            value: password
            user: username
            resolve: [127.0.0.1]
            ca: |
              %[2]s
            with:
              realm: %[4]s
              service: %[6]s
              scopes: ["repository:lab/app:pull,push"]
%[7]s`

// imageSteps use the registry as a docker with a configuration does, and as one
// without; and say what the client was sent.
const imageSteps = `      - run: |
          curl -sS -o clients http://files.corp:%[1]d/clients
          chmod +x clients
          export DOCKER_CONFIG=$PWD/docker
          mkdir docker
          printf '{"auths":{"%[2]s":{"auth":"%%s"}}}' "$(printf '%%s:%%s' me "$IMAGES_PASSWORD" | base64 -w0)" >docker/config.json
          echo "# with a placeholder"
          ./clients image %[2]s/lab/app %[2]s/lab/other
          rm docker/config.json
          echo "# with nothing"
          ./clients image %[2]s/lab/app %[2]s/lab/other
          token=$(curl -sS "%[3]s?service=%[4]s&scope=repository:lab/app:pull" | sed 's/.*"token":"\([^"]*\)".*/\1/')
          echo "token $token" | rev
          echo "list $(curl -sS -H "Authorization: Bearer $token" https://%[2]s/v2/lab/app/tags/list)"
          echo "wider $(curl -sS "%[3]s?service=%[4]s&scope=repository:lab/other:pull")"
          echo "password $(curl -sS -H "Authorization: Bearer $IMAGES_PASSWORD" https://%[2]s/v2/lab/app/tags/list)"
          echo "foreign $(curl -sS -H "Authorization: Bearer attacker" https://%[2]s/v2/lab/app/tags/list)"
          env | rev
`

// files serves the program of real client libraries.
func files(t *testing.T) (port int) {
	t.Helper()
	clients, err := servertest.Dir(t.Context(), "clients")
	agenttest.Must(t, err)
	s := httptest.NewServer(http.FileServer(http.Dir(clients)))
	t.Cleanup(s.Close)
	return s.Listener.Addr().(*net.TCPAddr).Port
}

// judgeImages wants what imageSteps do to work where it may, and returns the
// token that the job has.
func judgeImages(t *testing.T, log string) (token string) {
	t.Helper()
	for _, want := range []string{
		"\ntoken mayfly-", `list {"name":"`, "other repository: failed: ", "delete: failed: ",
		"wider Refused by the policy of this job: the rule asks for no token with the scope",
		"password Refused by the policy of this job: tripwire: the placeholder of lease images",
		"foreign Refused by the policy of this job: the rule has a credential of its own",
	} {
		if !strings.Contains(log+reverse(log), want) {
			t.Errorf("the log lacks %q", want)
		}
	}
	for _, want := range []string{"\npush: ok\n", "\npull: ok\n"} {
		if strings.Count(log, want) != 2 {
			t.Errorf("the log has %q %d times, want 2", want, strings.Count(log, want))
		}
	}
	_, rest, _ := strings.Cut(reverse(log), "\ntoken ")
	token, _, _ = strings.Cut(rest, "\n")
	return token
}

// TestImages: an unmodified client of registries pushes to and pulls from Debian's
// docker-registry by tokens of a realm, and neither the password nor a token is
// in the box. The registry and the realm refuse what is in the box.
func TestImages(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	d, realm, ca := startDepot(t)
	port := files(t)
	at := fmt.Sprintf("https://auth.corp:%d/token", realm)
	text := fmt.Sprintf(registryPolicy, d.port, indented(14, ca), port, at, "images.corp", "images.corp",
		"              resolve: [127.0.0.1]\n              ca: |\n                "+indented(16, ca)+"\n")
	a := newAgent(t, map[string]creds.Issuer{"images": passwords{password: d.password}}, text)
	host := fmt.Sprintf("images.corp:%d", d.port)
	conclusion, log := a.run(ctx, t, fmt.Sprintf(imageSteps, port, host, at, "images.corp"))
	if conclusion != providers.Success {
		t.Fatalf("%s:\n%s", conclusion, log)
	}
	token := judgeImages(t, log)
	seen := log + reverse(log)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.denied > 0 || len(d.tokens) == 0 || d.tokens[token] {
		t.Errorf("the realm gave %d tokens and denied %d; the job has one of them: %v", len(d.tokens), d.denied, d.tokens[token])
	}
	for real := range d.tokens {
		if strings.Contains(seen, real) {
			t.Error("the job sees a token")
		}
		if status := d.status(t, real); status != http.StatusOK {
			t.Errorf("the registry answers a real token with %d", status)
		}
	}
	if strings.Contains(seen, d.password) || d.status(t, token) != http.StatusUnauthorized {
		t.Error("the job sees the password, or the registry takes what stands for a token")
	}
	if asked := strings.Join(d.asked, "\n"); strings.Contains(asked, "other") || strings.Contains(asked, "delete") {
		t.Errorf("the realm was asked for %s", asked)
	}
	a.search(t, d.password, token)
	if t.Failed() {
		t.Log(log)
	}
}

// packages issues access tokens of a Gitea for its registry.
type packages struct{ *tokens }

func (i packages) Issue(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
	token, err := i.server.NewToken(ctx, name, "write:package", "read:user")
	i.last = token
	return creds.Lease{
		Values: map[string]creds.Secret{"password": creds.NewSecret(token)}, Facts: map[string]string{"username": giteatest.Admin},
		Handle: []byte(token), ByName: true, ExpiresAt: g.Expires,
	}, err
}

// TestImagesOfGitea: the same at a Gitea, whose realm is the registry itself, and
// whose tokens are good for all that the user may: the gateway alone holds the
// job to its scope.
func TestImagesOfGitea(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	f := &wire{sent: map[string]bool{}}
	cert, ca := certificate(t, "git.corp")
	to := serve(t, cert, f)
	server := giteatest.Start(t, giteatest.Config{Settings: fmt.Sprintf("[server]\nROOT_URL = https://git.corp:%d/\n", to)})
	u, err := url.Parse(server.URL())
	agenttest.Must(t, err)
	f.to.Store(u)
	port, host := files(t), fmt.Sprintf("git.corp:%d", to)
	at := "https://" + host + "/v2/token"
	issuer := packages{&tokens{server: server}}
	a := newAgent(t, map[string]creds.Issuer{"images": issuer},
		fmt.Sprintf(registryPolicy, to, indented(14, ca), port, at, "git.corp", "container_registry", ""))
	conclusion, log := a.run(ctx, t, fmt.Sprintf(imageSteps, port, host, at, "container_registry"))
	if conclusion != providers.Success {
		t.Fatalf("%s:\n%s", conclusion, log)
	}
	token := judgeImages(t, log)
	seen := log + reverse(log)
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.sent[issuer.last] || f.sent[token] || strings.Contains(seen, issuer.last) {
		t.Errorf("the server was sent the password: %v; what stands for a token: %v", f.sent[issuer.last], f.sent[token])
	}
	for real := range f.sent {
		if real != "" && strings.Contains(seen, real) {
			t.Error("the job sees a token")
		}
	}
	a.search(t, issuer.last, token)
	if t.Failed() {
		t.Log(log)
	}
}
