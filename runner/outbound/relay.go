package outbound

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
)

// Relay lets a program that the agent starts out, to address, HOST:PORT, and to
// nothing else: it is a proxy on this machine's loopback, whose URL has a password
// that the relay is gone before anybody guesses. So that program needs neither
// the parent proxy's password nor a network of its own, and what it connects to
// is written down. What it sends inside of TLS is its own: there is a line for
// the connection, and none for its requests. end closes every connection and
// returns when they are written down.
func (e *Exit) Relay(ctx context.Context, address string) (proxy creds.Secret, end func(), err error) {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp4", "127.0.0.1:0")
	if err != nil {
		return creds.Secret{}, nil, fmt.Errorf("relay: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	r := &relay{exit: e, address: address, password: rand.Text()}
	t := &http.Transport{ResponseHeaderTimeout: time.Minute}
	r.plain = &httputil.ReverseProxy{
		Rewrite:   func(*httputil.ProxyRequest) {}, // what it does without it is right
		Transport: e.HTTP(t), ErrorLog: log.New(io.Discard, "", 0), FlushInterval: -1,
	}
	server := &http.Server{Handler: r, ReadHeaderTimeout: time.Minute, ErrorLog: log.New(io.Discard, "", 0), BaseContext: func(net.Listener) context.Context { return ctx }}
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(l) }) // ErrServerClosed
	u := url.URL{Scheme: "http", Host: l.Addr().String(), User: url.UserPassword(relayUser, r.password)}
	return creds.NewSecret(u.String()), func() {
		cancel()
		_ = server.Close() // those that were taken over end with ctx
		serving.Wait()
		r.tunnels.Wait()
		t.CloseIdleConnections()
	}, nil
}

const relayUser = "mayfly"

type relay struct {
	exit     *Exit
	address  string
	password string
	plain    http.Handler
	tunnels  sync.WaitGroup
}

// ServeHTTP implements http.Handler.
func (r *relay) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	want := "Basic " + base64.StdEncoding.EncodeToString([]byte(relayUser+":"+r.password))
	if subtle.ConstantTimeCompare([]byte(req.Header.Get("Proxy-Authorization")), []byte(want)) != 1 {
		w.Header().Set("Proxy-Authenticate", `Basic realm="mayfly"`)
		http.Error(w, "password", http.StatusProxyAuthRequired)
		return
	}
	switch {
	case req.Method == http.MethodConnect && canonical(req.Host) == canonical(r.address):
		r.tunnels.Add(1)
		defer r.tunnels.Done()
		r.tunnel(w, req)
	case req.Method != http.MethodConnect && req.URL.Scheme == "http" && canonical(hostPort(req)) == canonical(r.address):
		r.plain.ServeHTTP(w, req)
	default:
		http.Error(w, "this relay is for one address", http.StatusForbidden)
	}
}

func (r *relay) tunnel(w http.ResponseWriter, req *http.Request) {
	ctx := req.Context()
	up, err := r.exit.DialContext(ctx, "tcp", r.address)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway) // for the complaint of the agent's own child
		return
	}
	defer up.Close()
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() { _ = errors.Join(conn.Close(), up.Close()); close(ended) })
	if _, err := conn.Write([]byte("HTTP/1.1 200 Connection established\r\n\r\n")); err != nil {
		return
	}
	var both sync.WaitGroup
	both.Go(func() { pass(up, buffered) })
	both.Go(func() { pass(conn, up) })
	both.Wait()
	if !stop() {
		<-ended
	}
}

// pass copies until one side ends, and tells the other.
func pass(to net.Conn, from io.Reader) {
	_, err := io.Copy(to, from)
	half, ok := to.(interface{ CloseWrite() error })
	if err != nil || !ok || half.CloseWrite() != nil {
		_ = to.Close()
	}
}
