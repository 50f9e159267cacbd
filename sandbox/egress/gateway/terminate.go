package gateway

import (
	"cmp"
	"context"
	"crypto/tls"
	"fmt"
	"mime"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// resumed bounds the TLS sessions with destinations, under one authority, that a
// box may resume.
const resumed = 64

// terminate ends the job's TLS, as the owner of the name that the connection was
// made to, and serves what is inside.
func (c *session) terminate(ctx context.Context) {
	hello, err := c.hello()
	if err != nil {
		c.fail(cmp.Or(context.Cause(ctx), err))
		return
	}
	config, err := c.box.authority.config(c.line.Name)
	if err != nil {
		c.fail(err)
		return
	}
	conn := tls.Server(&replayed{Conn: c.job, head: hello}, config)
	if err := conn.HandshakeContext(ctx); err != nil { // the deadline is still that of the hello
		c.fail(cmp.Or(context.Cause(ctx), fmt.Errorf("TLS with the job: %w; does the program trust the job's authority, %s?", err, caFile)))
		return
	}
	_ = c.job.SetReadDeadline(time.Time{}) // fails on a closed connection, as the next read then does
	c.serveHTTP(ctx, conn, conn.ConnectionState().NegotiatedProtocol == "h2")
}

// caFile is where jobs find the certificate, for the reader of the ledger.
const caFile = "/run/mayfly/ca.pem"

// replayed is a connection of which the first bytes were read already.
type replayed struct {
	net.Conn
	head []byte
}

// NetConn is the connection below, as that of tls.Conn.
func (r *replayed) NetConn() net.Conn { return r.Conn }

func (r *replayed) Read(b []byte) (int, error) {
	if len(r.head) == 0 {
		return r.Conn.Read(b)
	}
	n := copy(b, r.head)
	r.head = r.head[n:]
	return n, nil
}

// secure begins TLS with the destination, if the rule is for https, and verifies
// that it owns the name. It closes conn if that fails.
func (c *session) secure(ctx context.Context, conn net.Conn, p *http.Protocols) (net.Conn, error) {
	if c.line.Protocol != egress.HTTPS {
		return newFramed(conn, true), nil
	}
	config := &tls.Config{
		MinVersion: tls.VersionTLS12,
		ServerName: c.line.Name,
		NextProtos: []string{"http/1.1"},
	}
	if p.HTTP2() {
		config.NextProtos = []string{"h2", "http/1.1"}
	}
	trust := c.box.trusts.under(c.grant.CA, c.gateway.cfg.Roots)
	config.RootCAs, config.ClientSessionCache = trust.roots, trust.sessions
	if in := c.grant.inject; in != nil && in.cert != nil {
		// The destination may ask for another authority's: let it say no to this one.
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return in.cert, nil }
		config.ClientSessionCache = nil // a session that others resume would be the owner's
	}
	ctx, cancel := c.gateway.soon(ctx)
	defer cancel()
	t := tls.Client(conn, config)
	if err := t.HandshakeContext(ctx); err != nil {
		_ = conn.Close() // it failed already
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("TLS with %s: %w", c.line.Name, err)
	}
	if t.ConnectionState().NegotiatedProtocol != "h2" {
		return newFramed(t, true), nil
	}
	return t, nil
}

// checkRequest refuses a request that is not plainly one to what the connection
// was made to.
func checkRequest(r *http.Request, to egress.Line) error {
	host, given := r.Host, ""
	if h, p, err := net.SplitHostPort(host); err == nil {
		host, given = h, p
	}
	switch {
	case r.ProtoMajor != 1 && (r.ProtoMajor != 2 || to.Protocol != egress.HTTPS):
		return refused("HTTP/%d is not carried; use HTTP/1.1", r.ProtoMajor)
	case r.Method == http.MethodConnect:
		return refused("CONNECT is not carried; connect to the name that is meant")
	case r.URL.Scheme != "" && r.URL.Scheme != string(to.Protocol), r.URL.User != nil, r.URL.Opaque != "":
		return refused("the request's target is not one of this connection")
	case !strings.EqualFold(host, to.Name):
		return refused("the request is for host %s on a connection to %s", printable(host), to.Name)
	case given != "" && given != strconv.Itoa(int(to.Port)):
		return refused("the request is for port %s on a connection to port %d", printable(given), to.Port)
	case len(r.Header["Host"]) > 0:
		return refused("the request has a host field beside its authority")
	case len(obscured(r)) > 0:
		return refused("the request has the field %s, which some servers read as another", printable(obscured(r)))
	case resolves(r):
		return refused("names are resolved by the gateway alone: DNS over HTTPS is not carried")
	}
	return checkUpgrade(r)
}

// obscured is a field that frames the request for servers that take "_" for "-".
func obscured(r *http.Request) string {
	for name := range r.Header {
		for _, other := range []string{"content-length", "transfer-encoding"} {
			if strings.Contains(name, "_") && alike([]byte(name), other) {
				return name
			}
		}
	}
	return ""
}

// checkUpgrade refuses what would leave HTTP in any way but one.
func checkUpgrade(r *http.Request) error {
	up := r.Header["Upgrade"]
	if len(up) == 0 {
		return nil
	}
	if len(up) != 1 || !strings.EqualFold(up[0], "websocket") || r.Method != http.MethodGet || r.ProtoMajor != 1 || r.ContentLength != 0 {
		return refused("an upgrade to another protocol is not carried; the rule needs protocol: tcp")
	}
	return nil
}

// resolves reports DNS over HTTPS (RFC 8484, and the JSON of the large
// resolvers), by which a host that is allowed for something else would answer
// for names that are not.
func resolves(r *http.Request) bool {
	for _, field := range []string{"Accept", "Content-Type"} {
		for _, value := range r.Header[field] {
			for part := range strings.SplitSeq(value, ",") {
				media, _, _ := mime.ParseMediaType(part)
				if slices.Contains([]string{"application/dns-message", "application/dns-json"}, media) {
					return true
				}
			}
		}
	}
	return strings.HasSuffix(r.URL.Path, "/dns-query")
}
