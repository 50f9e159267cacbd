package aws_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	sdk "github.com/aws/aws-sdk-go-v2/aws"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/aws"
	"github.com/mayfly-ci/mayfly/creds/oidc"
	"github.com/mayfly-ci/mayfly/test/miniotest"
)

const owner = "inst-1"

const mainScope = `{"statements": [{"Effect": "Allow", "Action": ["s3:GetObject", "s3:PutObject"], "Resource": "arn:aws:s3:::app/main/*"}]}`

type safe struct{ b []byte }

func (s *safe) Load() ([]byte, error) { return s.b, nil }
func (s *safe) Save(b []byte) error   { s.b = b; return nil }

// An identity is an issuer that serves its documents.
type identity struct {
	*oidc.Issuer
	url  string
	keys *safe
}

func newIdentity(t testing.TB) *identity {
	t.Helper()
	mux := http.NewServeMux()
	documents := httptest.NewServer(mux)
	t.Cleanup(documents.Close)
	i := &identity{url: documents.URL, keys: &safe{}}
	var err error
	if i.Issuer, err = oidc.New(oidc.Config{URL: i.url, Owner: owner, Store: i.keys}); err != nil {
		t.Fatal(err)
	}
	mux.Handle("/", i.Issuer)
	return i
}

func (i *identity) sign(_ context.Context, s creds.Subject, lease string) (aws.Identity, error) {
	t, err := i.Mint(s, miniotest.Audience, map[string]string{"lease": lease})
	return aws.Identity{Token: t.Value, ID: t.ID}, err
}

// A world is a MinIO that believes an identity, with a bucket and two objects.
type world struct {
	*miniotest.Server
	t        testing.TB
	identity *identity
	issuer   *aws.Issuer
}

func newWorld(t testing.TB) *world {
	t.Helper()
	id := newIdentity(t)
	w := &world{Server: miniotest.Start(t, id.url), t: t, identity: id}
	for _, c := range [][2]string{{"/app", ""}, {"/app/main/a", "hello"}, {"/app/other/a", "hello"}} {
		status, body, err := w.Do(t.Context(), miniotest.Root(), http.MethodPut, c[0], c[1])
		if err != nil || status != http.StatusOK {
			t.Fatalf("%s: %d %s %v", c[0], status, body, err)
		}
	}
	w.issuer = newIssuer(t, w.config())
	return w
}

func (w *world) config() aws.Config {
	return aws.Config{Service: "minio", Endpoint: w.Address(), CAFile: w.CAFile(), Role: w.Role(), Sign: w.identity.sign}
}

func newIssuer(t testing.TB, c aws.Config) *aws.Issuer {
	t.Helper()
	i, err := aws.New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(i.Close)
	return i
}

func grant(scope string) creds.Grant {
	return creds.Grant{
		Subject: creds.Subject{Provider: "local", Repository: "o/r", Ref: "refs/heads/main", Job: "mf-1", Origin: creds.Origin{JobID: "mf-1"}},
		Scope:   json.RawMessage(scope), Expires: time.Now().Add(10 * time.Minute),
	}
}

func issue(t testing.TB, i *aws.Issuer, name, scope string) creds.Lease {
	t.Helper()
	l, err := i.Issue(t.Context(), name, grant(scope))
	if err != nil {
		t.Fatalf("Issue: %v", err)
	}
	return l
}

func credentials(l creds.Lease) sdk.Credentials {
	return sdk.Credentials{
		AccessKeyID: l.Facts["access_key_id"], SecretAccessKey: l.Values["secret_access_key"].Reveal(), SessionToken: l.Values["session_token"].Reveal(),
	}
}

// status is what a job gets for a request with its session.
func (w *world) status(l creds.Lease, method, path string) int {
	w.t.Helper()
	status, _, err := w.Do(w.t.Context(), credentials(l), method, path, "")
	if err != nil {
		w.t.Fatal(err)
	}
	return status
}

// use reads what mainScope lets a job read.
func (w *world) use(ctx context.Context, l creds.Lease) error {
	status, body, err := w.Do(ctx, credentials(l), http.MethodGet, "/app/main/a", "")
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("status %d: %s", status, body)
	}
	return err
}

// wait waits until ok.
func wait(t testing.TB, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	bound := time.After(time.Minute)
	for !ok() {
		select {
		case <-tick.C:
		case <-bound:
			t.Fatalf("not within a minute: %s", what)
		}
	}
}
