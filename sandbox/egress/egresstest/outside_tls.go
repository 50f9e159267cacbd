package egresstest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// A notary signs for the servers of the suite.
type notary struct {
	pem  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newNotary() (*notary, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	c := &x509.Certificate{
		Subject: pkix.Name{CommonName: "outside"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		return nil, err
	}
	if c, err = x509.ParseCertificate(der); err != nil {
		return nil, err
	}
	return &notary{string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), c, key}, nil
}

// certify makes a server's certificate.
func (n *notary) certify(names ...string) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	c := &x509.Certificate{
		DNSNames: names, NotBefore: n.cert.NotBefore, NotAfter: n.cert.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, c, n.cert, key.Public(), n.key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}

// once is a path whose answer is the last one on its connection.
const once = "/once"

// secure serves HTTP/1 and HTTP/2 with TLS for an address, as the owner of names.
func (b *bench) secure(n *notary, address string, names ...string) error {
	cert, err := n.certify(names...)
	if err != nil {
		return err
	}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body) // what breaks off is not answered
		if r.URL.Path == once {
			w.Header().Set("Connection", "close")
		}
		fmt.Fprintf(w, "host %s %s %s %d", r.Host, r.Proto, r.URL.Path, len(body))
		if a := r.Header.Get("Authorization"); a != "" {
			fmt.Fprintf(w, " said %s, good %v", a, a == "Bearer "+credential)
		}
	}))
	s.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
	s.EnableHTTP2 = true
	s.StartTLS()
	b.tb.Cleanup(s.Close)
	b.route(address, s.Listener.Addr().String())
	return nil
}

// secured makes web.example, where HTTPS is served, and a rule for it.
func (b *bench) secured() (egress.Rule, *notary, error) {
	n, err := newNotary()
	if err != nil {
		return egress.Rule{}, nil, err
	}
	b.outside.name("web.example", public)
	r := rule("web.example", 443, egress.HTTPS)
	r.CA = n.pem
	return r, n, b.secure(n, public+":443", "web.example")
}

// authority is what the box of a job trusts.
func (j *job) authority() (*x509.CertPool, []byte, error) {
	t, ok := j.gateway.(egress.Terminator)
	if !ok {
		return nil, nil, errors.New("the gateway is no egress.Terminator")
	}
	text, err := t.Authority(j.name)
	if err != nil {
		return nil, nil, fmt.Errorf("Authority(%s): %w", j.name, err)
	}
	pool := x509.NewCertPool()
	if text != nil && !pool.AppendCertsFromPEM(text) {
		return nil, nil, fmt.Errorf("Authority(%s): got %q, want a certificate as PEM", j.name, text)
	}
	return pool, text, nil
}

// A client is a program of the job's that speaks HTTPS.
type client struct {
	http.Client
	job *job
}

// client makes one that trusts the job's authority, asks for a server name on
// connections to another, or the same, and speaks HTTP/2 or not.
func (j *job) client(name, serverName string, h2 bool) (*client, error) {
	pool, _, err := j.authority()
	if err != nil {
		return nil, err
	}
	t := &http.Transport{
		DialContext:       func(context.Context, string, string) (net.Conn, error) { return j.connect(name, 443) },
		TLSClientConfig:   &tls.Config{RootCAs: pool, ServerName: serverName},
		ForceAttemptHTTP2: h2,
	}
	j.tb.Cleanup(t.CloseIdleConnections)
	return &client{http.Client{Transport: t, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}, j}, nil
}

// do sends a request, perhaps for another host, and returns what came back.
func (c *client) do(method, url, host string, body io.Reader, header ...string) (int, string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), c.job.patience)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return 0, "", err
	}
	if host != "" {
		r.Host = host
	}
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	resp, err := c.Do(r)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(text), err
}
