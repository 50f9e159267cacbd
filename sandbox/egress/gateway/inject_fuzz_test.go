package gateway

import (
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// FuzzInjection: whatever the job writes where credentials stand, the destination
// gets the rule's credential once, or none, and nothing of another.
func FuzzInjection(f *testing.F) {
	const value, place = "the-real-credential", "PLACEHOLDER-0123456789"
	f.Add("Bearer "+place, "", "", uint8(0))
	f.Add("Basic dTpQTEFDRUhPTERFUi0wMTIzNDU2Nzg5", "", "", uint8(1))
	f.Add("", place, "", uint8(2))
	f.Add("", "", "a&%6bey="+place+"&key", uint8(3))
	f.Add("Bearer attacker", "attacker", "key=attacker;", uint8(7))
	f.Fuzz(func(t *testing.T, auth, named, query string, how uint8) {
		kind := []egress.Place{egress.Bearer, egress.Basic, egress.Header, egress.Query}[how%4]
		in := &egress.Injection{Lease: "l", As: kind, Value: creds.NewSecret(value), Placeholder: place, Strip: how&4 != 0, Pass: how&8 != 0}
		switch kind {
		case egress.Header:
			in.Name = "X-Key"
		case egress.Query:
			in.Name = "key"
		}
		if strings.Contains(auth+named+query, value) {
			return
		}
		r := &http.Request{Method: http.MethodGet, Header: http.Header{}, URL: &url.URL{Path: "/", RawQuery: query}}
		if auth != "" {
			r.Header.Set("Authorization", auth)
		}
		if named != "" {
			r.Header["X_key"] = []string{named}
		}
		i := newInjection(in)
		u := i.use(r)
		if u.judge(r) != "" {
			if u.state != foreign {
				t.Fatal("a plain request was refused")
			}
			return
		}
		out := r.Clone(t.Context())
		u.apply(out, r)
		got := out.Header.Get("Authorization")
		if _, password, ok := basic(got); ok {
			got = password
		}
		switch kind {
		case egress.Header:
			got = strings.Join(append(i.named(out), got), "")
		case egress.Query:
			got = strings.Join(append(queryValues(out.URL.RawQuery, "key"), got), "")
		}
		switch {
		case !u.puts() && got != "":
			t.Fatalf("nothing was to be added: %q", got)
		case u.puts() && strings.Count(got, value) != 1 && u.state != ours:
			t.Fatalf("got %q", got)
		case u.puts() && kind != egress.Bearer && u.state != ours && got != value:
			t.Fatalf("beside the credential: %q", got)
		}
	})
}
