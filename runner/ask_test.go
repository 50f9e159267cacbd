package runner_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// An asker gives tokens for two audiences.
type asker struct {
	creds.Issuer
	given int
	fail  error
}

func (a *asker) Ask(_ context.Context, name, audience string) (creds.Answer, error) {
	if a.fail != nil {
		return creds.Answer{}, a.fail
	}
	if audience != "vault" && audience != "sts" {
		return creds.Answer{}, fmt.Errorf("%w: not for that", creds.ErrBadScope)
	}
	a.given++
	id := fmt.Sprintf("%s/%s/%d", name, audience, a.given)
	return creds.Answer{Value: creds.NewSecret("jwt-" + id), ID: id, Audience: audience}, nil
}

// A knocker asks at a door and knows what was written down of it.
type knocker struct {
	asker  asker
	hidden []string
	lines  []string
	lost   error
	door   http.Handler
}

const shown = "request-token-of-this-lease"

func newKnocker() *knocker {
	k := &knocker{}
	k.door = runner.NewDoor(&k.asker, "l-1", creds.NewSecret(shown),
		func(s creds.Secret) { k.hidden = append(k.hidden, s.Reveal()) },
		func(err error, detail []string) error {
			k.lines = append(k.lines, fmt.Sprint(err, detail))
			return k.lost
		})
	return k
}

func (k *knocker) ask(r *http.Request) (int, string) {
	w := httptest.NewRecorder()
	k.door.ServeHTTP(w, r)
	var body struct{ Value, Message string }
	if err := json.Unmarshal(w.Body.Bytes(), &body); err != nil {
		return w.Code, "no JSON: " + err.Error()
	}
	if body.Message != "" {
		return w.Code, body.Message
	}
	return w.Code, body.Value
}

func request(method, target string, header ...string) *http.Request {
	r := httptest.NewRequest(method, target, nil)
	for _, h := range header {
		r.Header.Add("Authorization", h)
	}
	return r
}

// TestDoor: who shows the token gets one for an audience of the lease; nobody else
// gets anything, and each attempt is one line.
func TestDoor(t *testing.T) {
	t.Parallel()
	const good = "/token?api-version=2.0&audience=vault"
	for name, c := range map[string]struct {
		request *http.Request
		status  int
		want    string
	}{
		"as GitHub's toolkit asks": {request("GET", good, "Bearer "+shown), 200, "jwt-l-1/vault/1"},
		"another scheme's case":    {request("GET", good, "bearer "+shown), 200, "jwt-l-1/vault/1"},
		"escaped":                  {request("GET", "/token?audience=v%61ult", "Bearer "+shown), 200, "jwt-l-1/vault/1"},
		"another audience":         {request("GET", "/token?audience=evil", "Bearer "+shown), 403, "not for that"},
		"no audience":              {request("GET", "/token?api-version=2.0", "Bearer "+shown), 403, "not for that"},
		"an empty audience":        {request("GET", "/token?audience=", "Bearer "+shown), 400, "empty"},
		"two audiences":            {request("GET", good+"&audience=sts", "Bearer "+shown), 400, "once"},
		"more in the query":        {request("GET", good+"&subject=admin", "Bearer "+shown), 400, "once"},
		"a query that is none":     {request("GET", good+"&%zz", "Bearer "+shown), 400, "query"},
		"no token":                 {request("GET", good), 401, "request token"},
		"another token":            {request("GET", good, "Bearer "+shown+"x"), 401, "request token"},
		"an empty token":           {request("GET", good, "Bearer "), 401, "request token"},
		"no scheme":                {request("GET", good, shown), 401, "request token"},
		"another scheme":           {request("GET", good, "Basic "+shown), 401, "request token"},
		"two tokens":               {request("GET", good, "Bearer "+shown, "Bearer "+shown), 401, "request token"},
		"another method":           {request("POST", good, "Bearer "+shown), 405, "GET"},
		"another path":             {request("GET", "/credentials?audience=vault", "Bearer "+shown), 404, "nothing"},
	} {
		k := newKnocker()
		status, got := k.ask(c.request)
		if status != c.status || !strings.Contains(got, c.want) {
			t.Errorf("%s: got %d %q, want %d %q", name, status, got, c.status, c.want)
		}
		if len(k.lines) != 1 || strings.Contains(k.lines[0], shown) || strings.Contains(k.lines[0], "jwt-") {
			t.Errorf("%s: the record has %q", name, k.lines)
		}
		if given := status == 200; given != (k.asker.given == 1) || given != slices.Contains(k.hidden, got) || given != strings.Contains(k.lines[0], "jti") {
			t.Errorf("%s: %d tokens, hidden %q, record %q", name, k.asker.given, k.hidden, k.lines)
		}
	}
	k := newKnocker()
	k.lost = errors.New("disk full")
	if status, got := k.ask(request("GET", good, "Bearer "+shown)); status != 503 || strings.Contains(got, "jwt") {
		t.Errorf("without a record: got %d %q", status, got)
	}
	k = newKnocker()
	k.asker.fail = errors.New("revoked")
	if status, got := k.ask(request("GET", good, "Bearer "+shown)); status != 503 || !strings.Contains(got, "revoked") {
		t.Errorf("a lease that is over: got %d %q", status, got)
	}
}

// FuzzDoor: whatever a job sends, a token is for what the lease allows, whoever asked
// showed its token, and there is one line.
func FuzzDoor(f *testing.F) {
	f.Add("/token", "audience=vault", "Bearer "+shown)
	f.Add("/token", "audience=vault&audience=evil", "Bearer "+shown)
	f.Add("/token", "audience=v%61ult&api-version", "bearer  "+shown)
	f.Add("//token", "audience=\xff\n", "Bearer x")
	f.Add("/token", "audience=%0a%c3%a4%ff", "Bearer "+shown)
	f.Fuzz(func(t *testing.T, path, query, header string) {
		k := newKnocker()
		r := &http.Request{Method: http.MethodGet, URL: &url.URL{Path: path, RawQuery: query}, Header: http.Header{"Authorization": {header}}}
		status, got := k.ask(r)
		if len(k.lines) != 1 || strings.ContainsFunc(k.lines[0], func(c rune) bool { return c < ' ' || c > '~' }) {
			t.Errorf("the record has %q", k.lines)
		}
		scheme, token, _ := strings.Cut(header, " ")
		asked, err := url.ParseQuery(query)
		fits := err == nil && token == shown && strings.EqualFold(scheme, "bearer") && (asked.Get("audience") == "vault" || asked.Get("audience") == "sts") && len(asked["audience"]) == 1
		if status == 200 && (!fits || path != "/token" || got != k.hidden[0]) {
			t.Errorf("%q %q %q: got %q", path, query, header, got)
		}
		if status != 200 && (k.asker.given > 0 || len(k.hidden) > 0) {
			t.Errorf("%q %q %q: got %d, and %d tokens were made", path, query, header, status, k.asker.given)
		}
	})
}

const askPolicy = `version: 1
rules:
  - name: all
    match: {trust: [local]}
    leases:
      - {name: id, issuer: identity, step: publish, scope: {audiences: [vault]}, tools: [github-oidc]}
`

// askIssuer gives leases of the world's issuer, with a token to show.
type askIssuer struct {
	*worldIssuer
	asker
	grants []creds.Grant
}

func (i *askIssuer) Issue(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
	i.grants = append(i.grants, g)
	l, err := i.worldIssuer.Issue(ctx, name, g)
	l.Values = map[string]creds.Secret{creds.RequestToken: creds.NewSecret(shown)}
	return l, err
}

func (i *askIssuer) Revoke(ctx context.Context, name string, h []byte) error {
	return i.worldIssuer.Revoke(ctx, name, h)
}

func (i *askIssuer) Probe(ctx context.Context, name string, h []byte) (creds.Proof, error) {
	return i.worldIssuer.Probe(ctx, name, h)
}

func (i *askIssuer) List(ctx context.Context) ([]creds.Info, error) { return i.worldIssuer.List(ctx) }

// TestAskInStep: the endpoint is opened for its step and closed with it, and the
// lease says of the job what only the agent knows.
func TestAskInStep(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	g := &observed{(*worldGateway)(w), map[string]egress.Opening{}}
	i := &askIssuer{worldIssuer: (*worldIssuer)(w)}
	r := w.run(lifetime(t), func(c *runner.Config) {
		withPolicy(t, askPolicy)(c)
		c.Gateway, c.Issuers = g, map[string]creds.Issuer{"identity": i}
	}, providers.Step{Run: "env ACTIONS_ID_TOKEN_REQUEST_URL"}, providers.Step{ID: "publish", Run: "env ACTIONS_ID_TOKEN_REQUEST_URL"}, providers.Step{Run: "env ACTIONS_ID_TOKEN_REQUEST_URL"})
	if r.Conclusion != providers.Success {
		t.Fatalf("got %+v; log:\n%s", r, w.shown())
	}
	want := []string{
		"claim", "box.pull", "open", "box.create", "attach", "box.probe", "box.run",
		"issue", "open", "box.run", "close", "revoke", "probe", "box.run", "box.probe",
		"box.destroy", "close", "log.close", "complete",
	}
	if got := w.happened(); !slices.Equal(got, want) {
		t.Errorf("order:\n got %v\nwant %v", got, want)
	}
	if n := strings.Count(w.shown(), "http://id-lease.mayfly.internal/token?api-version=2.0"); n != 1 {
		t.Errorf("%d steps have the address, want one:\n%s", n, w.shown())
	}
	o := g.opened["id"]
	if len(o.Serve) != 1 || o.Serve[0].Rule.Name != "id-lease.mayfly.internal" || o.Serve[0].Local != 0 || o.Parent == "" || len(o.Rules.Allow) != 0 {
		t.Errorf("opened %+v", o)
	}
	if s := i.grants[0].Subject; len(i.grants) != 1 || !strings.HasPrefix(s.JobID, "mf-") || !strings.HasPrefix(s.Policy, "sha256:") || s.Step != "publish" || s.Trust != "local" {
		t.Errorf("granted to %+v", s)
	}
	w.clean()
}

// TestAskOfOthers: a lease of an issuer that cannot be asked fails the job.
func TestAskOfOthers(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	r := w.run(lifetime(t), withPolicy(t, strings.Replace(askPolicy, "issuer: identity", "issuer: pg", 1)), providers.Step{ID: "publish", Run: "print one"})
	if r.Conclusion != providers.Failure || !strings.Contains(r.Reason, "issuer pg gives no identity tokens") {
		t.Errorf("got %+v", r)
	}
	w.clean()
}
