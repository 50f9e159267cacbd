// Package issuers_test has real agents run jobs that use a credential of each
// issuer, by a tool that was written for its provider, and asks the provider
// afterwards whether it still takes what the job used.
package issuers_test

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
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/test/agenttest"
	"github.com/mayfly-ci/mayfly/test/giteatest"
	"github.com/mayfly-ci/mayfly/test/servertest"
)

func TestMain(m *testing.M) {
	if err := errors.Join(giteatest.Prepare(), servertest.Prepare("minio", "clients", "openbao", "kubernetes", "oauth")); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	agenttest.Main(m)
}

// bound is for anything that takes seconds on a quiet machine.
const bound = 3 * time.Minute

// A front stands before a provider under a name that jobs know, over TLS, and
// remembers what it was asked, with the credential that the job does not hold.
type front struct {
	name   string // what the policy calls it
	port   int
	ca     string
	to     *url.URL
	client *http.Client

	mu   sync.Mutex
	seen []seen
	told string // what a job said at /tell
	open bool   // the answer to /gate
}

// seen is a request, and what became of it.
type seen struct {
	method, host, uri string
	header            http.Header
	status            int
}

// newFront stands before the provider at that URL, which client trusts.
func newFront(t *testing.T, to string, client *http.Client) *front {
	t.Helper()
	f := &front{name: "provider.corp", client: client}
	var err error
	f.to, err = url.Parse(to)
	agenttest.Must(t, err)
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(f.to)
			r.Out.Host = r.In.Host // a signature may be about it
		},
		Transport: client.Transport, ErrorLog: log.New(io.Discard, "", 0), // of jobs that hang up
		ModifyResponse: func(r *http.Response) error {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.seen = append(f.seen, seen{r.Request.Method, r.Request.Host, r.Request.URL.RequestURI(), r.Request.Header.Clone(), r.StatusCode})
			return nil
		},
	}
	mux := http.NewServeMux()
	mux.Handle("/", proxy)
	mux.HandleFunc("POST /tell", func(_ http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body) // half of it is seen as such
		f.mu.Lock()
		defer f.mu.Unlock()
		f.told = strings.TrimSpace(string(b))
	})
	mux.HandleFunc("GET /gate", func(w http.ResponseWriter, _ *http.Request) {
		f.mu.Lock()
		defer f.mu.Unlock()
		if !f.open {
			w.WriteHeader(http.StatusNotFound)
		}
	})
	cert, ca := certificate(t, f.name)
	s := httptest.NewUnstartedServer(mux)
	s.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
	s.StartTLS()
	t.Cleanup(s.Close)
	f.ca, f.port = ca, s.Listener.Addr().(*net.TCPAddr).Port
	return f
}

// broker is an entry of the policy: the front, and how the credential gets there.
func (f *front) broker(how string) string {
	return fmt.Sprintf("broker:\n  - name: %s\n    port: %d\n    resolve: [127.0.0.1]\n    ca: |\n%s    %s\n",
		f.name, f.port, indented("      ", f.ca), strings.ReplaceAll(how, "; ", "\n    "))
}

// url is where jobs find it.
func (f *front) url() string { return fmt.Sprintf("https://%s:%d", f.name, f.port) }

// last is the last request of that kind that the provider did.
func (f *front) last(uri string) (found seen, ok bool) {
	for _, s := range f.all() {
		if s.method == http.MethodGet && strings.HasPrefix(s.uri, uri) && s.status == http.StatusOK {
			found, ok = s, true
		}
	}
	return found, ok
}

// again sends the provider a request that it has done before.
func (f *front) again(ctx context.Context, s seen) (status int, err error) {
	req, err := http.NewRequestWithContext(ctx, s.method, f.to.Scheme+"://"+f.to.Host+s.uri, nil)
	if err != nil {
		return 0, err
	}
	req.Host, req.Header = s.host, s.header
	res, err := f.client.Do(req)
	if err != nil {
		return 0, err
	}
	_, err = io.Copy(io.Discard, res.Body)
	return res.StatusCode, errors.Join(err, res.Body.Close())
}

// all are the requests so far.
func (f *front) all() []seen {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.seen)
}

// heard is what a job said at /tell.
func (f *front) heard() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.told
}

// let opens the gate.
func (f *front) let() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.open = true
}

// secret is what a request was authenticated with.
func (s seen) secret() string {
	for _, name := range []string{"X-Vault-Token", "X-Amz-Security-Token"} {
		if v := s.header.Get(name); v != "" {
			return v
		}
	}
	req := http.Request{Header: s.header}
	if _, password, ok := req.BasicAuth(); ok {
		return password
	}
	token, _ := strings.CutPrefix(s.header.Get("Authorization"), "Bearer ")
	return token
}

// certificate is one that signs itself.
func certificate(t *testing.T, name string) (tls.Certificate, string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	agenttest.Must(t, err)
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	agenttest.Must(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// indented has by before each line.
func indented(by, text string) string {
	return by + strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n"+by) + "\n"
}
