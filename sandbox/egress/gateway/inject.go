package gateway

import (
	"crypto/tls"
	"encoding/base64"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/mask"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/egress/sigv4"
)

// Credentials that the job does not hold. A request of a rule that has one is
// judged with the placeholder in it, and gets the credential when it is written
// anew for the destination; what the destination answers goes through a mask.

// An injection is a rule's, with what hides its credential.
type injection struct {
	egress.Injection
	hidden *mask.Set
	cert   *tls.Certificate // of Certificate
	wallet *wallet          // of OCIToken and OCIRegistry
	uses   *uses
	names  *mask.Set // hides it where all is lower case: in names of headers
}

func newInjection(in *egress.Injection) *injection {
	if in == nil {
		return nil
	}
	secrets := []creds.Secret{in.Value}
	if in.As == egress.Basic && in.User != "" {
		secrets = append(secrets, creds.NewSecret(in.User+":"+in.Value.Reveal()))
	}
	if s := in.Signing; s != nil {
		secrets = append(secrets, s.KeyID)
		if !s.Session.IsZero() {
			secrets = append(secrets, s.Session)
		}
	}
	lower := creds.NewSecret(strings.ToLower(in.Value.Reveal()))
	made := &injection{Injection: *in, hidden: mask.New(secrets), names: mask.New([]creds.Secret{lower})}
	if in.As == egress.Certificate {
		if pair, err := tls.X509KeyPair([]byte(in.Chain), []byte(in.Value.Reveal())); err == nil { // Check has looked
			made.cert = &pair
		}
	}
	return made
}

// What a request has where credentials stand.
type state int

const (
	absent  state = iota
	ours          // the placeholder, and nothing beside it
	foreign       // anything else
)

// use is what becomes of a request of the job's under a rule with a credential.
func (in *injection) use(r *http.Request) *injected {
	u := &injected{injection: in, state: ours}
	switch in.As {
	case egress.Certificate: // nothing of it is in a request
	case egress.SigV4:
		u.state = u.readSignature(r)
	case egress.OCIRegistry:
		u.injection = in.wallet.find(r, in)
		if u.state = u.injection.state(r); u.state == ours && u.injection == in {
			u.state = foreign // the password is for the realm
		}
	default:
		u.state = in.state(r)
	}
	return u
}

// state looks at a request of the job's.
func (in *injection) state(r *http.Request) state {
	auth, named, ok := r.Header["Authorization"], in.named(r), true
	if in.As == egress.Query {
		_, ok = queryKeys(r.URL.RawQuery)
	}
	switch {
	case !ok:
		return foreign
	case len(auth) == 0 && len(named) == 0:
		return absent
	case len(auth)+len(named) > 1:
		return foreign
	}
	given, ok := append(auth[:len(auth):len(auth)], named...)[0], false
	switch in.As {
	case egress.Bearer, egress.OCIRegistry:
		scheme, token, _ := strings.Cut(given, " ")
		ok = (strings.EqualFold(scheme, "bearer") || strings.EqualFold(scheme, "token")) && token == in.Placeholder
	case egress.Basic, egress.OCIToken:
		user, password, whole := basic(given)
		ok = whole && (password == in.Placeholder || user == in.Placeholder)
	case egress.Header, egress.Query:
		ok = len(named) == 1 && given == in.Placeholder
	}
	if !ok {
		return foreign
	}
	return ours
}

// named are the values of the header or the key of the injection. Some servers
// take "_" and "-" of headers for the same.
func (in *injection) named(r *http.Request) []string {
	switch in.As {
	case egress.Header:
		var all []string
		for name, values := range r.Header {
			if in.sameHeader(name) {
				all = append(all, values...)
			}
		}
		return all
	case egress.Query:
		return queryValues(r.URL.RawQuery, in.Name)
	}
	return nil
}

func (in *injection) sameHeader(name string) bool {
	return strings.EqualFold(strings.ReplaceAll(name, "_", "-"), strings.ReplaceAll(in.Name, "_", "-"))
}

// basic takes Authorization: Basic apart (RFC 7617).
func basic(authorization string) (user, password string, ok bool) {
	scheme, rest, _ := strings.Cut(authorization, " ")
	raw, err := base64.StdEncoding.DecodeString(rest)
	user, password, ok = strings.Cut(string(raw), ":")
	return user, password, ok && err == nil && strings.EqualFold(scheme, "basic")
}

// queryValues are the values of a key in a query.
func queryValues(query, key string) []string {
	var all []string
	for pair := range strings.SplitSeq(query, "&") {
		k, v, _ := strings.Cut(pair, "=")
		if name, err := url.QueryUnescape(k); err == nil && name == key {
			value, err := url.QueryUnescape(v)
			if err != nil {
				value = v
			}
			all = append(all, value)
		}
	}
	return all
}

// An injected is what happens to one request.
type injected struct {
	*injection
	state  state
	signed *sigv4.Signature // of SigV4, if it is ours
	form   url.Values       // of OCIToken, if the request has one
	why    error            // that of SigV4 there is none, or none that can be read
}

// puts says whether the destination gets the credential.
func (u *injected) puts() bool { return u.state == ours || !u.Pass }

// apply gives the request that the destination gets its credential. in is as the
// job sent it.
func (u *injected) apply(out, in *http.Request) {
	switch u.As {
	case egress.Certificate:
		return
	case egress.SigV4:
		u.resign(out)
		return
	}
	// Trailers could repeat a header, a range could cut the credential in an
	// answer, cookies are other credentials, and what is compressed is not seen.
	out.Trailer = nil
	for _, name := range []string{"Cookie", "Range", "If-Range"} {
		out.Header.Del(name)
	}
	out.Header.Set("Accept-Encoding", "identity")
	given := in.Header.Get("Authorization")
	u.clear(out)
	if u.form != nil {
		u.fillForm(out)
		return
	}
	if !u.puts() {
		return
	}
	value := u.Value.Reveal()
	switch u.As {
	case egress.Bearer, egress.OCIRegistry:
		scheme := "Bearer"
		if u.state == ours {
			scheme, _, _ = strings.Cut(given, " ")
		}
		out.Header.Set("Authorization", scheme+" "+value)
	case egress.Basic, egress.OCIToken:
		out.Header.Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(u.pair(given, value))))
	case egress.Header:
		out.Header.Set(u.Name, value)
	case egress.Query:
		pair := url.QueryEscape(u.Name) + "=" + url.QueryEscape(value)
		out.URL.RawQuery = strings.TrimPrefix(out.URL.RawQuery+"&"+pair, "&")
	}
}

// pair is user and password of Basic.
func (u *injected) pair(given, value string) string {
	user, password := egress.DefaultUser, value
	if u.state == ours {
		if user, password, _ = basic(given); user == u.Placeholder {
			user = value
		}
		if password == u.Placeholder {
			password = value
		}
	}
	if u.User != "" && user != value {
		user = u.User
	}
	return user + ":" + password
}

// clear removes what stands where credentials do.
func (u *injected) clear(out *http.Request) {
	if u.As == egress.SigV4 {
		sigv4.Clear(out)
		return
	}
	out.Header.Del("Authorization")
	for name := range out.Header {
		if u.As == egress.Header && u.sameHeader(name) {
			delete(out.Header, name)
		}
	}
	if u.As != egress.Query {
		return
	}
	pairs := strings.Split(out.URL.RawQuery, "&")
	pairs = slices.DeleteFunc(pairs, func(p string) bool { return len(queryValues(p, u.Name)) > 0 })
	out.URL.RawQuery = strings.Join(pairs, "&")
}

// judge says why a request that the rule allows cannot have its credential.
func (u *injected) judge(r *http.Request) string {
	switch {
	case u.As == egress.SigV4 && u.unsigned() != "":
		return u.unsigned()
	case u.As == egress.OCIToken && u.overreach(r.URL.RawQuery) != "":
		return u.overreach(r.URL.RawQuery)
	case u.state == foreign && !u.Strip:
		return "the rule has a credential of its own, and the request brings another"
	case u.As == egress.Certificate:
		return ""
	case upgrades(r) || r.Method == http.MethodTrace:
		return "a request that gets a credential is no TRACE, and becomes no WebSocket"
	}
	return ""
}

// A tripwire is a placeholder that was given to the job.
type tripwire struct {
	lease string
	set   *mask.Set // finds it in its encodings
}

// arm remembers the placeholders of rules for as long as the box lives. The
// caller holds b.mu.
func (b *box) arm(rules []grant) {
	for _, r := range rules {
		if r.inject == nil {
			continue
		}
		places := []creds.Secret{creds.NewSecret(r.inject.Placeholder)}
		if s := r.inject.Signing; s != nil {
			places = append(places, creds.NewSecret(s.PlaceID))
			if s.PlaceSession != "" {
				places = append(places, creds.NewSecret(s.PlaceSession))
			}
		}
		b.tripwires = append(b.tripwires, tripwire{r.inject.Lease, mask.New(places)})
	}
}

// tripped names the lease whose placeholder stands in a request where u, which
// may be nil, does not expect it.
func (b *box) tripped(r *http.Request, u *injected) (lease string) {
	b.mu.Lock()
	armed := slices.Clone(b.tripwires)
	b.mu.Unlock()
	if len(armed) == 0 {
		return ""
	}
	seen := r.Clone(r.Context())
	if u != nil && u.state == ours {
		u.clear(seen)
	}
	var text strings.Builder
	for _, part := range []string{seen.Method, seen.URL.Path, seen.URL.RawPath, seen.URL.RawQuery, seen.Host} {
		text.WriteString(part + "\n")
	}
	if query, err := url.QueryUnescape(seen.URL.RawQuery); err == nil {
		text.WriteString(query + "\n")
	}
	for name, values := range seen.Header {
		text.WriteString(name + ": " + strings.Join(values, "\n") + "\n")
	}
	for _, t := range armed {
		if t.set.Mask(text.String()) != text.String() {
			return t.lease
		}
	}
	return ""
}
