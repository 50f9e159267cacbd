package vault_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/oidc"
	"github.com/mayfly-ci/mayfly/creds/vault"
	"github.com/mayfly-ci/mayfly/test/openbaotest"
	"github.com/mayfly-ci/mayfly/test/postgrestest"
)

const owner = "inst-1"

// The policies of the tests: what README says that jobs and the agent need.
const (
	jobPolicy = `
path "auth/token/create" { capabilities = ["update"] }
path "secret/data/app" { capabilities = ["read"] }
path "database/creds/*" { capabilities = ["read"] }`
	agentPolicy = `
path "sys/leases/revoke" { capabilities = ["update"] }
path "sys/leases/lookup" { capabilities = ["update"] }
path "auth/token/accessors" { capabilities = ["list", "sudo"] }
path "auth/token/accessors/" { capabilities = ["list", "sudo"] }
path "auth/token/lookup-accessor" { capabilities = ["update"] }
path "auth/token/revoke-accessor" { capabilities = ["update"] }`
)

type safe struct{ b []byte }

func (s *safe) Load() ([]byte, error) { return s.b, nil }
func (s *safe) Save(b []byte) error   { s.b = b; return nil }

// A world is an OpenBao that trusts an issuer of identities, with a key-value
// engine and one that makes roles in a PostgreSQL.
type world struct {
	*openbaotest.Server
	t        testing.TB
	db       *postgrestest.Server
	identity *oidc.Issuer
	url      string // of the identity
	keys     *safe
	issuer   *vault.Issuer
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{Server: openbaotest.Start(t), t: t, db: postgrestest.Start(t)}
	mux := http.NewServeMux()
	documents := httptest.NewServer(mux)
	t.Cleanup(documents.Close)
	w.url, w.keys = documents.URL, &safe{}
	identity, err := oidc.New(oidc.Config{URL: w.url, Owner: owner, Store: w.keys})
	if err != nil {
		t.Fatal(err)
	}
	mux.Handle("/", identity)
	w.identity = identity
	w.do("POST", "sys/auth/jwt", `{"type": "jwt"}`)
	w.do("POST", "auth/jwt/config", `{"oidc_discovery_url": %q, "bound_issuer": %q}`, documents.URL, documents.URL)
	w.do("PUT", "sys/policies/acl/job", `{"policy": %s}`, strconv.Quote(jobPolicy))
	w.do("PUT", "sys/policies/acl/agent", `{"policy": %s}`, strconv.Quote(agentPolicy))
	w.role("job", `"bound_claims": {"provider": "local"}, "token_policies": ["job"], "token_ttl": "1h"`)
	w.role("short", `"bound_claims": {"provider": "local"}, "token_policies": ["job"], "token_ttl": "2m"`)
	w.role("main", `"bound_claims": {"repository": "o/r", "ref": "refs/heads/main"}, "token_policies": ["job"], "token_ttl": "1h"`)
	w.role("weak", `"bound_claims": {"provider": "local"}, "token_policies": [], "token_ttl": "1h"`)
	w.role("agent", `"bound_subject": "installation:inst-1", "token_policies": ["agent"], "token_ttl": "1m"`)
	w.do("POST", "sys/mounts/secret", `{"type": "kv", "options": {"version": "2"}}`)
	w.put()
	w.do("POST", "sys/mounts/database", `{"type": "database"}`)
	w.do("POST", "database/config/app", `{"plugin_name": "postgresql-database-plugin", "allowed_roles": ["app", "stubborn"],
		"connection_url": "postgresql://{{username}}:{{password}}@%s:%d/postgres?sslmode=disable", "username": "postgres", "password": %q}`,
		w.db.Host(), w.db.Port(), w.db.Password())
	// Only one role is granted something: two that are at the same moment are an
	// error of PostgreSQL ("tuple concurrently updated").
	const roles = `{"db_name": "app", "default_ttl": "1h", "creation_statements": ["CREATE ROLE \"{{name}}\" LOGIN PASSWORD '{{password}}' VALID UNTIL '{{expiration}}'%s"],
		"revocation_statements": ["%s; DROP ROLE IF EXISTS \"{{name}}\""]}`
	w.do("POST", "database/roles/app", roles, "", `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{{name}}'; DROP OWNED BY \"{{name}}\" CASCADE`)
	w.do("POST", "database/roles/stubborn", roles, `; GRANT CREATE ON SCHEMA public TO \"{{name}}\"`, `REVOKE CREATE ON SCHEMA public FROM \"{{name}}\"`)
	w.issuer = w.newIssuer(w.config())
	return w
}

func (w *world) role(name, more string) {
	w.t.Helper()
	w.do("POST", "auth/jwt/role/"+name, `{"role_type": "jwt", "user_claim": "sub", "bound_audiences": ["vault"], %s}`, more)
}

// put writes the secret; the engine needs a moment after it was mounted.
func (w *world) put() {
	w.t.Helper()
	eventually(w.t, "the key-value engine is ready", func() bool {
		return w.Do(w.t.Context(), "POST", "secret/data/app", json.RawMessage(`{"data": {"password": "kv-secret-value", "n": 7654321987}}`), nil) == nil
	})
}

func (w *world) do(method, path, form string, args ...any) {
	w.t.Helper()
	if err := w.Do(w.t.Context(), method, path, json.RawMessage(fmt.Sprintf(form, args...)), nil); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) config() vault.Config {
	return vault.Config{Address: w.Address(), CAFile: w.CAFile(), Role: "job", AgentRole: "agent", Owner: owner, Sign: w.sign}
}

func (w *world) sign(_ context.Context, s creds.Subject, lease string) (vault.Identity, error) {
	t, err := w.identity.Mint(s, "vault", map[string]string{"lease": lease})
	return vault.Identity{Token: t.Value, ID: t.ID}, err
}

func (w *world) newIssuer(c vault.Config) *vault.Issuer {
	w.t.Helper()
	i, err := vault.New(c)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(i.Close)
	return i
}

func grant(scope string) creds.Grant {
	return creds.Grant{
		Subject: creds.Subject{Provider: "local", Repository: "o/r", Ref: "refs/heads/main", Job: "mf-1", Origin: creds.Origin{JobID: "mf-1"}},
		Scope:   json.RawMessage(scope), Expires: time.Now().Add(10 * time.Minute),
	}
}

func (w *world) issue(name, scope string) creds.Lease {
	w.t.Helper()
	l, err := w.issuer.Issue(w.t.Context(), name, grant(scope))
	if err != nil {
		w.t.Fatalf("Issue: %v", err)
	}
	return l
}

// as makes a request with a token of a job and returns the status.
func (w *world) as(ctx context.Context, token creds.Secret, method, path string) (int, error) {
	req, err := http.NewRequestWithContext(ctx, method, w.Address()+"/v1/"+path, nil)
	if err != nil {
		return 0, err
	}
	req.Header.Set("X-Vault-Token", token.Reveal())
	res, err := w.Client().Do(req)
	if err != nil {
		return 0, err
	}
	return res.StatusCode, res.Body.Close()
}

// readKV is what a job does with its token.
func (w *world) readKV(ctx context.Context, l creds.Lease) error {
	status, err := w.as(ctx, l.Values["vault_token"], "GET", "secret/data/app")
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("status %d", status)
	}
	return err
}

// psql runs a statement with the lease's own role.
func (w *world) psql(ctx context.Context, l creds.Lease, statement string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "psql", "-X", "-w", "-q", "-v", "ON_ERROR_STOP=1", "-c", statement,
		fmt.Sprintf("host=%s port=%d dbname=postgres sslmode=disable user=%s", w.db.Host(), w.db.Port(), l.Values["username"].Reveal()))
	cmd.Env = append(os.Environ(), "PGPASSWORD="+l.Values["password"].Reveal())
	return cmd
}

func (w *world) useDB(ctx context.Context, l creds.Lease) error {
	out, err := w.psql(ctx, l, "SELECT 1").CombinedOutput()
	if err != nil {
		return errors.New(strings.TrimSpace(string(out)))
	}
	return nil
}

// root runs a statement as the database's administrator.
func (w *world) root(statement string) {
	w.t.Helper()
	if err := w.try(statement); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) try(statement string) error {
	admin := creds.Lease{Values: map[string]creds.Secret{"username": creds.NewSecret(postgrestest.User), "password": creds.NewSecret(w.db.Password())}}
	if out, err := w.psql(w.t.Context(), admin, statement).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %s", statement, out)
	}
	return nil
}

// eventually waits until ok.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
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
