package main

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
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"
)

// A web is a destination on the host's loopback that speaks HTTPS.
type web struct {
	server *http.Server
	done   chan error
	port   int
	pem    string // what its certificate chains to
}

func listenTLS() (*web, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	c := &x509.Certificate{
		DNSNames: []string{"web.bench"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	w := &web{
		server: &http.Server{
			Handler:   http.HandlerFunc(download),
			TLSConfig: &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}},
		},
		done: make(chan error, 1), port: l.Addr().(*net.TCPAddr).Port,
		pem: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
	}
	go func() { w.done <- w.server.ServeTLS(l, "", "") }()
	return w, nil
}

// download is a stream, or a byte.
func download(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != "/stream" {
		_, _ = w.Write([]byte("x")) // the client counts what arrives
		return
	}
	w.Header().Set("Content-Length", strconv.Itoa(streamBytes))
	block := make([]byte, 256<<10)
	for range streamBytes / len(block) {
		if _, err := w.Write(block); err != nil {
			return
		}
	}
}

func (w *web) close() error {
	err := w.server.Close()
	if end := <-w.done; !errors.Is(end, http.ErrServerClosed) {
		err = errors.Join(err, end)
	}
	return err
}

// rule is the policy's, for workflows that start with https.
func (w *web) rule() string {
	return fmt.Sprintf(`  - name: terminated
    match: {workflow: ["https-*.yml"], trust: [local]}
    timeout: 5m
    egress:
      - name: web.bench
        port: %d
        protocol: https
        resolve: [127.0.0.1]
        requests: [{methods: [GET], path: /**}]
        ca: |
          %s
`, w.port, strings.ReplaceAll(strings.TrimSpace(w.pem), "\n", "\n          "))
}

// terminated runs the same client in a box, whose TLS ends at the gateway, and on
// the host, against the same server, one after the other.
func terminated(ctx context.Context, w *world, t *table) error {
	a, err := w.start("https", capacity, w.path("tools"))
	if err != nil {
		return err
	}
	if err := os.WriteFile(w.path("web.pem"), []byte(w.web.pem), 0o600); err != nil {
		return err
	}
	direct := func(args ...string) (string, error) {
		address := net.JoinHostPort("127.0.0.1", strconv.Itoa(w.web.port))
		return output(ctx, "env", append([]string{"SSL_CERT_FILE=" + w.path("web.pem"), "ADDRESS=" + address, w.path("tools/client")}, args...)...)
	}
	inside := func(workflow string) (string, error) {
		r, err := a.run(ctx, workflow)
		if err != nil {
			return "", err
		}
		return a.printed(r.ID)
	}
	var share, boxRate, hostRate []float64
	for i := range streams + 1 {
		in, ierr := inside("https-stream.yml")
		out, oerr := direct("download", w.web.url("/stream"))
		if err := errors.Join(ierr, oerr); err != nil {
			return err
		}
		box, berr := rate(in)
		host, herr := rate(out)
		if err := errors.Join(berr, herr); err != nil {
			return err
		}
		if i > 0 { // the first warms up
			boxRate, hostRate, share = append(boxRate, box), append(hostRate, host), append(share, 100*box/host)
		}
	}
	in, ierr := inside("https-connect.yml")
	out, oerr := direct("requests", w.web.url("/"), strconv.Itoa(connectsOfAJob))
	if err := errors.Join(ierr, oerr); err != nil {
		return err
	}
	boxConnect, berr := millis(in)
	hostConnect, herr := millis(out)
	if err := errors.Join(berr, herr); err != nil {
		return err
	}
	t.least(40, "gateway, one download whose TLS ends there, of a direct one over TLS", "%", share...)
	t.info("  ended at the gateway", "MB/s", boxRate...)
	t.info("  direct", "MB/s", hostRate...)
	t.info("  connect, TLS and one request, ended at the gateway", "ms", boxConnect...)
	t.info("  connect, TLS and one request, direct", "ms", hostConnect...)
	return a.stop()
}

func (w *web) url(path string) string { return fmt.Sprintf("https://web.bench:%d%s", w.port, path) }
