package kubernetes

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
	"strings"
	"time"
)

// Bounds of one exchange. A token takes milliseconds; set 2026-11-24.
const (
	exchangeTimeout = 15 * time.Second
	maxAnswer       = 8 << 20 // a list of leases
	maxComplaint    = 400     // bytes of a server's words in our errors
)

func newClient(c Config) (*http.Client, []byte, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	var pem []byte
	if c.CAFile != "" {
		var err error
		if pem, err = os.ReadFile(c.CAFile); err != nil {
			return nil, nil, fmt.Errorf("ca_file: %w", err)
		}
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(pem) {
			return nil, nil, fmt.Errorf("ca_file %s: no certificate in it", c.CAFile)
		}
	}
	return &http.Client{
		Timeout: exchangeTimeout,
		// Nothing of the environment: a proxy would see the tokens.
		Transport: &http.Transport{
			TLSClientConfig: conf, TLSHandshakeTimeout: exchangeTimeout, ForceAttemptHTTP2: true,
			MaxIdleConnsPerHost: 4, IdleConnTimeout: 30 * time.Second,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, pem, nil
}

// A refusal is a Status of the API server that is no success.
type refusal struct {
	Kind    string `json:"kind"`
	Code    int    `json:"code"`
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

func (r *refusal) Error() string {
	return fmt.Sprintf("server answers %d: %s: %s", r.Code, r.Reason, r.Message)
}

// refused says whether err is an answer of that code.
func refused(err error, code int) bool {
	var r *refusal
	return errors.As(err, &r) && r.Code == code
}

// asAgent makes a request with the agent's own token.
func (i *Issuer) asAgent(ctx context.Context, method, path string, body, into any) error {
	token, err := i.config.Token()
	if err != nil {
		return fmt.Errorf("token_file: %w", err)
	}
	err = i.do(ctx, token.Reveal(), method, path, body, into)
	if refused(err, http.StatusUnauthorized) {
		err = fmt.Errorf("the agent's own token: %w", err)
	}
	return err
}

// do makes a request. Whatever is not 2xx is an error, a *refusal if the server
// itself said it: what comes from a proxy before it says nothing about a token.
func (i *Issuer) do(ctx context.Context, token, method, path string, body, into any) error {
	text, err := json.Marshal(body)
	if err != nil {
		return fmt.Errorf("request: %w", err)
	}
	if body == nil {
		text = nil
	}
	req, err := http.NewRequestWithContext(ctx, method, i.config.Address+path, bytes.NewReader(text))
	if err != nil {
		return fmt.Errorf("request: %w", err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Accept", "application/json")
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	what, _, _ := strings.Cut(path, "?")
	res, err := i.client.Do(req)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, what, err)
	}
	defer func() { _ = res.Body.Close() }()
	b, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer+1))
	switch {
	case err != nil:
		return fmt.Errorf("%s %s: %w", method, what, err)
	case len(b) > maxAnswer:
		return fmt.Errorf("%s %s: answer larger than %d bytes", method, what, maxAnswer)
	case res.StatusCode/100 != 2:
		return fmt.Errorf("%s %s: %w", method, what, complaint(res.StatusCode, b, token))
	case into == nil:
		return nil
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("%s %s: answer %d is not of its API", method, what, res.StatusCode)
	}
	return nil
}

func complaint(status int, b []byte, token string) error {
	r := &refusal{}
	if err := json.Unmarshal(b, r); err != nil || r.Kind != "Status" || r.Code != status {
		return fmt.Errorf("answer %d is not of its API", status)
	}
	r.Message = strings.Join(strings.Fields(strings.ReplaceAll(r.Message, token, "[secret]")), " ")
	r.Message = r.Message[:min(len(r.Message), maxComplaint)]
	return r
}
