// Package https_test runs the programs that jobs use, on the real agent, against
// servers whose TLS ends at the gateway.
package https_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/test/agenttest"
	"github.com/mayfly-ci/mayfly/test/servertest"
)

func TestMain(m *testing.M) {
	if err := servertest.Prepare("clients"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	agenttest.Main(m)
}

// bound is for anything that takes seconds on a quiet machine.
const bound = 3 * time.Minute

// names are those of the server, beside one that no rule has.
func names() []string { return []string{"web.corp", "a.pages.corp", "other.corp"} }

// serve starts the server and returns its port and its authority as PEM.
func serve(t *testing.T) (port int, ca string) {
	t.Helper()
	return serveHandler(t, programs(t))
}

// serveHandler serves what the handler does.
func serveHandler(t *testing.T, h http.Handler) (port int, ca string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	agenttest.Must(t, err)
	c := &x509.Certificate{
		DNSNames: names(), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	agenttest.Must(t, err)
	s := httptest.NewUnstartedServer(h)
	s.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	s.EnableHTTP2 = true
	s.StartTLS()
	t.Cleanup(s.Close)
	return s.Listener.Addr().(*net.TCPAddr).Port, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// programs is what the programs of TestPrograms ask.
func programs(t *testing.T) http.Handler {
	t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc("/hello", func(w http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body) // a body that breaks off is not answered
		fmt.Fprintf(w, "hello %s %s %d\n", strings.Split(r.Host, ":")[0], r.Proto, n)
	})
	mux.HandleFunc("/away", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, strings.Replace("https://"+r.Host+"/hello", "web.corp", "other.corp", 1), http.StatusFound)
	})
	mux.Handle("/git/", &cgi.Handler{
		Path: filepath.Join(gitPrograms(t), "git-http-backend"), Root: "/git",
		Env: []string{"GIT_PROJECT_ROOT=" + repositories(t), "GIT_HTTP_EXPORT_ALL=1", "REMOTE_USER=job"},
	})
	return mux
}

func gitPrograms(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("git", "--exec-path").Output()
	agenttest.Must(t, err)
	return strings.TrimSpace(string(out))
}

// repositories are two, of which the job may have one.
func repositories(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"acme/app.git", "acme/other.git"} {
		for _, args := range [][]string{
			{"init", "-q", "--bare", "-b", "main", filepath.Join(dir, name)},
			{"-C", filepath.Join(dir, name), "config", "http.receivepack", "true"},
		} {
			if out, err := exec.Command("git", args...).CombinedOutput(); err != nil {
				t.Fatalf("git %q: %v: %s", args, err, out)
			}
		}
	}
	return dir
}

const policy = `version: 1
rules:
  - name: all
    match: {trust: local}
    timeout: 3m
    limits: {memory: 1GiB, pids: 256, disk: 512MiB, log: 1MiB}
    egress:
      - name: web.corp
        port: %[1]d
        protocol: https
        resolve: [127.0.0.1]
        ca: |
          %[2]s
        requests:
          - {methods: [GET], path: /hello}
          - {methods: [POST], path: /hello, sent: 1MiB}
          - {methods: [GET], path: /away}
          - {methods: [GET], path: /git/acme/app.git/info/refs, query: [service]}
          - methods: [POST]
            path: /git/acme/app.git/git-upload-pack
            content-types: [application/x-git-upload-pack-request]
          - methods: [POST]
            path: /git/acme/app.git/git-receive-pack
            content-types: [application/x-git-receive-pack-request]
      - name: "*.pages.corp"
        port: %[1]d
        protocol: https
        resolve: [127.0.0.1]
        ca: |
          %[2]s
`

// java is a program that one file is enough for.
const java = `import java.net.URI; import java.net.http.*;
class Get { public static void main(String[] a) throws Exception {
  System.out.print("java " + HttpClient.newHttpClient().send(HttpRequest.newBuilder(URI.create(a[0])).build(), HttpResponse.BodyHandlers.ofString()).body());
} }`

// steps use what the machine has. %[1]s is where the server is.
const steps = `      - run: |
          set -e
          U=https://web.corp:%[1]d
          echo "curl $(curl -sS --http1.1 $U/hello)"
          echo "curl $(curl -sS --http2 $U/hello)"
          echo "curl upload $(head -c 1000000 /dev/zero | curl -sS -T - -X POST $U/hello)"
          echo "curl pages $(curl -sS https://a.pages.corp:%[1]d/hello)"
          echo "refused $(curl -sS -X DELETE $U/hello)"
          echo "status $(curl -sS --path-as-is -w '%%{http_code}' -o /dev/null $U/hello?q=1 -o /dev/null $U/hello/../git/acme/other.git/info/refs)"
          if curl -sSL $U/away; then exit 1; fi
          if curl -sS --connect-to other.corp::web.corp: https://other.corp:%[1]d/hello; then exit 1; fi
          if curl -sS -H 'Host: other.corp' $U/hello; then exit 1; fi
          if head -c 2000000 /dev/zero | curl -sS -f -T - -X POST $U/hello; then exit 1; fi
      - run: |
          set -e
          U=https://web.corp:%[1]d/git/acme
          git init -q -b main work; cd work
          git -c user.name=a -c user.email=a@b.c commit -q --allow-empty -m first
          git push -q $U/app.git main
          git clone -q $U/app.git again
          echo "git $(git -C again log --format=%%s)"
          if git ls-remote $U/other.git; then exit 1; fi
      - run: |
          set -e
          U=https://web.corp:%[1]d
          python3 -c "import sys, urllib.request as r; print('python', r.urlopen(sys.argv[1]).read().decode(), end='')" $U/hello
          node -e "require('https').get(process.argv[1], r => r.on('data', d => process.stdout.write('node ' + d)))" $U/hello
          printf '%%s' '%[2]s' >/tmp/Get.java
          java /tmp/Get.java $U/hello
          openssl verify -CAfile /run/mayfly/ca.pem /run/mayfly/ca.pem
`

// TestPrograms: the programs that jobs use trust the gateway without being told,
// reach what the rules allow, and nothing else.
func TestPrograms(t *testing.T) {
	for _, tool := range []string{"curl", "git", "python3", "node", "java", "javac", "openssl"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%v; make deps installs what is missing", err)
		}
	}
	port, ca := serve(t)
	w := agenttest.New(t, agenttest.Config{Policy: fmt.Sprintf(policy, port, strings.ReplaceAll(strings.TrimSpace(ca), "\n", "\n          "))})
	a := w.Start(t)
	id := w.Submit(t, w.Workflow(t, "programs", fmt.Sprintf(steps, port, strings.ReplaceAll(java, "\n", "\n          "))))
	r := w.Result(t, id, bound)
	log := w.Log(t, id)
	if r.Conclusion != "success" {
		t.Fatalf("%s (%s), want a success:\n%s", r.Conclusion, r.Reason, log)
	}
	for _, want := range []string{
		"curl hello web.corp HTTP/", "curl upload hello web.corp HTTP/2.0 1000000\n", "curl pages hello a.pages.corp",
		"refused Refused by the policy of this job: the rule allows GET", "status 200403\n", "git first\n",
		"python hello web.corp", "node hello web.corp", "java hello web.corp", "/run/mayfly/ca.pem: OK",
	} {
		if !strings.Contains(log, want) {
			t.Errorf("the log lacks %q:\n%s", want, log)
		}
	}
	record, err := os.ReadFile(filepath.Join(w.State, "audit.jsonl"))
	if err != nil {
		out, code := w.Run(t, "audit", "show", "--output", "json")
		record = []byte(out)
		if code != 0 {
			t.Fatalf("audit show: %d %s", code, out)
		}
	}
	for _, want := range []string{`"path":"/git/acme/app.git/git-receive-pack"`, `"status":"200"`, `"method":"DELETE"`} {
		if !strings.Contains(string(record), want) {
			t.Errorf("the audit lacks %s:\n%s", want, record)
		}
	}
	a.Stop(t)
}
