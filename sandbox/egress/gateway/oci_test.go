package gateway_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"testing"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// A depot is a registry and its realm at one name. It says what it was sent.
type depot struct {
	*secured
	tokens egress.Tokens
	mu     sync.Mutex
	asked  []string // what the realm was sent
	answer string   // in place of a token
}

const (
	depotUser = "robot"
	bearer    = "the-real-bearer-token-of-the-registry"
)

func newDepot(t *testing.T) *depot {
	t.Helper()
	d := &depot{}
	mux := http.NewServeMux()
	mux.HandleFunc("/token", d.realm)
	mux.HandleFunc("/v2/", func(w http.ResponseWriter, r *http.Request) {
		switch auth := r.Header.Get("Authorization"); {
		case auth == "":
			w.Header().Set("WWW-Authenticate", `Bearer realm="https://web.example/token",service="depot"`)
			w.WriteHeader(http.StatusUnauthorized)
		default:
			w.Header().Set("X-Echo", auth)
			fmt.Fprintf(w, "%v %s %s", auth == "Bearer "+bearer, auth, r.URL)
		}
	})
	d.secured = newSecured(t, true, mux)
	d.tokens = egress.Tokens{Realm: d.url("/token"), Service: "depot", Scopes: []string{"repository:lab/app:pull", "repository:lab/*:push"}}
	if err := d.opens(true, true, nil); err != nil {
		t.Fatal(err)
	}
	return d
}

// realm gives a token to who has the password.
func (d *depot) realm(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body) // a broken one has no password
	user, password, _ := r.BasicAuth()
	if form, err := url.ParseQuery(string(body)); err == nil && r.Method == http.MethodPost {
		user, password = form.Get("username"), form.Get("password")
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.asked = append(d.asked, fmt.Sprintf("%s %s %v", user, strings.Replace(string(body)+"?"+r.URL.RawQuery, realToken, "REAL", 1), password == realToken))
	w.Header().Set("X-Copy", bearer)
	text := fmt.Sprintf(`{"token":%q,"access_token":%q,"refresh_token":"another-credential","expires_in":300,"scope":%q}`, bearer, bearer, "for "+bearer)
	if d.answer != "" {
		text = d.answer
	}
	_, _ = io.WriteString(w, text) // the client may be gone
}

// opens opens the rules of one side or of both.
func (d *depot) opens(realm, registry bool, change func(*egress.Rule)) error {
	in := egress.Injection{Lease: "images", Value: creds.NewSecret(realToken), Placeholder: placeToken, Tokens: &d.tokens}
	rule := egress.Rule{
		ID: "images", Name: "web.example", Port: d.port, Protocol: egress.HTTPS, CA: d.ca,
		Resolve: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")},
	}
	var all []egress.Rule
	for as, wanted := range map[egress.Place]bool{egress.OCIToken: realm, egress.OCIRegistry: registry} {
		r, side := rule, in
		side.As, r.Inject = as, &side
		if as == egress.OCIRegistry {
			side.Pass, r.Requests = true, d.tokens.Using()
		} else {
			side.User, r.Requests = depotUser, d.tokens.Asking()
		}
		if change != nil {
			change(&r)
		}
		if wanted {
			all = append(all, r)
		}
	}
	return d.gw.Open(context.Background(), fmt.Sprint("images", realm, registry, change != nil), egress.Opening{Parent: "job", Ledger: d.ledger, Rules: egress.Rules{Allow: all}})
}

// ask asks the realm for a token.
func (d *depot) ask(h2 bool, query string, fields ...string) (token, answer string) {
	d.tb.Helper()
	status, header, body, _ := d.send(h2, http.MethodGet, "/token?"+query, fields...)
	var said struct {
		Token  string
		Access string `json:"access_token"`
	}
	_ = json.Unmarshal([]byte(body), &said) // it may be a refusal
	if said.Access != said.Token {
		d.tb.Errorf("clients that look at access_token have %q, and others %q", said.Access, said.Token)
	}
	if strings.Contains(fmt.Sprint(header, body), bearer) || strings.Contains(body, "another-credential") || strings.Contains(body, realToken) {
		d.tb.Errorf("the job sees a credential: %v %s", header, body)
	}
	return said.Token, fmt.Sprint(status, " ", body)
}

// TestRegistry: the realm gets the password and the registry the token, and the
// job sees neither, whichever way it asks.
func TestRegistry(t *testing.T) {
	t.Parallel()
	d := newDepot(t)
	if status, header, _, _ := d.send(true, http.MethodGet, "/v2/"); status != http.StatusUnauthorized || !strings.Contains(header.Get("WWW-Authenticate"), "/token") {
		t.Fatalf("the challenge: %d %v", status, header)
	}
	for _, h2 := range []bool{true, false} {
		token, answer := d.ask(h2, "service=depot&scope=repository:lab/app:pull", authBasic("me", placeToken))
		if token == "" || !strings.Contains(answer, `"expires_in":300`) {
			t.Fatalf("with a placeholder: %s", answer)
		}
		if again, answer := d.ask(h2, "service=depot&scope=repository:lab/app:pull"); again != token {
			t.Errorf("anonymous: %s", answer)
		}
		status, header, body, _ := d.send(h2, http.MethodGet, "/v2/lab/app/manifests/1", "Authorization: Bearer "+token)
		if status != http.StatusOK || body != "true Bearer *** /v2/lab/app/manifests/1" || header.Get("X-Echo") != "Bearer ***" {
			t.Errorf("got %d %v %s", status, header, body)
		}
	}
	resp, err := d.client(true).PostForm(d.url("/token"), url.Values{
		"grant_type": {"password"}, "service": {"depot"}, "client_id": {"c"}, "username": {"me"}, "password": {placeToken}, "scope": {"repository:lab/app:pull repository:lab/other:push"},
	})
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil || resp.StatusCode != http.StatusOK || strings.Contains(string(body), bearer) {
		t.Errorf("the form: %s %s %v", resp.Status, body, err)
	}
	d.mu.Lock()
	asked := strings.Join(d.asked, "\n")
	d.mu.Unlock()
	const form = "robot access_type=online&client_id=c&grant_type=password&password=REAL&scope=repository%3Alab%2Fapp%3Apull+repository%3Alab%2Fother%3Apush&service=depot&username=robot? true"
	if strings.Count(asked, "robot ?service=depot&scope=repository:lab/app:pull true") != 4 || !strings.Contains(asked, form) {
		t.Errorf("the realm was asked:\n%s", asked)
	}
	d.await("of both", has(func(l egress.Line) bool {
		return l.Request.Lease == "images" && l.Request.Path == "/v2/lab/app/manifests/*"
	}))
	d.await("of the realm", has(func(l egress.Line) bool { return l.Request.Lease == "images" && l.Request.Path == "/token" }))
	if text := fmt.Sprintf("%+v", d.lines); strings.Contains(text, bearer) || strings.Contains(text, realToken) {
		t.Error("the ledger has a credential")
	}
}

// TestRegistryRefuses: what is wider than the rule, another's, or elsewhere.
func TestRegistryRefuses(t *testing.T) {
	t.Parallel()
	d := newDepot(t)
	token, answer := d.ask(true, "service=depot&scope=repository:lab/app:pull")
	if token == "" {
		t.Fatal(answer)
	}
	mine := "Authorization: Bearer " + token
	for name, tt := range map[string]struct {
		method, path, want string
		fields             []string
	}{
		"a wider scope":                {"GET", "/token?service=depot&scope=repository:lab/app:pull,delete", "no token with the scope", nil},
		"another repository":           {"GET", "/token?service=depot&scope=repository:lab/other:pull", "no token with the scope", nil},
		"one good and one bad":         {"GET", "/token?service=depot&scope=repository:lab/app:pull&scope=repository:x:pull", "no token with the scope", nil},
		"two in one":                   {"GET", "/token?service=depot&scope=repository:lab/app:pull%20repository:x:pull", "no token with the scope", nil},
		"actions in the name":          {"GET", "/token?service=depot&scope=repository:lab/app:delete,x:push", "no token with the scope", nil},
		"everything":                   {"GET", "/token?service=depot&scope=*", "no token with the scope", nil},
		"another service":              {"GET", "/token?service=elsewhere", "another service", nil},
		"two services":                 {"GET", "/token?service=depot&service=elsewhere", "another service", nil},
		"a token that stays":           {"GET", "/token?service=depot&offline_token=true", "outlives", nil},
		"another's password":           {"GET", "/token?service=depot", foreign, []string{authBasic("me", "attacker")}},
		"another's token":              {"GET", "/v2/lab/app/manifests/1", foreign, []string{"Authorization: Bearer attacker"}},
		"the password at the registry": {"GET", "/v2/lab/app/manifests/1", trip, []string{"Authorization: Bearer " + placeToken}},
		"the token at the realm":       {"GET", "/token?service=depot", trip, []string{"Authorization: Bearer " + token}},
		"the token in a header":        {"GET", "/v2/lab/app/manifests/1", trip, []string{"X-Note: " + token}},
		"a path of another":            {"GET", "/v2/other/app/manifests/1", trip, []string{mine}}, // a rule beside it allows the request, without a credential
		"a path of one below":          {"GET", "/v2/lab/app/secret/manifests/1", trip, []string{mine}},
		"a blob of one below":          {"PUT", "/v2/lab/app/secret/blobs/uploads/1", trip, []string{mine}},
		"a deletion":                   {"DELETE", "/v2/lab/app/manifests/1", trip, []string{mine}},
		"a layer of another":           {"POST", "/v2/lab/app/blobs/uploads/?mount=sha256:0&from=lab/other", trip, []string{mine}},
	} {
		if _, _, body, _ := d.send(true, tt.method, tt.path, tt.fields...); !strings.Contains(body, tt.want) {
			t.Errorf("%s: got %q, want %q", name, body, tt.want)
		}
	}
	for name, form := range map[string]string{
		"another grant":      "grant_type=client_credentials&service=depot&username=a&password=" + placeToken,
		"a refresh token":    "grant_type=refresh_token&service=depot&refresh_token=" + token,
		"a wider scope":      "grant_type=password&service=depot&scope=repository:lab/app:delete&username=a&password=" + placeToken,
		"another's password": "grant_type=password&service=depot&username=a&password=attacker",
		"two passwords":      "grant_type=password&service=depot&username=a&password=attacker&password=" + placeToken,
		"ours and another":   "grant_type=password&service=depot&username=a&password=" + placeToken + "&password=attacker",
		"a token that stays": "grant_type=password&service=depot&access_type=offline&username=a&password=" + placeToken,
		"no form":            "grant_type=%zz",
		"a long one":         "grant_type=password&client_id=" + strings.Repeat("x", 20_000),
	} {
		resp, err := d.client(true).Post(d.url("/token"), "application/x-www-form-urlencoded", strings.NewReader(form))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if body, _ := io.ReadAll(resp.Body); resp.StatusCode != http.StatusForbidden {
			t.Errorf("form with %s: got %s %s", name, resp.Status, body)
		}
		resp.Body.Close()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.asked) != 1 {
		t.Errorf("the realm was asked: %q", d.asked)
	}
}

// TestRegistryAnswers: an answer in which no token is found does not reach the job.
func TestRegistryAnswers(t *testing.T) {
	t.Parallel()
	d := newDepot(t)
	for _, answer := range []string{
		"no JSON", `{}`, `{"token":"short"}`, `{"token":"with a blank in it"}`, `{"token":"` + bearer + `","access_token":"another-token"}`,
		`{"token":["` + bearer + `"]}`, `{"token":"` + bearer + `","access_token":7}`, `{"token":"` + strings.Repeat("x", 300<<10) + `"}`,
	} {
		d.mu.Lock()
		d.answer = answer
		d.mu.Unlock()
		if token, got := d.ask(true, "service=depot"); token != "" || len(got) > 500 {
			t.Errorf("%.40s: the job got %.80s", answer, got)
		}
	}
}

// TestBadRegistry: rules of which a half is missing, or that contradict.
func TestBadRegistry(t *testing.T) {
	t.Parallel()
	d := newDepot(t)
	for want, err := range map[string]error{
		"a rule for itself or for its realm, and both are needed": d.opens(false, true, nil),
		"for itself or for its realm, and both":                   d.opens(true, false, nil),
		"the realm is not at web.example": d.opens(true, true, func(r *egress.Rule) {
			r.Inject.Tokens = &egress.Tokens{Realm: "https://other.example/t", Service: "depot", Scopes: []string{"a:b:c"}}
		}),
		"scopes: what may be asked for": d.opens(true, true, func(r *egress.Rule) { r.Inject.Tokens = &egress.Tokens{Realm: d.url("/token"), Service: "depot"} }),
		"a request without a token":     d.opens(true, true, func(r *egress.Rule) { r.Inject.Pass = false }),
		"and nothing else, has a realm": d.opens(true, true, func(r *egress.Rule) { r.Inject.As = egress.Bearer }),
	} {
		if !errors.Is(err, egress.ErrBadRules) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v", want, err)
		}
	}
}

// FuzzScope: what is allowed is within what the rule says, whatever is asked.
func FuzzScope(f *testing.F) {
	tokens := egress.Tokens{Realm: "https://a.example/t", Service: "s", Scopes: []string{"repository:lab/app:pull"}}
	for _, s := range []string{"repository:lab/app:pull", "repository:lab/app:pull,", "repository:lab/app:pull,pull", "repository:lab/app/:pull", "repository:lab/app/x:pull", "repository:lab:pull", "repository:lab/app:*", ":::"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		rest, ok := strings.CutPrefix(s, "repository:lab/app:pull")
		if tokens.Allows(s) != (ok && strings.ReplaceAll(rest, ",pull", "") == "") {
			t.Errorf("%q: allowed is %v", s, tokens.Allows(s))
		}
	})
}
