package kubernetes

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/mayfly-ci/mayfly/creds/web"
)

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
	status, b, err := web.Do(i.client, req)
	switch {
	case err != nil:
		return err
	case status/100 != 2:
		return fmt.Errorf("%s %s: %w", method, what, complaint(status, b, token))
	case into == nil:
		return nil
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("%s %s: answer %d is not of its API", method, what, status)
	}
	return nil
}

func complaint(status int, b []byte, token string) error {
	r := &refusal{}
	if err := json.Unmarshal(b, r); err != nil || r.Kind != "Status" || r.Code != status {
		return fmt.Errorf("answer %d is not of its API", status)
	}
	r.Message = web.Words(r.Message, token)
	return r
}
