package broker_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/oidc"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner/audit"
	"github.com/mayfly-ci/mayfly/test/agenttest"
	"github.com/mayfly-ci/mayfly/test/servertest"
)

const askPolicy = `version: 1
rules:
  - name: all
    match: {trust: local}
    timeout: 3m
    limits: {memory: 1GiB, pids: 256, disk: 512MiB, log: 4MiB}
    egress:
      - {name: files.corp, port: %d, protocol: http, resolve: [127.0.0.1]}
    leases:
      - {name: id, issuer: identity, step: publish, ttl: 2m, scope: {audiences: [sigstore, vault]}, tools: [github-oidc]}
      - {name: later, issuer: identity, step: deploy, ttl: 2m, scope: {audiences: [sts]}, tools: [github-oidc]}
`

// askSteps use the endpoint as GitHub's toolkit does, and as an attacker would. The
// token of a step is kept for the next ones, which have to get nothing for it.
const askSteps = `      - run: |
          curl -sS http://files.corp:%d/actions.tar.gz | tar xz
          test -z "$ACTIONS_ID_TOKEN_REQUEST_URL$ACTIONS_ID_TOKEN_REQUEST_TOKEN"
          echo "before $(curl -sS --max-time 20 'http://id-lease.mayfly.internal/token?audience=vault' 2>&1)"
      - id: publish
        run: |
          cat > ask.js <<'EOF'
          const core = require('@actions/core');
          (async () => {
            for (const audience of ['sigstore', 'vault', 'sigstore']) {
              const token = await core.getIDToken(audience);
              console.log('token ' + [...token].reverse().join(''));
            }
            await core.getIDToken('evil').then(() => console.log('evil given'), e => console.log('evil refused: ' + e.message.replaceAll('\n', ' ')));
            await core.getIDToken().then(() => console.log('any given'), e => console.log('any refused'));
          })();
          EOF
          node ask.js
          curl -sS -H "Authorization: Bearer $ACTIONS_ID_TOKEN_REQUEST_TOKEN" "$ACTIONS_ID_TOKEN_REQUEST_URL&audience=vault"
          echo
          echo "wrong $(curl -sS -o /dev/null -w '%%{http_code}' -H "Authorization: Bearer wrong" "$ACTIONS_ID_TOKEN_REQUEST_URL&audience=vault")"
          echo "host $(curl -sS -o /dev/null -w '%%{http_code}' -H 'Host: evil.example' "$ACTIONS_ID_TOKEN_REQUEST_URL&audience=vault" 2>&1)"
          echo "$ACTIONS_ID_TOKEN_REQUEST_URL" > url
          echo "$ACTIONS_ID_TOKEN_REQUEST_TOKEN" > token
      - run: |
          test -z "$ACTIONS_ID_TOKEN_REQUEST_URL$ACTIONS_ID_TOKEN_REQUEST_TOKEN"
          echo "after $(curl -sS --max-time 20 -H "Authorization: Bearer $(cat token)" "$(cat url)&audience=vault" 2>&1)"
      - id: deploy
        run: |
          U="$ACTIONS_ID_TOKEN_REQUEST_URL" A="Authorization: Bearer $ACTIONS_ID_TOKEN_REQUEST_TOKEN"
          echo "step $(curl -sS -H "Authorization: Bearer $(cat token)" "$U&audience=sts")"
          echo "audience $(curl -sS -H "$A" "$U&audience=vault")"
          curl -sS -H "$A" "$U" | rev
          echo "kept $(rev token)"
`

// askOther is a job that was told the request token of one before it.
const askOther = `      - id: publish
        run: |
          ask() { echo "$1 $(curl -sS -o answer -w '%%{http_code}' -H "Authorization: Bearer $2" "$ACTIONS_ID_TOKEN_REQUEST_URL&audience=vault") $(cat answer)"; }
          ask foreign "$(echo %s | rev)"
          ask own "$ACTIONS_ID_TOKEN_REQUEST_TOKEN"
`

// TestIdentityEndpoint: the toolkit of GitHub's actions gets tokens in the step that
// the policy names, for its audiences; all else gets none, and all is written down.
func TestIdentityEndpoint(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	dir, err := servertest.Dir(ctx, "actions")
	agenttest.Must(t, err)
	files := httptest.NewServer(http.FileServer(http.Dir(dir)))
	t.Cleanup(files.Close)
	port := files.Listener.Addr().(*net.TCPAddr).Port
	identity, err := oidc.New(oidc.Config{URL: "https://ci.example.test", Owner: "inst-1", Store: &kept{}})
	agenttest.Must(t, err)
	a := newAgent(t, map[string]creds.Issuer{"identity": oidc.NewLeases(identity)}, fmt.Sprintf(askPolicy, port))
	conclusion, log := a.run(ctx, t, fmt.Sprintf(askSteps, port))
	if conclusion != providers.Success {
		t.Fatalf("%s:\n%s", conclusion, log)
	}
	for _, want := range []string{
		"before curl: .*resolve host", "after curl: .*resolve host", `\{"value":"\*\*\*"\}`, "wrong 401", "host (000|curl)", "any refused",
		"evil refused: .*403.*tokens are for the audience sigstore or vault", `step \{"message":"the request token is not that of this lease"\}`,
		`audience \{"message":"scope refused by the issuer: tokens are for the audience sts"\}`,
	} {
		if !regexp.MustCompile(want).MatchString(log) {
			t.Errorf("the log lacks %q", want)
		}
	}
	seen := reverse(log)
	tokens := regexp.MustCompile(`eyJ[\w-]+\.[\w-]+\.[\w-]+`).FindAllString(seen, -1)
	if len(tokens) != 4 {
		t.Errorf("%d tokens were given, want 4", len(tokens))
	}
	ids := map[string]bool{}
	for _, token := range tokens {
		c := verified(t, identity, token)
		ids[fmt.Sprint(c["jti"])] = true
		if c["job_id"] == nil || c["run_id"] == nil || c["repository"] == nil || c["policy_digest"] == nil || c["trust"] != "local" || c["step"] == nil {
			t.Errorf("claims %v", c)
		}
		if strings.Contains(log, token) {
			t.Error("a token is in the log in clear")
		}
	}
	a.search(t, tokens...)
	kept := regexp.MustCompile(`kept (\S+)`).FindStringSubmatch(log)
	if kept == nil {
		t.Fatalf("the job did not tell its request token:\n%s", log)
	}
	_, other := a.run(ctx, t, fmt.Sprintf(askOther, kept[1]))
	for _, want := range []string{`foreign 401 {"message":"the request token is not that of this lease"}`, `own 200 {"value":"***"}`} {
		if !strings.Contains(other, want) {
			t.Errorf("the log of another job lacks %q:\n%s", want, other)
		}
	}
	a.asked(ctx, t, ids)
	if t.Failed() {
		t.Log(log)
	}
}

// verified are the claims of a token, whose signature is checked as a provider does.
func verified(t *testing.T, i *oidc.Issuer, token string) map[string]any {
	t.Helper()
	keys, err := i.Keys()
	agenttest.Must(t, err)
	var set jose.JSONWebKeySet
	agenttest.Must(t, json.Unmarshal(keys, &set))
	parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.ES256})
	agenttest.Must(t, err)
	claims := map[string]any{}
	agenttest.Must(t, parsed.Claims(set, &claims))
	return claims
}

// asked wants what was asked for in the record: what was given by its id, and what
// was not.
func (a *agent) asked(ctx context.Context, t *testing.T, ids map[string]bool) {
	t.Helper()
	given, refused := 0, 0
	for e, err := range audit.Read(filepath.Join(a.dir, "audit"), audit.Filter{}) {
		agenttest.Must(t, err)
		if e.Action != "lease.ask" {
			continue
		}
		if e.Result != "ok" {
			refused++
			continue
		}
		if given++; e.Detail["jti"] == "" || e.Detail["audience"] == "" || e.Detail["step"] == "" {
			t.Errorf("the record of a token: %+v", e)
		}
		delete(ids, e.Detail["jti"])
	}
	if given != 6 || refused != 6 || len(ids) != 0 {
		t.Errorf("the record has %d tokens and %d refusals, and lacks %d", given, refused, len(ids))
	}
}
