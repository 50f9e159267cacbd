// Package web is how issuers speak HTTP with their providers: by the agent's way
// out, over TLS 1.2 or later, past every proxy of the environment, without
// following anybody to another address, and with a bound on what is read.
package web

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"
)

// Bounds of one exchange: a token takes milliseconds, the answer some hundred
// bytes, a list of leases a thousand for each; set 2026-11-24.
const (
	exchangeTimeout = 15 * time.Second
	maxAnswer       = 8 << 20
	maxComplaint    = 400 // bytes of a server's words in our errors
)

// Out makes a transport one that leaves this machine by the agent's way out. nil
// dials directly.
type Out = func(*http.Transport) http.RoundTripper

// ErrRedirect reports that the server sends us to another address, where the
// credential does not go.
var ErrRedirect = errors.New("server sends us on to another address: name that one")

// NewClient returns a client that believes the authorities in a PEM file, or
// those that out knows if there is none.
func NewClient(caFile string, out Out) (*http.Client, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if caFile != "" {
		pem, err := os.ReadFile(caFile)
		if err != nil {
			return nil, fmt.Errorf("ca_file: %w", err)
		}
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("ca_file %s: no certificate in it", caFile)
		}
	}
	// Nothing of the environment: who started the agent does not say who sees where
	// its tokens come from.
	transport := &http.Transport{
		TLSClientConfig: conf, TLSHandshakeTimeout: exchangeTimeout, ForceAttemptHTTP2: true,
		MaxIdleConnsPerHost: 4, IdleConnTimeout: 30 * time.Second,
	}
	client := &http.Client{
		Timeout: exchangeTimeout, Transport: transport,
		// The token would go along.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	if out != nil {
		client.Transport = out(transport)
	}
	return client, nil
}

// CheckURL wants an address without credentials and query, and https: or http
// to this machine, or insecure, which lets tokens go in the clear.
func CheckURL(text string, insecure bool) error {
	u, err := url.Parse(text)
	switch {
	case err != nil, u.Hostname() == "", u.User != nil, strings.ContainsAny(text, "?#"), u.Scheme != "https" && u.Scheme != "http":
		return fmt.Errorf("%q: want https://HOST[:PORT][/PATH]", text)
	case u.Scheme == "http" && !insecure && !loopback(u.Hostname()):
		return fmt.Errorf("%q: want https; tokens must not go in the clear (insecure: true lets them)", text)
	}
	return nil
}

// CheckServer is CheckURL of a server whose paths the issuer knows.
func CheckServer(text string, insecure bool) error {
	if u, err := url.Parse(text); err == nil && u.Path != "" {
		return fmt.Errorf("%q: want https://HOST[:PORT], without a path", text)
	}
	return CheckURL(text, insecure)
}

func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// Do sends a request and reads all of the answer. A redirect is ErrRedirect;
// any other status is the caller's to judge.
func Do(client *http.Client, req *http.Request) (status int, body []byte, err error) {
	res, body, err := exchange(client, req)
	if err != nil {
		return 0, nil, err
	}
	return res.StatusCode, body, nil
}

// Head is Do for a caller that wants the header of the answer and not its body.
// The header is never nil.
func Head(client *http.Client, req *http.Request) (status int, header http.Header, err error) {
	res, _, err := exchange(client, req)
	if err != nil {
		return 0, http.Header{}, err
	}
	return res.StatusCode, res.Header, nil
}

func exchange(client *http.Client, req *http.Request) (*http.Response, []byte, error) {
	what := req.Method + " " + req.URL.Path
	res, err := client.Do(req)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", what, err)
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer+1))
	switch {
	case err != nil:
		return nil, nil, fmt.Errorf("%s: %w", what, err)
	case len(body) > maxAnswer:
		return nil, nil, fmt.Errorf("%s: answer larger than %d bytes", what, maxAnswer)
	case res.StatusCode/100 == 3:
		return nil, nil, fmt.Errorf("%s: answer %d: %w", what, res.StatusCode, ErrRedirect)
	}
	return res, body, nil
}

// Words makes one short line of what a server says, without the secrets that it
// was sent: some repeat them.
func Words(text string, secrets ...string) string {
	for _, s := range secrets {
		if s != "" {
			text = strings.ReplaceAll(text, s, "[secret]")
		}
	}
	text = strings.Join(strings.Fields(strings.ToValidUTF8(text, "?")), " ")
	if len(text) > maxComplaint {
		text = strings.ToValidUTF8(text[:maxComplaint], "") + "…"
	}
	return text
}
