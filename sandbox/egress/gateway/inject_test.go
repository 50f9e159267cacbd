package gateway_test

import (
	"compress/gzip"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

const (
	realToken  = "ghp_TheRealTokenOfTheLease0123456789abcd"
	placeToken = "ghp_Placeholder00000000QwErTyUiOp1234567"
)

// give opens a scope that puts the token into requests.
func (s *secured) give(name string, in egress.Injection, requests ...egress.Request) {
	s.tb.Helper()
	in.Lease, in.Value, in.Placeholder = name, creds.NewSecret(realToken), placeToken
	if err := s.opens(name, in, requests...); err != nil {
		s.tb.Fatal(err)
	}
}

func (s *secured) opens(name string, in egress.Injection, requests ...egress.Request) error {
	return s.gw.Open(context.Background(), name, egress.Opening{
		Parent: "job", Ledger: s.ledger, Rules: egress.Rules{Allow: []egress.Rule{{
			ID: name, Name: "web.example", Port: s.port, Protocol: egress.HTTPS, CA: s.ca, Requests: requests,
			Resolve: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}, Inject: &in,
		}}},
	})
}

// send makes a request of fields "Name: value".
func (s *secured) send(h2 bool, method, path string, fields ...string) (int, http.Header, string, http.Header) {
	s.tb.Helper()
	r, err := http.NewRequest(method, s.url(path), nil)
	if err != nil {
		s.tb.Fatal(err)
	}
	for _, f := range fields {
		name, value, _ := strings.Cut(f, ": ")
		r.Header[name] = append(r.Header[name], value)
	}
	c := s.client(h2)
	c.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	resp, err := c.Do(r)
	if err != nil {
		return 0, nil, err.Error(), nil
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, resp.Header, err.Error(), nil
	}
	return resp.StatusCode, resp.Header, string(b), resp.Trailer
}

func authBasic(user, password string) string {
	return "Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
}

const foreign, trip, trace = "brings another", "tripwire", "no TRACE"

type injectionCase struct {
	name   string
	in     egress.Injection
	path   string
	fields []string
	want   string // of the body
}

// injections are requests, and what becomes of them.
func injections() []injectionCase {
	return []injectionCase{
		{"added", egress.Injection{As: egress.Bearer}, "/", nil, "Bearer REAL||||"},
		{"not added", egress.Injection{As: egress.Bearer, Pass: true}, "/", nil, "||||"},
		{"replaced", egress.Injection{As: egress.Bearer, Pass: true}, "/", []string{"Authorization: Bearer " + placeToken}, "Bearer REAL||||"},
		{"another scheme", egress.Injection{As: egress.Bearer}, "/", []string{"Authorization: token " + placeToken}, "token REAL||||"},
		{"foreign", egress.Injection{As: egress.Bearer}, "/", []string{"Authorization: Bearer attacker"}, foreign},
		{"foreign and ours", egress.Injection{As: egress.Bearer}, "/", []string{"Authorization: Bearer " + placeToken, "Authorization: Bearer attacker"}, trip},
		{"two of ours", egress.Injection{As: egress.Bearer}, "/", []string{"Authorization: Bearer " + placeToken, "Authorization: Bearer " + placeToken}, trip},
		{"stripped", egress.Injection{As: egress.Bearer, Strip: true}, "/", []string{"Authorization: Bearer attacker"}, "Bearer REAL||||"},
		{"stripped, not added", egress.Injection{As: egress.Bearer, Strip: true, Pass: true}, "/", []string{"Authorization: Bearer attacker"}, "||||"},
		{"in Basic where Bearer is", egress.Injection{As: egress.Bearer}, "/", []string{authBasic("u", placeToken)}, trip},
		{"basic added", egress.Injection{As: egress.Basic}, "/", nil, "Basic x-access-token:REAL||||"},
		{"basic added for a user", egress.Injection{As: egress.Basic, User: "bot"}, "/", nil, "Basic bot:REAL||||"},
		{"basic password", egress.Injection{As: egress.Basic}, "/", []string{authBasic("me", placeToken)}, "Basic me:REAL||||"},
		{"basic user", egress.Injection{As: egress.Basic}, "/", []string{authBasic(placeToken, "x-oauth-basic")}, "Basic REAL:x-oauth-basic||||"},
		{"basic, its own user", egress.Injection{As: egress.Basic, User: "bot"}, "/", []string{authBasic("me", placeToken)}, "Basic bot:REAL||||"},
		{"basic foreign", egress.Injection{As: egress.Basic}, "/", []string{authBasic("me", "attacker")}, foreign},
		{"header", egress.Injection{As: egress.Header, Name: "PRIVATE-TOKEN"}, "/", []string{"Private-Token: " + placeToken}, "|REAL|||"},
		{"header added", egress.Injection{As: egress.Header, Name: "PRIVATE-TOKEN"}, "/", nil, "|REAL|||"},
		{"header foreign", egress.Injection{As: egress.Header, Name: "PRIVATE-TOKEN"}, "/", []string{"Private-Token: attacker"}, foreign},
		{"header foreign with another dash", egress.Injection{As: egress.Header, Name: "PRIVATE-TOKEN"}, "/", []string{"private_token: attacker"}, foreign},
		{"authorization beside a header", egress.Injection{As: egress.Header, Name: "PRIVATE-TOKEN"}, "/", []string{"Authorization: Bearer attacker"}, foreign},
		{"query", egress.Injection{As: egress.Query, Name: "key"}, "/?a=1&key=" + placeToken, nil, "||a=1&key=REAL||"},
		{"query added", egress.Injection{As: egress.Query, Name: "key"}, "/?a=1", nil, "||a=1&key=REAL||"},
		{"query foreign", egress.Injection{As: egress.Query, Name: "key"}, "/?%6bey=attacker", nil, foreign},
		{"query stripped", egress.Injection{As: egress.Query, Name: "key", Strip: true}, "/?%6bey=attacker&b", nil, "||b&key=REAL||"},
		{"query twice", egress.Injection{As: egress.Query, Name: "key"}, "/?key=" + placeToken + "&key=attacker", nil, trip},
		{"query in two readings", egress.Injection{As: egress.Query, Name: "key"}, "/?a;key=attacker", nil, foreign},
		{"cookies and ranges", egress.Injection{As: egress.Bearer}, "/", []string{"Cookie: s=attacker", "Range: bytes=0-1"}, "Bearer REAL||||"},
		{"in another header", egress.Injection{As: egress.Bearer}, "/", []string{"X-Note: " + placeToken}, trip},
		{"encoded in another header", egress.Injection{As: egress.Bearer}, "/", []string{"X-Note: " + base64.StdEncoding.EncodeToString([]byte("it is "+placeToken))}, trip},
		{"in the path", egress.Injection{As: egress.Bearer}, "/x/" + placeToken, nil, trip},
		{"in the query", egress.Injection{As: egress.Bearer}, "/?x=" + placeToken, nil, trip},
		{"here and there", egress.Injection{As: egress.Bearer}, "/", []string{"Authorization: Bearer " + placeToken, "X-Note: " + placeToken}, trip},
		{"TRACE", egress.Injection{As: egress.Bearer}, "TRACE /", nil, trace},
	}
}

// TestInjection: what the destination gets, for what the job sends. The
// destination says it in a spelling that no mask knows.
func TestInjection(t *testing.T) {
	t.Parallel()
	rot := strings.NewReplacer(realToken, "REAL", url.QueryEscape(realToken), "REAL", placeToken, "PLACE")
	plain := func(auth string) string {
		scheme, rest, _ := strings.Cut(auth, " ")
		if raw, err := base64.StdEncoding.DecodeString(rest); err == nil && scheme == "Basic" {
			return scheme + " " + string(raw)
		}
		return auth
	}
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, rot.Replace(fmt.Sprintf("%s|%s|%s|%s|%s", plain(r.Header.Get("Authorization")), r.Header.Get("Private-Token"),
			r.URL.RawQuery, r.Header.Get("Cookie"), r.Header.Get("Range"))))
	})
	for _, tt := range injections() {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newSecured(t, true, handler)
			s.give("lease", tt.in)
			method, path, ok := strings.Cut(tt.path, " ")
			if !ok {
				method, path = "GET", tt.path
			}
			for _, h2 := range []bool{true, false} {
				_, _, body, _ := s.send(h2, method, path, tt.fields...)
				if tt.want != foreign && tt.want != trip && tt.want != trace && body != tt.want || !strings.Contains(body, tt.want) {
					t.Errorf("h2 %v: got %q, want %q", h2, body, tt.want)
				}
			}
			s.quiet()
			given := strings.Contains(tt.want, "REAL")
			lines := s.await("line of the request", has(func(l egress.Line) bool {
				if tt.want == trip {
					return l.Verdict == egress.Refused && l.Request.Lease == "lease"
				}
				return given && l.Verdict == egress.Ended && l.Request.Lease == "lease" || !given && l.Request.Lease == "" && l.Rule == "lease"
			}))
			if tt.want == trip && !refusedWith("tripwire: the placeholder of lease lease")(lines) {
				t.Errorf("the ledger says nothing of the tripwire: %+v", lines)
			}
		})
	}
}

// quiet wants no line with a credential or a placeholder in it.
func (s *secured) quiet() {
	s.tb.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if text := fmt.Sprintf("%+v", s.lines); strings.Contains(text, realToken) || strings.Contains(text, placeToken) {
		s.tb.Errorf("the ledger has a credential: %s", text)
	}
}

// TestScrubbed: whatever the destination says of the credential, in its header,
// body and trailer, the job does not see it. Without the rule it does.
func TestScrubbed(t *testing.T) {
	t.Parallel()
	s := newSecured(t, true, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
		w.Header().Set("Link", "<"+token+">; rel=preload")
		w.WriteHeader(http.StatusEarlyHints)
		w.Header().Set("Trailer", "X-End")
		w.Header().Set("Location", "https://elsewhere.example/?t="+url.QueryEscape(token))
		w.Header().Set("X-Encoded", base64.StdEncoding.EncodeToString([]byte("t="+token)))
		w.Header().Set("X-Encoding", r.Header.Get("Accept-Encoding"))
		w.Header()[http.CanonicalHeaderKey(token)] = []string{"1"}
		http.SetCookie(w, &http.Cookie{Name: "session", Value: "another-credential"})
		if r.URL.Path == "/gzip" {
			w.Header().Set("Content-Encoding", "gzip")
			z := gzip.NewWriter(w)
			_, _ = z.Write([]byte(token)) // the client may be gone
			_ = z.Close()
			return
		}
		w.WriteHeader(http.StatusFound)
		for part := range strings.SplitSeq("begin "+token+" "+base64.StdEncoding.EncodeToString([]byte(token))+" end", "") {
			_, _ = io.WriteString(w, part) // the client may be gone
			w.(http.Flusher).Flush()
		}
		w.Header().Set("X-End", token)
		w.Header().Set(http.TrailerPrefix+"X-Late", token)
	}))
	for _, h2 := range []bool{true, false} {
		_, header, body, trailer := s.send(h2, "GET", "/", "Authorization: Bearer "+realToken)
		if all := fmt.Sprint(header, body, trailer); strings.Count(strings.ToLower(all), strings.ToLower(realToken)) != 6 {
			t.Fatalf("without a credential: %s", all)
		}
	}
	s.give("lease", egress.Injection{As: egress.Bearer})
	for _, h2 := range []bool{true, false} {
		status, header, body, trailer := s.send(h2, "GET", "/")
		if status != http.StatusFound || body != "begin *** *** end" || trailer.Get("X-End") != "***" || trailer.Get("X-Late") != "***" {
			t.Errorf("got %d, %q, trailer %v", status, body, trailer)
		}
		if header.Get("Location") != "https://elsewhere.example/?t=***" || header.Get("X-Encoding") != "identity" || header.Get("Set-Cookie") != "" {
			t.Errorf("header: %v", header)
		}
		all := strings.ToLower(fmt.Sprint(header, body, trailer))
		if strings.Contains(all, strings.ToLower(realToken)) || strings.Contains(all, "vghlumvhbfrva2vu") {
			t.Errorf("the job sees the credential: %s", all)
		}
		if status, _, body, _ := s.send(h2, "GET", "/gzip", "Accept-Encoding: gzip"); status == http.StatusFound || status == http.StatusOK {
			t.Errorf("a compressed answer passed: %d %q", status, body)
		}
	}
	s.quiet()
}

// TestInjectionEnds: with its scope a credential goes, on connections that stay
// open too, and its placeholder remains a tripwire.
func TestInjectionEnds(t *testing.T) {
	t.Parallel()
	s := newSecured(t, true, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/held" {
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}
		fmt.Fprint(w, r.Header.Get("Authorization") == "Bearer "+realToken)
	}))
	c := s.client(true)
	get := func(path string, fields ...string) string {
		r, err := http.NewRequest("GET", s.url(path), nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range fields {
			r.Header.Set("Authorization", f)
		}
		resp, err := c.Do(r)
		if err != nil {
			return err.Error()
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		return string(b) + fmt.Sprint(err)
	}
	if got := get("/"); got != "false<nil>" {
		t.Fatalf("before: %s", got)
	}
	s.give("lease", egress.Injection{As: egress.Bearer})
	if got := get("/", "Bearer "+placeToken); got != "true<nil>" {
		t.Fatalf("on the same connection: %s", got)
	}
	broken := make(chan string, 1)
	go func() { broken <- get("/held") }()
	s.await("line of the held request", has(func(l egress.Line) bool { return l.Verdict == egress.Allowed && l.Request.Path == "/held" }))
	if err := s.gw.Close(context.Background(), "lease"); err != nil {
		t.Fatal(err)
	}
	if got := <-broken; strings.HasSuffix(got, "<nil>") {
		t.Errorf("a request outlives its credential: %s", got)
	}
	if got := get("/"); got != "false<nil>" {
		t.Errorf("after: %s", got)
	}
	if got := get("/", "Bearer "+placeToken); !strings.Contains(got, "tripwire") {
		t.Errorf("the placeholder after: %s", got)
	}
}

// TestInjectionNarrow: the credential is for what its rule names, and a weaker
// rule beside it does not let another's credential through.
func TestInjectionNarrow(t *testing.T) {
	t.Parallel()
	s := newSecured(t, false, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, strings.ReplaceAll(r.Header.Get("Authorization"), realToken, "REAL"))
	}))
	s.give("lease", egress.Injection{As: egress.Bearer}, egress.Request{Methods: []string{"GET"}, Path: "/api/**"})
	s.give("basic", egress.Injection{As: egress.Basic}, egress.Request{Methods: []string{"GET"}, Path: "/api/**"})
	for _, tt := range [][3]string{
		{"GET", "/api/x", "Bearer REAL"},
		{"GET", "/open", ""},
		{"POST", "/api/x", ""},
	} {
		if _, _, body, _ := s.send(false, tt[0], tt[1]); body != tt[2] && !strings.HasPrefix(body, "Basic") {
			t.Errorf("%v: got %q", tt, body)
		}
	}
	for _, tt := range [][2]string{
		{"/api/x", "brings another"}, {"/open", "Bearer attacker"},
	} {
		if _, _, body, _ := s.send(false, "GET", tt[0], "Authorization: Bearer attacker"); !strings.Contains(body, tt[1]) {
			t.Errorf("%v: got %q", tt, body)
		}
	}
	if _, _, body, _ := s.send(false, "GET", "/api/x", "Authorization: Bearer "+placeToken); body != "Bearer REAL" {
		t.Errorf("of two credentials the one whose place it is: got %q", body)
	}
	if _, _, body, _ := s.send(false, "GET", "/open", "Authorization: Bearer "+placeToken); !strings.Contains(body, "tripwire") {
		t.Errorf("the placeholder where the rule has no credential: got %q", body)
	}
}

// TestBadInjection: what could give a credential away is refused, and the error
// does not say it.
func TestBadInjection(t *testing.T) {
	t.Parallel()
	s := newSecured(t, true, http.NotFoundHandler())
	good := egress.Injection{Lease: "l", As: egress.Bearer, Value: creds.NewSecret(realToken), Placeholder: placeToken}
	if err := s.opens("good", good); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*egress.Injection){
		"no lease":               func(in *egress.Injection) { in.Lease = "" },
		"no place":               func(in *egress.Injection) { in.As = "cookie" },
		"no header":              func(in *egress.Injection) { in.As = egress.Header },
		"a header that frames":   func(in *egress.Injection) { in.As, in.Name = egress.Header, "host" },
		"a name too many":        func(in *egress.Injection) { in.Name = "X" },
		"a user too many":        func(in *egress.Injection) { in.User = "x" },
		"a user with a colon":    func(in *egress.Injection) { in.As, in.User = egress.Basic, "a:b" },
		"empty":                  func(in *egress.Injection) { in.Value = creds.Secret{} },
		"short":                  func(in *egress.Injection) { in.Value = creds.NewSecret("short77") },
		"two lines":              func(in *egress.Injection) { in.Value = creds.NewSecret(realToken + "\r\nX: y") },
		"a short placeholder":    func(in *egress.Injection) { in.Placeholder = "ghp_short" },
		"the value in its place": func(in *egress.Injection) { in.Placeholder = "x" + realToken },
	} {
		in := good
		change(&in)
		err := s.opens("bad", in)
		if !errors.Is(err, egress.ErrBadRules) || strings.Contains(err.Error(), realToken) || strings.Contains(err.Error(), "short77") {
			t.Errorf("%s: got %v", name, err)
		}
	}
	for name, change := range map[string]func(*egress.Rule){
		"a wildcard":   func(r *egress.Rule) { r.Name = "*.web.example" },
		"not seen":     func(r *egress.Rule) { r.Protocol = egress.TLS },
		"not verified": func(r *egress.Rule) { r.Protocol = egress.HTTP },
	} {
		r := egress.Rule{Name: "web.example", Port: 444, Protocol: egress.HTTPS, Inject: &good}
		change(&r)
		err := s.gw.Open(context.Background(), "bad", egress.Opening{Parent: "job", Ledger: s.ledger, Rules: egress.Rules{Allow: []egress.Rule{r}}})
		if !errors.Is(err, egress.ErrBadRules) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

// TestPlaceholderInBody: bodies are not searched, so what stands there leaves as
// it is: a placeholder stays one, and beside it the credential is where the rule
// says, and nowhere else.
func TestPlaceholderInBody(t *testing.T) {
	t.Parallel()
	got := make(chan string, 2)
	s := newSecured(t, true, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body) // what breaks off is not what was sent
		got <- r.Header.Get("Authorization") + " " + string(body)
	}))
	s.give("lease", egress.Injection{As: egress.Bearer}, egress.Request{Methods: []string{"POST"}, Path: "/with"})
	for path, want := range map[string]string{"/with": "Bearer " + realToken, "/without": ""} {
		for _, h2 := range []bool{true, false} {
			resp, err := s.client(h2).Post(s.url(path), "text/plain", strings.NewReader("token="+placeToken))
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if text := <-got; text != want+" token="+placeToken {
				t.Errorf("%s: arrived %q", path, text)
			}
		}
	}
}
