// Package outbound is the agent's own way out: what it asks providers, issuers
// and registries itself, beside what jobs ask through their gateways.
//
// There is one [Way] for an agent. It dials, directly or through the parent proxy
// that the configuration names and never one of the environment, and writes each
// connection and each HTTP request into the audit. A connection is written down
// before anything moves on it; what cannot be written down is not done. With a
// proxy nothing that it is for is ever dialled directly: a proxy that is away is
// an error (docs/adr/0028).
//
// Through a proxy every connection is a tunnel (RFC 9110 §9.3.6), to the name
// that was meant. The proxy looks it up, so that the address is not seen here.
package outbound

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/runner/audit"
)

// A Config says how the agent gets out. The zero value dials directly.
type Config struct {
	// Proxy is http://HOST:PORT or https://HOST:PORT; "" is none.
	Proxy string
	// User and Password are what the proxy wants; Password is asked for each
	// tunnel, so that it can be changed. "" is nobody.
	User     string
	Password func() (creds.Secret, error)
	// NoProxy are names, for which and everything below them no proxy is used,
	// and addresses and CIDRs, which count for what is named by address. This
	// machine's loopback is among them always.
	NoProxy []string
	// Roots are the authorities that servers, and the proxy, are verified with
	// where nothing else says so; nil is the system's.
	Roots *x509.CertPool

	// Forbidden says what an address is that is never dialled, and "" of others;
	// nil knows none. Metadata are those of them that the agent may dial.
	Forbidden func(netip.Addr) string
	Metadata  []netip.Addr

	// Shape makes a path fit for the audit. nil leaves nothing of it.
	Shape func(path string) string
	// Audit takes the lines. Without one nothing is dialled.
	Audit audit.Sink
	// Fold is how long calls that repeat are counted before a line says so; 0 is
	// a minute.
	Fold time.Duration
}

// A Way is how one agent gets out. It may be used by several goroutines.
type Way struct {
	cfg    Config
	proxy  *url.URL // nil is none
	direct []exception
	book   *book
}

// An exception is what is dialled directly.
type exception struct {
	name string
	net  netip.Prefix
}

// errProxy is what Config.Proxy may be. The text that was given may hold a
// password, and is not shown.
var errProxy = errors.New("proxy: want http://HOST:PORT or https://HOST:PORT, without a user, a path or anything else")

// New checks the configuration. Nothing is dialled. Close ends it.
func New(c Config) (*Way, error) {
	w := &Way{cfg: c}
	if c.Proxy != "" {
		u, err := url.Parse(c.Proxy)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.User != nil || u.Hostname() == "" || u.Port() == "" ||
			u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "" {
			return nil, errProxy
		}
		w.proxy = u
	}
	if (c.User != "") != (c.Password != nil) {
		return nil, errors.New("proxy: a user and a password belong together")
	}
	if w.proxy == nil && (c.User != "" || len(c.NoProxy) > 0) {
		return nil, errors.New("proxy: there is none, but a password or exceptions for one")
	}
	if strings.ContainsAny(c.User, ":\r\n") {
		return nil, errors.New("proxy: a colon or a newline in the user cannot be sent")
	}
	for _, text := range c.NoProxy {
		x, err := parseException(text)
		if err != nil {
			return nil, err
		}
		w.direct = append(w.direct, x)
	}
	if c.Fold == 0 {
		c.Fold = time.Minute
	}
	w.book = newBook(c.Audit, c.Fold)
	return w, nil
}

func parseException(text string) (exception, error) {
	if p, err := netip.ParsePrefix(text); err == nil {
		return exception{net: p.Masked()}, nil
	}
	if a, err := netip.ParseAddr(text); err == nil {
		return exception{net: netip.PrefixFrom(a.Unmap(), a.Unmap().BitLen())}, nil
	}
	name := canonical(strings.TrimPrefix(text, "."))
	if name == "" || strings.ContainsAny(name, "*/: @") {
		return exception{}, fmt.Errorf("no_proxy: %q is not a name (which is also for all names below it), an address or a CIDR", text)
	}
	return exception{name: name}, nil
}

func canonical(name string) string { return strings.ToLower(strings.TrimSuffix(name, ".")) }

// Proxy is the address of the parent proxy, "" if there is none.
func (w *Way) Proxy() string {
	if w.proxy == nil {
		return ""
	}
	return w.proxy.Host
}

// Proxied says whether host, a name or an address, is reached through the proxy.
func (w *Way) Proxied(host string) bool {
	host = canonical(host)
	if w.proxy == nil || host == "localhost" {
		return false
	}
	if a, err := netip.ParseAddr(host); err == nil {
		a = a.Unmap()
		for _, x := range w.direct {
			if x.net.IsValid() && x.net.Contains(a) {
				return false
			}
		}
		return !a.IsLoopback()
	}
	for _, x := range w.direct {
		if x.name != "" && (host == x.name || strings.HasSuffix(host, "."+x.name)) {
			return false
		}
	}
	return true
}

// Roots are the authorities of the configuration, nil for the system's.
func (w *Way) Roots() *x509.CertPool { return w.cfg.Roots }

// Close writes down what was counted and not told yet.
func (w *Way) Close() error { return w.book.close() }

// For is the way out of one part of the agent, by the name that its lines have.
func (w *Way) For(component string) *Exit { return &Exit{way: w, component: component} }

// ForPoller is For of a part that asks the same again and again: the first of a
// kind of call is a line, and those like it which follow are counted, and told
// together every Config.Fold. None is left out of the count.
func (w *Way) ForPoller(component string) *Exit {
	return &Exit{way: w, component: component, folds: true}
}

// An Exit is the way out of one part of the agent.
type Exit struct {
	way       *Way
	component string
	folds     bool
}

// DialContext connects to a name or an address, as net.Dialer does, and writes
// that down, and when it is over.
func (e *Exit) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	began := time.Now()
	l := line{action: actionConnect, job: audit.JobOf(ctx), component: e.component, address: address}
	conn, err := e.way.dial(ctx, network, address)
	switch {
	case err != nil:
		l.result = reason(ctx, err)
	case e.way.through(network, address):
		l.via = e.way.proxy.Host
	default:
		l.dialled = conn.RemoteAddr().String()
	}
	if werr := e.way.book.write(ctx, l, moved{took: time.Since(began)}, e.folds); werr != nil {
		if conn != nil {
			_ = conn.Close() // nothing moved on it
		}
		return nil, errors.Join(err, werr)
	}
	if err != nil {
		return nil, err
	}
	l.action = actionEnd
	return &counted{Conn: conn, exit: e, line: l, began: began}, nil
}

// HTTP makes a transport that has not been used yet one of this exit: it dials
// here, verifies with the authorities of the configuration if it has none of its
// own, and each of its requests is written down.
func (e *Exit) HTTP(t *http.Transport) http.RoundTripper {
	t.Proxy, t.DialContext = nil, e.DialContext
	if e.way.cfg.Roots != nil && (t.TLSClientConfig == nil || t.TLSClientConfig.RootCAs == nil) {
		if t.TLSClientConfig == nil {
			t.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12}
		}
		t.TLSClientConfig.RootCAs = e.way.cfg.Roots
	}
	return &recorder{exit: e, next: t}
}
