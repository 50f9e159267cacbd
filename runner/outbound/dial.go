package outbound

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	// dialTimeout bounds a connection, its tunnel included. A server that is there
	// answers in milliseconds; a lost SYN is sent again after 1, 3 and 7 seconds.
	dialTimeout = 20 * time.Second
	// maxHeader bounds what a proxy may answer before its tunnel begins, in bytes.
	maxHeader = 16 << 10
)

// A refusal is an address that is not dialled.
type refusal struct{ what string }

func (r *refusal) Error() string { return r.what }

// A proxyError is a tunnel that there is not. It holds no word of the proxy's.
type proxyError struct {
	proxy string
	err   error
}

func (e *proxyError) Error() string { return "proxy " + e.proxy + ": " + e.err.Error() }
func (e *proxyError) Unwrap() error { return e.err }

// through says whether the proxy is used.
func (w *Way) through(network, address string) bool {
	if strings.HasPrefix(network, "unix") {
		return false
	}
	host, _, err := net.SplitHostPort(address)
	return err == nil && w.Proxied(host)
}

func (w *Way) dial(ctx context.Context, network, address string) (net.Conn, error) {
	if w.cfg.Audit == nil {
		return nil, errors.New("outbound: there is no audit to write this down in")
	}
	if w.through(network, address) {
		return w.Tunnel(ctx, address)
	}
	d := net.Dialer{Timeout: dialTimeout, Control: func(_, to string, _ syscall.RawConn) error { return w.judge(to) }}
	conn, err := d.DialContext(ctx, network, address)
	if r := (*refusal)(nil); errors.As(err, &r) {
		return nil, fmt.Errorf("connect %s: %w", address, r)
	}
	return conn, err
}

// judge refuses addresses that hand out credentials of this machine. Of a name
// it knows nothing.
func (w *Way) judge(address string) error {
	to, err := netip.ParseAddrPort(address)
	if err != nil || w.cfg.Forbidden == nil {
		return nil // the path of a socket, or a name
	}
	a := to.Addr().Unmap().WithZone("")
	if what := w.cfg.Forbidden(a); what != "" && !slices.Contains(w.cfg.Metadata, a) {
		return &refusal{fmt.Sprintf("%s is a %s; if the agent itself needs it, name it in outbound.metadata", a, what)}
	}
	return nil
}

// Tunnel connects to address, HOST:PORT, through the proxy, whatever Proxied
// says. It writes nothing down: the gateway, which dials for jobs, has its own
// ledger. What it returns can be closed for writing.
func (w *Way) Tunnel(ctx context.Context, address string) (net.Conn, error) {
	if w.proxy == nil {
		return nil, errors.New("proxy: there is none")
	}
	if err := w.judge(address); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, dialTimeout, fmt.Errorf("no answer within %v", dialTimeout))
	defer cancel()
	conn, err := w.tunnel(ctx, address)
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, &proxyError{w.proxy.Host, err}
	}
	return conn, nil
}

func (w *Way) tunnel(ctx context.Context, address string) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", w.proxy.Host)
	if op := (*net.OpError)(nil); errors.As(err, &op) {
		return nil, op.Err
	} else if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) }) // ends what waits
	secure := conn
	if w.proxy.Scheme == "https" {
		secure = tls.Client(conn, &tls.Config{MinVersion: tls.VersionTLS12, ServerName: w.proxy.Hostname(), RootCAs: w.cfg.Roots, NextProtos: []string{"http/1.1"}})
	}
	err = w.ask(secure, address)
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		_ = conn.Close() // it failed already
		return nil, err
	}
	return secure, nil
}

// ask sends CONNECT and reads the answer, and no byte of what follows it.
func (w *Way) ask(conn net.Conn, address string) error {
	if strings.ContainsAny(address, "\r\n\t ") {
		return errors.New("name with a space or a newline in it")
	}
	who, err := w.authorization()
	if err != nil {
		return err
	}
	if _, err := conn.Write([]byte("CONNECT " + address + " HTTP/1.1\r\nHost: " + address + "\r\nUser-Agent: mayfly\r\n" + who + "\r\n")); err != nil {
		return err
	}
	var answer []byte
	for one := make([]byte, 1); !strings.HasSuffix(string(answer), "\r\n\r\n"); answer = append(answer, one[0]) {
		if len(answer) == maxHeader {
			return errors.New("its answer is too long")
		}
		if n, err := conn.Read(one); n == 0 && err != nil {
			return fmt.Errorf("no answer to CONNECT %s: %w", address, err)
		}
	}
	return granted(string(answer), address)
}

// granted reads the first line of the answer. No other of its words is shown: a
// proxy might tell what it was sent.
func granted(answer, address string) error {
	version, rest, _ := strings.Cut(answer, " ")
	status, err := strconv.Atoi(rest[:min(3, len(rest))])
	switch {
	case err != nil || !strings.HasPrefix(version, "HTTP/1."):
		return errors.New("its answer is not HTTP/1: is this a proxy?")
	case status/100 == 2:
		return nil
	case status == http.StatusProxyAuthRequired:
		return fmt.Errorf("CONNECT %s: 407, it wants another user and password (outbound.proxy_user, proxy_password_file)", address)
	case status == http.StatusForbidden:
		return fmt.Errorf("CONNECT %s: 403, the proxy does not allow this name or port", address)
	}
	return fmt.Errorf("CONNECT %s: %d %s", address, status, http.StatusText(status))
}

// authorization is the header for the proxy, or nothing.
func (w *Way) authorization() (string, error) {
	if w.cfg.Password == nil {
		return "", nil
	}
	password, err := w.cfg.Password()
	if err != nil {
		return "", err
	}
	return "Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(w.cfg.User+":"+password.Reveal())) + "\r\n", nil
}
