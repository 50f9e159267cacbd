package vault

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"
)

// Bounds of one exchange. A login takes milliseconds, a role of a database tens
// of them; set 2026-11-24.
const (
	exchangeTimeout = 15 * time.Second
	maxAnswer       = 1 << 20
	maxComplaint    = 400 // bytes of a server's words in our errors
)

func newClient(c Config) (*http.Client, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.CAFile != "" {
		pem, err := os.ReadFile(c.CAFile)
		if err != nil {
			return nil, fmt.Errorf("ca_file: %w", err)
		}
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("ca_file %s: no certificate in it", c.CAFile)
		}
	}
	// Nothing of the environment: a proxy would see the tokens.
	transport := &http.Transport{
		TLSClientConfig: conf, TLSHandshakeTimeout: exchangeTimeout, ForceAttemptHTTP2: true,
		MaxIdleConnsPerHost: 4, IdleConnTimeout: 30 * time.Second,
	}
	var out http.RoundTripper = transport
	if c.Out != nil {
		out = c.Out(transport)
	}
	return &http.Client{
		Timeout:   exchangeTimeout,
		Transport: out,
		// The header with the token would go along.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, nil
}

// A refusal is an answer that is not a success.
type refusal struct {
	status int
	words  string
}

func (r *refusal) Error() string { return fmt.Sprintf("server answers %d: %s", r.status, r.words) }

// refused says whether err is an answer of that status.
func refused(err error, status int) bool {
	var r *refusal
	return errors.As(err, &r) && r.status == status
}

// An answer is what the server sends, as far as we look at it.
type answer struct {
	LeaseID       string                     `json:"lease_id"`
	LeaseDuration int64                      `json:"lease_duration"` // seconds
	Data          map[string]json.RawMessage `json:"data"`
	Auth          *struct {
		Token    string `json:"client_token"`
		Accessor string `json:"accessor"`
		Duration int64  `json:"lease_duration"`
		Orphan   bool   `json:"orphan"`
	} `json:"auth"`
	Wrap *struct {
		Token    string `json:"token"`
		Accessor string `json:"accessor"`
	} `json:"wrap_info"`
	Errors []string `json:"errors"`
}

// A call is one request.
type call struct {
	method, path, token string
	wrap                string // seconds, with their unit
	body                any
}

// do sends a request and returns what the server says. Whatever is not 2xx is
// an error, a *refusal if the server itself said it.
func (i *Issuer) do(ctx context.Context, c call) (answer, error) {
	var a answer
	var body io.Reader
	if c.body != nil {
		b, err := json.Marshal(c.body)
		if err != nil {
			return a, fmt.Errorf("request: %w", err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, c.method, i.config.Address+"/v1/"+c.path, body)
	if err != nil {
		return a, fmt.Errorf("request: %w", err)
	}
	req.Header.Set("X-Vault-Request", "true") // the server refuses what a browser was made to send
	if c.token != "" {
		req.Header.Set("X-Vault-Token", c.token)
	}
	if i.config.Namespace != "" {
		req.Header.Set("X-Vault-Namespace", i.config.Namespace)
	}
	if c.wrap != "" {
		req.Header.Set("X-Vault-Wrap-TTL", c.wrap)
	}
	res, err := i.client.Do(req)
	if err != nil {
		return a, fmt.Errorf("%s %s: %w", c.method, c.path, err)
	}
	defer func() { _ = res.Body.Close() }()
	b, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer+1))
	switch {
	case err != nil:
		return a, fmt.Errorf("%s %s: %w", c.method, c.path, err)
	case len(b) > maxAnswer:
		return a, fmt.Errorf("%s %s: answer larger than %d bytes", c.method, c.path, maxAnswer)
	}
	parsed := json.Unmarshal(b, &a)
	if res.StatusCode/100 != 2 {
		return a, fmt.Errorf("%s %s: %w", c.method, c.path, complaint(c, res, a, parsed))
	}
	if len(b) > 0 && parsed != nil {
		return a, fmt.Errorf("%s %s: answer %d is not of Vault's API: %w", c.method, c.path, res.StatusCode, parsed)
	}
	return a, nil
}

// complaint is the server's refusal. What comes from a proxy before it, or from
// a server that is sealed, says nothing about a credential.
func complaint(c call, res *http.Response, a answer, parsed error) error {
	if res.StatusCode/100 == 3 {
		return fmt.Errorf("server sends us on to another address (%d): name the active one", res.StatusCode)
	}
	if parsed != nil || a.Errors == nil {
		return fmt.Errorf("answer %d is not of Vault's API", res.StatusCode)
	}
	words := strings.Join(slices.Compact(a.Errors), "; ")
	if c.token != "" {
		words = strings.ReplaceAll(words, c.token, "[secret]")
	}
	words = strings.Join(strings.Fields(words), " ")
	return &refusal{res.StatusCode, words[:min(len(words), maxComplaint)]}
}
