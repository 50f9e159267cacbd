package gateway

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/mask"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// Registries of images: the realm gets the lease's password, and gives a token,
// which stays here. The job has a placeholder of the token, which it shows to the
// registry as it would the token, and which is replaced there.

const (
	// tokenAnswer bounds the answer of a realm; tokens that say groups are some KiB.
	tokenAnswer = 256 << 10
	// tokenForm bounds the form that asks for one.
	tokenForm = 16 << 10
	// heldTokens bounds the kinds of tokens of one registry. A job asks for one
	// kind for each repository.
	heldTokens = 256
)

// A wallet has the tokens of one registry, for as long as its rules are open.
type wallet struct {
	mu     sync.Mutex
	places map[string]string     // placeholders by what was asked for
	tokens map[string]*injection // the newest by their placeholders
}

// wallets gives the two sides of each registry the one that they share.
func wallets(grants []grant) error {
	type key struct{ lease, realm, service string }
	all := map[key]*wallet{}
	sides := map[key]map[egress.Place]bool{}
	for _, g := range grants {
		if g.inject == nil || g.inject.Tokens == nil {
			continue
		}
		k := key{g.inject.Lease, g.inject.Tokens.Realm, g.inject.Tokens.Service}
		if all[k] == nil {
			all[k], sides[k] = &wallet{places: map[string]string{}, tokens: map[string]*injection{}}, map[egress.Place]bool{}
		}
		g.inject.wallet = all[k]
		sides[k][g.inject.As] = true
		name, port, _, err := g.inject.Tokens.Endpoint()
		if g.inject.As == egress.OCIToken && (err != nil || name != g.Name || port != g.Port) {
			return fmt.Errorf("%w: %s: the realm is not at %s:%d", egress.ErrBadRules, cite(g.Rule), g.Name, g.Port)
		}
	}
	for k, both := range sides {
		if len(both) != 2 {
			return fmt.Errorf("%w: lease %s: the registry %s has a rule for itself or for its realm, and both are needed", egress.ErrBadRules, k.lease, printable(k.service))
		}
	}
	return nil
}

// find is the injection of the token whose placeholder a request has, or in.
func (w *wallet) find(r *http.Request, in *injection) *injection {
	_, given, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	w.mu.Lock()
	defer w.mu.Unlock()
	if t := w.tokens[given]; t != nil {
		return t
	}
	return in
}

// keep takes a token and returns what the job gets in its place: the same for all
// that were asked for alike, so that what a job may ask for bounds the wallet.
func (w *wallet) keep(of *injection, asked, token string) (made *injection, fresh bool, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	place := w.places[asked]
	if place == "" {
		if len(w.places) >= heldTokens {
			return nil, false, denied("the job has asked for %d kinds of tokens, and no more are kept", heldTokens)
		}
		place, fresh = "mayfly-"+rand.Text()+rand.Text(), true
		w.places[asked] = place
	}
	in := of.Injection
	in.As, in.Value, in.Placeholder, in.User, in.Pass = egress.OCIRegistry, creds.NewSecret(token), place, "", true
	if err := in.Check(); err != nil {
		return nil, false, denied("the realm gave a token that cannot be kept from the job: %v", err)
	}
	made = newInjection(&in)
	made.wallet, made.uses = w, of.uses
	made.hidden = mask.New([]creds.Secret{in.Value, of.Value})
	w.tokens[place] = made
	return made, fresh, nil
}

// overreach says why a request for a token asks for more than the rule allows.
func (u *injected) overreach(query string) string {
	values, err := url.ParseQuery(query)
	if err != nil {
		return "the query can be read in two ways"
	}
	return u.asks(values)
}

// asks says why what a request for a token says is not within the rule.
func (u *injected) asks(v url.Values) string {
	if s := v["service"]; len(s) > 1 || len(s) == 1 && s[0] != u.Tokens.Service {
		return "the rule has a password for another service of this realm"
	}
	if offline := append(v["offline_token"], v["access_type"]...); slices.ContainsFunc(offline, func(s string) bool { return s != "false" && s != "online" }) {
		return "a token that outlives the job is not asked for"
	}
	for _, s := range scopes(v) {
		if !u.Tokens.Allows(s) {
			return fmt.Sprintf("the rule asks for no token with the scope %q", printable(s))
		}
	}
	return ""
}

// scopes are those that are asked for, in whichever of the two ways.
func scopes(v url.Values) []string {
	var all []string
	for _, s := range v["scope"] {
		all = append(all, strings.Fields(s)...)
	}
	return all
}

// readForm reads what the OAuth 2 flavour sends in the body, and judges it.
func (u *injected) readForm(r *http.Request) error {
	if r.Method != http.MethodPost {
		return nil
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, tokenForm+1))
	if err != nil {
		return fmt.Errorf("body of the request: %w", err)
	}
	form, err := url.ParseQuery(string(body))
	if err != nil || len(body) > tokenForm {
		return denied("the form can be read in two ways, or has more than %d bytes", tokenForm)
	}
	for k, v := range form {
		if len(v) != 1 || !slices.Contains([]string{"grant_type", "service", "scope", "client_id", "access_type", "username", "password"}, k) {
			return denied("the form has %q, or has it twice", printable(shapeOf(k)))
		}
	}
	if form.Get("grant_type") != "password" {
		return denied("the form wants the grant %q; a password is exchanged, and nothing else", printable(shapeOf(form.Get("grant_type"))))
	}
	if why := u.asks(form); why != "" {
		return denied("%s", why)
	}
	switch given := form.Get("password"); {
	case given == u.Placeholder && u.state == absent:
		u.state = ours
	case given != "" && !u.Strip, u.state == ours: // in two places
		return denied("the rule has a credential of its own, and the request brings another")
	}
	u.form = form
	return nil
}

// fillForm writes the form that the realm gets.
func (u *injected) fillForm(out *http.Request) {
	form := url.Values{"access_type": {"online"}, "username": {u.User}}
	if u.puts() {
		form.Set("password", u.Value.Reveal())
	}
	for _, k := range []string{"grant_type", "service", "scope", "client_id"} {
		if v := u.form.Get(k); v != "" {
			form.Set(k, v)
		}
	}
	if u.User == "" {
		form.Set("username", egress.DefaultUser)
		if given := u.form.Get("username"); given != "" {
			form.Set("username", given)
		}
	}
	text := form.Encode()
	out.Body, out.ContentLength = io.NopCloser(strings.NewReader(text)), int64(len(text))
}

// exchange keeps the token in the answer of a realm, and puts its placeholder in
// the place. Whatever else the answer has the job does not get: a refresh token
// is a credential, too.
func (c *session) exchange(v *visit, r *http.Response) error {
	u := v.use
	body, err := io.ReadAll(io.LimitReader(r.Body, tokenAnswer+1))
	if err != nil {
		return fmt.Errorf("answer of the realm: %w", err)
	}
	var said struct {
		Token     string          `json:"token"`
		Access    string          `json:"access_token"`
		ExpiresIn json.RawMessage `json:"expires_in"`
		IssuedAt  json.RawMessage `json:"issued_at"`
		Scope     json.RawMessage `json:"scope"`
	}
	if err := json.Unmarshal(body, &said); err != nil || len(body) > tokenAnswer {
		return denied("the answer of the realm is no token")
	}
	token := said.Token
	if token == "" {
		token = said.Access
	}
	if said.Access != "" && said.Access != token {
		return denied("the answer of the realm has two tokens")
	}
	made, fresh, err := u.wallet.keep(u.injection, u.what(r.Request), token)
	if err != nil {
		return err
	}
	if fresh {
		c.box.trip(u.Lease, made.Placeholder)
	}
	answer := map[string]any{"token": made.Placeholder, "access_token": made.Placeholder}
	for k, v := range map[string]json.RawMessage{"expires_in": said.ExpiresIn, "issued_at": said.IssuedAt, "scope": said.Scope} {
		if text := string(v); v != nil && text == made.hidden.Mask(text) {
			answer[k] = v
		}
	}
	text, err := json.Marshal(answer)
	if err != nil {
		return fmt.Errorf("answer of the realm: %w", err)
	}
	r.Body = struct {
		io.Reader
		io.Closer
	}{bytes.NewReader(text), r.Body}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Del("Link")
	v.answer.scrub = newScrub(made, v.answer.ResponseWriter)
	return nil
}

// what is asked for in a request for a token.
func (u *injected) what(r *http.Request) string {
	v := u.form
	if v == nil {
		v = r.URL.Query()
	}
	all := scopes(v)
	slices.Sort(all)
	how := "anonymous"
	if u.puts() {
		how = "lease"
	}
	return how + " " + strings.Join(slices.Compact(all), " ")
}

// trip makes a tripwire of a placeholder that the gateway gave the job.
func (b *box) trip(lease, place string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.tripwires = append(b.tripwires, tripwire{lease, mask.New([]creds.Secret{creds.NewSecret(place)})})
}
