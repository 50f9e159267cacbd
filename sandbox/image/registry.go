package image

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/mayfly-ci/mayfly/sandbox"
)

const (
	dialTimeout   = 30 * time.Second
	answerTimeout = time.Minute // until a registry begins to answer
)

// A registry is one repository of one, as the agent sees it for one pull. The
// library speaks its protocol; the guard below it holds what must hold.
type registry struct {
	name name.Reference
	auth remote.Option
	how  http.RoundTripper
	got  *remote.Descriptor // what root was answered
}

// registry prepares to ask. User and password are in no other place than its
// requests to that registry.
func (s *Store) registry(n Name, p sandbox.Pull) (*registry, error) {
	ref, err := n.reference()
	if err != nil {
		return nil, refuse("image name %s: %w", n, err)
	}
	host := ref.Context().RegistryStr()
	insecure := slices.Contains(s.cfg.Insecure, host)
	if insecure {
		if ref, err = name.ParseReference(n.String(), name.Insecure); err != nil {
			return nil, refuse("image name %s: %w", n, err)
		}
	}
	g := &guard{host: host, trusted: append([]string{host}, s.cfg.TokenServers...), insecure: s.cfg.Insecure}
	if n.Registry == "docker.io" {
		g.trusted = append(g.trusted, "auth.docker.io") // where Docker Hub keeps its accounts
	}
	pool, err := roots(s.cfg.CAFile)
	if err != nil {
		return nil, err
	}
	g.transport = &http.Transport{
		DialContext:           (&net.Dialer{Timeout: dialTimeout, Control: g.dial}).DialContext,
		TLSClientConfig:       &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout:   dialTimeout,
		ResponseHeaderTimeout: answerTimeout,
		ForceAttemptHTTP2:     true,
	}
	g.next = g.transport
	if s.cfg.Out != nil {
		g.next = s.cfg.Out(g.transport)
		g.transport.DialContext = g.judged(g.transport.DialContext)
	}
	r := &registry{name: ref, how: g, auth: remote.WithAuth(authn.Anonymous)}
	if p.User != "" || p.Password != (sandbox.Pull{}).Password {
		g.named = true
		r.auth = remote.WithAuth(authn.FromConfig(authn.AuthConfig{Username: p.User, Password: p.Password.Reveal()}))
	}
	return r, nil
}

// ping asks a registry whether it is one.
func (s *Store) ping(ctx context.Context, host string) error {
	r, err := s.registry(Name{Registry: host, Repository: "mayfly", Tag: "none"}, sandbox.Pull{})
	if err != nil {
		return err
	}
	defer r.close()
	_, err = transport.Ping(ctx, r.name.Context().Registry, r.how)
	return err
}

// close lets go of the connections.
func (r *registry) close() {
	if g, ok := r.how.(*guard); ok {
		g.transport.CloseIdleConnections()
	}
}

// roots are the certificates that registries are checked with; nil is the
// system's.
func roots(file string) (*x509.CertPool, error) {
	if file == "" {
		return nil, nil
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		return nil, fmt.Errorf("images: certificates of the system: %w", err)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("images: ca_file: %w", err)
	}
	if !pool.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("images: ca_file %s: no certificate in it", file)
	}
	return pool, nil
}

func (r *registry) options(ctx context.Context) []remote.Option {
	return []remote.Option{remote.WithContext(ctx), remote.WithTransport(r.how), remote.WithUserAgent("mayfly"), r.auth}
}

func (r *registry) root(ctx context.Context) (v1.Descriptor, error) {
	var err error
	if r.got, err = remote.Get(r.name, r.options(ctx)...); err != nil {
		return v1.Descriptor{}, judge(err)
	}
	out := r.got.Descriptor
	if want, ok := r.name.(name.Digest); ok {
		if out.Digest, err = v1.NewHash(want.DigestStr()); err != nil {
			return out, refuse("%w", err)
		}
	}
	return out, nil
}

func (r *registry) manifest(ctx context.Context, d v1.Descriptor) ([]byte, error) {
	if r.got != nil && r.got.Digest == d.Digest {
		return r.got.Manifest, nil
	}
	got, err := remote.Get(r.name.Context().Digest(d.Digest.String()), r.options(ctx)...)
	if err != nil {
		return nil, judge(err)
	}
	return got.Manifest, nil
}

func (r *registry) blob(ctx context.Context, d v1.Descriptor) (io.ReadCloser, error) {
	l, err := remote.Layer(r.name.Context().Digest(d.Digest.String()), r.options(ctx)...)
	if err != nil {
		return nil, judge(err)
	}
	body, err := l.Compressed()
	if err != nil {
		return nil, judge(err)
	}
	return judged{body}, nil
}

// judge tells a registry that gives something else than was asked for from one
// that gives nothing. The library, which looks too, has no type for the first.
func judge(err error) error {
	for _, lie := range []string{"does not match requested digest", "error verifying "} {
		if strings.Contains(err.Error(), lie) {
			return refuse("registry: %w", err)
		}
	}
	return fmt.Errorf("registry: %w", err)
}

type judged struct{ io.ReadCloser }

func (j judged) Read(p []byte) (int, error) {
	n, err := j.ReadCloser.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = judge(err)
	}
	return n, err
}

// A guard sees every request of one pull last, redirections and requests for
// tokens included, and sends none that must not be sent.
type guard struct {
	host     string   // of the registry
	trusted  []string // that may see what the job pulls with
	insecure []string // that may be spoken to in plain HTTP
	named    bool     // there are a user and a password

	next      http.RoundTripper
	transport *http.Transport // below next
}

// RoundTrip implements http.RoundTripper.
func (g *guard) RoundTrip(r *http.Request) (*http.Response, error) {
	host := r.URL.Host
	if r.URL.Scheme != "https" && !slices.Contains(g.insecure, host) && !loopback(r.URL.Hostname()) {
		return nil, refuse("%s in plain HTTP: use TLS, or name it in images.insecure", host)
	}
	secret := r.Header.Get("Authorization") != "" || r.URL.User != nil
	if g.named && secret && !slices.Contains(g.trusted, host) {
		return nil, refuse("registry %s has the credentials of the pull sent to %s: if that is its token server, name it in images.token_servers", g.host, host)
	}
	resp, err := g.next.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	if !strings.Contains(r.URL.Path, "/blobs/") && host == g.host {
		resp.Body = &capped{resp.Body, maxManifest + 1}
	}
	return resp, nil
}

// dial refuses addresses at which no registry is, but the host itself may be:
// link-local ones, where clouds keep credentials of the machine, and its
// loopback, unless the registry is there.
func (g *guard) dial(_, address string, _ syscall.RawConn) error {
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	ip := at.Addr().Unmap()
	registry := (&url.URL{Host: g.host}).Hostname()
	if ip.IsLinkLocalUnicast() || ip.IsLoopback() && !loopback(registry) && !slices.Contains(g.insecure, g.host) {
		return refuse("registry %s leads to %s, an address of this machine", g.host, ip)
	}
	return nil
}

// judged is dial for connections that somebody else makes: nothing is sent on one
// to such an address. What a proxy looked up it does not see.
func (g *guard) judged(dial func(ctx context.Context, network, address string) (net.Conn, error)) func(ctx context.Context, network, address string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		if at, ok := conn.RemoteAddr().(*net.TCPAddr); ok {
			if err := g.dial(network, at.String(), nil); err != nil {
				return nil, errors.Join(err, conn.Close())
			}
		}
		return conn, nil
	}
}

func loopback(host string) bool {
	if host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return err == nil && ip.IsLoopback()
}

// A capped body is one that ends with an error where no honest one is longer.
type capped struct {
	io.ReadCloser
	left int64
}

func (b *capped) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, refuse("answer of the registry is longer than %d bytes", maxManifest)
	}
	n, err := b.ReadCloser.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	return n, err
}

// explain adds to an error of a registry what may be done about it.
func explain(n Name, err error) error {
	var network net.Error
	if errors.As(err, &network) {
		return fmt.Errorf("%w: registry %s is away; an image from an archive needs none (images.sources, mayfly image import)", err, n.Registry)
	}
	return err
}
