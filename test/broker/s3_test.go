package broker_test

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/test/agenttest"
	"github.com/mayfly-ci/mayfly/test/servertest"
)

// A minio is a real object store, with TLS of its own.
type minio struct {
	port    int
	ca      string
	caFile  string
	clients string // the program of real client libraries
	root    [2]string
}

// startMinio starts one that ends with the test.
func startMinio(t *testing.T) *minio {
	t.Helper()
	programs, err := servertest.Dir(t.Context(), "minio")
	agenttest.Must(t, err)
	clients, err := servertest.Dir(t.Context(), "clients")
	agenttest.Must(t, err)
	dir := t.TempDir()
	m := &minio{clients: filepath.Join(clients, "clients"), caFile: filepath.Join(dir, "public.crt"), root: [2]string{"administrator", "administrators-password"}}
	cert, ca := certificate(t, "s3.corp")
	m.ca = ca
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	agenttest.Must(t, err)
	agenttest.Must(t, os.WriteFile(m.caFile, []byte(ca), 0o600))
	agenttest.Must(t, os.WriteFile(filepath.Join(dir, "private.key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}), 0o600))
	for range 5 { // the port may have been taken by somebody else
		if m.start(t, programs, dir) {
			return m
		}
	}
	t.Fatal("minio does not start")
	return nil
}

// start starts the server and says whether it came to answer.
func (m *minio) start(t *testing.T, programs, dir string) bool {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	agenttest.Must(t, err)
	m.port = l.Addr().(*net.TCPAddr).Port
	agenttest.Must(t, l.Close())
	cmd := exec.Command(filepath.Join(programs, "minio"), "server", "--quiet", "--certs-dir", dir, "--address", fmt.Sprintf("127.0.0.1:%d", m.port), filepath.Join(dir, "data"))
	cmd.Env = []string{"HOME=" + dir, "MINIO_ROOT_USER=" + m.root[0], "MINIO_ROOT_PASSWORD=" + m.root[1], "MINIO_BROWSER=off", "MINIO_UPDATE=off"}
	ended := background(t, "minio", cmd)
	dead := false
	agenttest.Eventually(t, bound, "minio answers", func() bool {
		select {
		case <-ended:
			dead = true
			return true
		default:
			_, err := m.session(t.Context(), "artifacts")
			return err == nil
		}
	})
	return !dead
}

// session is a new key, id, secret and session token, for one bucket.
func (m *minio) session(ctx context.Context, bucket string) ([]string, error) {
	cmd := exec.CommandContext(ctx, m.clients, "s3-session", fmt.Sprintf("https://127.0.0.1:%d", m.port), bucket)
	cmd.Env = []string{"SSL_CERT_FILE=" + m.caFile, "AWS_ACCESS_KEY_ID=" + m.root[0], "AWS_SECRET_ACCESS_KEY=" + m.root[1]}
	out, err := cmd.CombinedOutput()
	key := strings.Fields(string(out))
	if err == nil && len(key) != 3 {
		err = fmt.Errorf("%d words: %s", len(key), out)
	}
	return key, err
}

// keys issues keys of the store, which end by themselves.
type keys struct {
	lasting
	*minio
	last []string
}

func (k *keys) Issue(ctx context.Context, _ string, g creds.Grant) (creds.Lease, error) {
	key, err := k.session(ctx, "artifacts")
	if err != nil {
		return creds.Lease{}, err
	}
	k.last = key
	return creds.Lease{
		Values: map[string]creds.Secret{"secret_access_key": creds.NewSecret(key[1]), "session_token": creds.NewSecret(key[2])},
		Facts:  map[string]string{"access_key_id": key[0]}, ByName: true, ExpiresAt: g.Expires,
	}, nil
}

const s3Policy = `version: 1
rules:
  - name: all
    match: {trust: local}
    timeout: 3m
    limits: {memory: 1GiB, pids: 256, disk: 512MiB, log: 4MiB}
    egress:
      - {name: files.corp, port: %[3]d, protocol: http, resolve: [127.0.0.1]}
    leases:
      - issuer: minio
        name: s3
        tools: [aws]
        env: {AWS_ACCESS_KEY_ID: access_key_id, AWS_SECRET_ACCESS_KEY: secret_access_key, AWS_SESSION_TOKEN: session_token}
        broker:
          - name: s3.corp
            port: %[1]d
            as: aws-sigv4
            value: secret_access_key
            with: {key_id: access_key_id, session: session_token, regions: [us-east-1], services: [s3]}
            resolve: [127.0.0.1]
            ca: |
              %[2]s
`

// TestS3: unmodified clients of S3 sign with a key that is good for nothing, and
// the store gets the signatures of the real one, which is not in the box.
func TestS3(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	m := startMinio(t)
	_, err := m.session(ctx, "other")
	agenttest.Must(t, err)
	files := httptest.NewServer(http.FileServer(http.Dir(filepath.Dir(m.clients))))
	t.Cleanup(files.Close)
	port := files.Listener.Addr().(*net.TCPAddr).Port
	issuer := &keys{minio: m}
	a := newAgent(t, map[string]creds.Issuer{"minio": issuer}, fmt.Sprintf(s3Policy, m.port, indented(14, m.ca), port))
	conclusion, log := a.run(ctx, t, fmt.Sprintf(`      - run: |
          curl -sS -o clients http://files.corp:%d/clients
          chmod +x clients
          ./clients s3 https://s3.corp:%d artifacts
          env -u AWS_ACCESS_KEY_ID -u AWS_SECRET_ACCESS_KEY -u AWS_SESSION_TOKEN ./clients s3-chain https://s3.corp:%[2]d artifacts
          curl -sS -H "Authorization: $AWS_CONTAINER_AUTHORIZATION_TOKEN" "$AWS_CONTAINER_CREDENTIALS_FULL_URI" | rev
          echo "guess $(curl -sS -H 'Authorization: x' "$AWS_CONTAINER_CREDENTIALS_FULL_URI")"
          env | rev
          curl -sS -H "X-Note: $AWS_SECRET_ACCESS_KEY" https://s3.corp:%[2]d/
`, port, m.port))
	if conclusion != providers.Success {
		t.Fatalf("%s:\n%s", conclusion, log)
	}
	const by = `: failed: .*(Refused by the policy of this job: |StatusCode: 403)`
	for _, want := range []string{
		"put and get: ok", "ranges: ok", "odd names: ok", "gzip: ok", "multipart: ok", "unsigned trailer: ok", "presigned: ok", "found by CredentialsEndpointProvider.*: ok", "chain: ok", `guess \{"message":"the request token is not`, "signed chunks: ok", "signed trailer: ok",
		"changed chunk: failed", "changed trailer: failed", "foreign key" + by, "wrong secret" + by, "other region" + by,
		"unsigned: failed: 403 Forbidden: Refused by the policy of this job: .* the request is not signed",
		"absent: failed: .*NoSuchKey", "other bucket: failed: .*AccessDenied", "tripwire: the placeholder of lease s3",
	} {
		if !regexp.MustCompile(want).MatchString(log) {
			t.Errorf("the log lacks %q", want)
		}
	}
	seen := reverse(log)
	for i, name := range []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"} {
		v := regexp.MustCompile(`\n` + name + `=(\S+)`).FindStringSubmatch(seen)
		if v == nil || v[1] == issuer.last[i] || len(v[1]) != len(issuer.last[i]) || strings.Contains(log+seen, issuer.last[i]) {
			t.Errorf("%s in the job is %v", name, v)
		}
		a.search(t, issuer.last[i])
	}
	if t.Failed() {
		t.Log(log)
	}
}
