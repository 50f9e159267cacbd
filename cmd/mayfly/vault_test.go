package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/mayfly-ci/mayfly/test/openbaotest"
)

// TestVaultScript is TestScript for the script that needs an OpenBao, which a
// test starts.
func TestVaultScript(t *testing.T) {
	t.Parallel()
	testscript.Run(t, testscript.Params{
		Files:               []string{"testdata/vault.txtar"},
		RequireExplicitExec: true,
		Setup:               setup,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"database": database,
			"openbao":  func(ts *testscript.TestScript, _ bool, args []string) { openbao(t, ts, args) },
		},
	})
}

// openbao starts a server at $BAO, whose certificate is bao.pem, and a web server
// at $IDENTITY for the directory web. "openbao trust" tells it to believe what
// lies there then, and makes the roles job and mayfly, and an engine for the
// database at $PGPORT.
func openbao(t *testing.T, ts *testscript.TestScript, args []string) {
	if len(args) != 0 {
		trust(ts)
		return
	}
	web := httptest.NewServer(http.FileServer(http.Dir(ts.MkAbs("web"))))
	ts.Defer(web.Close)
	s := openbaotest.Start(t)
	ca, err := os.ReadFile(s.CAFile())
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs("bao.pem"), ca, 0o600))
	ts.Setenv("IDENTITY", web.URL)
	ts.Setenv("BAO", s.Address())
	ts.Setenv("BAO_TOKEN", s.RootToken())
}

func trust(ts *testscript.TestScript) {
	s, err := openbaotest.At(ts.Getenv("BAO"), ts.MkAbs("bao.pem"), ts.Getenv("BAO_TOKEN"))
	ts.Check(err)
	url := ts.Getenv("IDENTITY")
	const job = `path \"auth/token/create\" { capabilities = [\"update\"] } path \"database/creds/app\" { capabilities = [\"read\"] }`
	const agent = `path \"sys/leases/*\" { capabilities = [\"update\"] } path \"auth/token/accessors*\" { capabilities = [\"list\", \"sudo\"] } path \"auth/token/*\" { capabilities = [\"update\"] }`
	for _, c := range [][2]string{
		{"sys/auth/jwt", `{"type": "jwt"}`},
		{"auth/jwt/config", fmt.Sprintf(`{"oidc_discovery_url": %q, "bound_issuer": %q}`, url, url)},
		{"sys/policies/acl/job", `{"policy": "` + job + `"}`},
		{"sys/policies/acl/agent", `{"policy": "` + agent + `"}`},
		{"auth/jwt/role/job", `{"role_type": "jwt", "user_claim": "sub", "bound_audiences": ["vault"], "token_policies": ["job"], "token_ttl": "1h", "bound_claims": {"trust": "local", "step": "use"}}`},
		{"auth/jwt/role/mayfly", `{"role_type": "jwt", "user_claim": "sub", "bound_audiences": ["vault"], "token_policies": ["agent"], "token_ttl": "1m", "bound_claims_type": "glob", "bound_claims": {"sub": "installation:*"}}`},
		{"sys/mounts/database", `{"type": "database"}`},
		{"database/config/app", fmt.Sprintf(`{"plugin_name": "postgresql-database-plugin", "allowed_roles": "app", "username": "postgres", "password": %q,
			"connection_url": "postgresql://{{username}}:{{password}}@127.0.0.1:%s/postgres?sslmode=disable"}`, strings.TrimSpace(ts.ReadFile("db.pass")), ts.Getenv("PGPORT"))},
		{"database/roles/app", `{"db_name": "app", "creation_statements": ["CREATE ROLE \"{{name}}\" LOGIN PASSWORD '{{password}}'"]}`},
	} {
		ts.Check(s.Do(context.Background(), http.MethodPost, c[0], json.RawMessage(c[1]), nil))
	}
}
