package vault

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"

	"github.com/mayfly-ci/mayfly/creds/web"
)

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
	status, b, err := web.Do(i.client, req)
	if err != nil {
		return a, err
	}
	parsed := json.Unmarshal(b, &a)
	if status/100 != 2 {
		return a, fmt.Errorf("%s %s: %w", c.method, c.path, complaint(c, status, a, parsed))
	}
	if len(b) > 0 && parsed != nil {
		return a, fmt.Errorf("%s %s: answer %d is not of Vault's API: %w", c.method, c.path, status, parsed)
	}
	return a, nil
}

// complaint is the server's refusal. What comes from a proxy before it, or from
// a server that is sealed, says nothing about a credential.
func complaint(c call, status int, a answer, parsed error) error {
	if parsed != nil || a.Errors == nil {
		return fmt.Errorf("answer %d is not of Vault's API", status)
	}
	return &refusal{status, web.Words(strings.Join(slices.Compact(a.Errors), "; "), c.secrets()...)}
}

// secrets are what a server must not repeat to us: identities and tokens.
func (c call) secrets() []string {
	all := []string{c.token}
	if body, ok := c.body.(map[string]string); ok {
		all = append(all, body["jwt"], body["token"])
	}
	return all
}
