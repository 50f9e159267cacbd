package githubapp

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/google/go-github/v60/github"

	"github.com/mayfly-ci/mayfly/creds/web"
)

// maxAnswer bounds what GitHub answers, in bytes: a hundred repositories; set
// 2026-11-24.
const maxAnswer = 4 << 20

// The life of what the App proves itself with: GitHub takes ten minutes at most,
// and clocks differ.
const (
	proofLife = 5 * time.Minute
	proofSkew = time.Minute
)

// A bearer adds a token to requests, and bounds answers, which the client reads
// whole.
type bearer struct {
	under http.RoundTripper
	token string
}

func (b bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+b.token)
	res, err := b.under.RoundTrip(r)
	if err == nil {
		res.Body = struct {
			io.Reader
			io.Closer
		}{io.LimitReader(res.Body, maxAnswer), res.Body}
	}
	return res, err
}

// A refusal is an error that GitHub itself sent.
type refusal struct {
	status  int
	message string
}

func (r *refusal) Error() string { return fmt.Sprintf("server answers %d: %s", r.status, r.message) }

// refused says whether err is an answer of that status.
func refused(err error, status int) bool {
	var r *refusal
	return errors.As(err, &r) && r.status == status
}

// dead says whether err is GitHub's word that it does not know the token. A proxy
// that wants a password says something else.
func dead(err error) bool {
	var r *refusal
	return errors.As(err, &r) && r.status == http.StatusUnauthorized && r.message == "Bad credentials"
}

// do makes a request with a token. The client is new each time: what it remembers
// of limits is about one token.
func (i *Issuer) do(ctx context.Context, token, method, path string, body, into any) error {
	base, err := url.Parse(i.config.address() + "/")
	if err != nil {
		return fmt.Errorf("address: %w", err)
	}
	as := *i.client
	as.Transport = bearer{i.client.Transport, token}
	client := github.NewClient(&as)
	client.BaseURL = base
	req, err := client.NewRequest(method, path, body)
	if err != nil {
		return fmt.Errorf("request: %w", err)
	}
	_, err = client.Do(ctx, req, into)
	what, _, _ := strings.Cut(path, "?")
	var said *github.ErrorResponse
	switch {
	case err == nil:
		return nil
	case errors.As(err, &said) && said.Message != "":
		err = &refusal{said.Response.StatusCode, web.Words(said.Message, token)}
	case said != nil:
		err = fmt.Errorf("answer %d is not of its API", said.Response.StatusCode)
	}
	return fmt.Errorf("%s %s: %w", method, what, err)
}

// asApp makes a request as the App, which signs who it is (RFC 7519, RS256).
func (i *Issuer) asApp(ctx context.Context, method, path string, body, into any) error {
	key, err := i.key()
	if err != nil {
		return fmt.Errorf("private_key_file: %w", err)
	}
	now := i.config.Now()
	claims, err := json.Marshal(map[string]any{"iss": i.config.App, "iat": now.Add(-proofSkew).Unix(), "exp": now.Add(proofLife).Unix()})
	if err != nil {
		return err
	}
	text := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"RS256","typ":"JWT"}`)) + "." + base64.RawURLEncoding.EncodeToString(claims)
	sum := sha256.Sum256([]byte(text))
	signature, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, sum[:])
	if err != nil {
		return fmt.Errorf("private_key_file: %w", err)
	}
	err = i.do(ctx, text+"."+base64.RawURLEncoding.EncodeToString(signature), method, path, body, into)
	if refused(err, http.StatusUnauthorized) {
		err = fmt.Errorf("GitHub does not know the App: see app, private_key_file and this machine's clock: %w", err)
	}
	return err
}

// key is the App's. No error has any of it.
func (i *Issuer) key() (*rsa.PrivateKey, error) {
	secret, err := i.config.Key()
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode([]byte(secret.Reveal()))
	if block == nil {
		return nil, errors.New("not in PEM")
	}
	if key, err := x509.ParsePKCS1PrivateKey(block.Bytes); err == nil {
		return key, nil
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	key, ok := parsed.(*rsa.PrivateKey)
	if err != nil || !ok {
		return nil, errors.New("not an RSA key, as GitHub gives it")
	}
	return key, nil
}

// Check asks for the installation, and mints nothing.
func (i *Issuer) Check(ctx context.Context) error {
	var a struct {
		Suspended *time.Time `json:"suspended_at"`
	}
	err := i.asApp(ctx, http.MethodGet, fmt.Sprintf("app/installations/%d", i.config.Installation), nil, &a)
	if err == nil && a.Suspended != nil {
		err = errors.New("the installation is suspended")
	}
	return err
}
