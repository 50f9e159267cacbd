package gateway_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/egress/sigv4"
)

const (
	realID, placeID           = "AKIATHEREALKEYOFLEAS", "AKIAPLACEHOLDER00000"
	realSession, placeSession = "the-real-session-token/of+the=lease", "the-place-session-token/of+the=leas"
)

// signing is a rule that signs for s3 and dynamodb in one region.
func signing() egress.Injection {
	return egress.Injection{
		Lease: "lease", As: egress.SigV4, Value: creds.NewSecret(realToken), Placeholder: placeToken,
		Signing: &egress.Signing{
			KeyID: creds.NewSecret(realID), PlaceID: placeID, Session: creds.NewSecret(realSession), PlaceSession: placeSession,
			Regions: []string{"eu-west-1"}, Services: []string{"s3", "dynamodb"},
		},
	}
}

// sign makes the signature of a program in the job.
func sign(t *testing.T, r *http.Request, body, region, service string, key sigv4.Key, at time.Time) {
	t.Helper()
	r.Header.Set("X-Amz-Date", at.UTC().Format("20060102T150405Z"))
	headers := "host"
	if service == "s3" {
		r.Header.Set("X-Amz-Content-Sha256", "UNSIGNED-PAYLOAD")
		headers += ";x-amz-content-sha256"
	}
	r.Header.Set("Authorization", fmt.Sprintf("AWS4-HMAC-SHA256 Credential=x/%s/%s/%s/aws4_request, SignedHeaders=%s;x-amz-date, Signature=%064d",
		at.UTC().Format("20060102"), region, service, headers, 0))
	s, err := sigv4.Parse(r)
	if err != nil {
		t.Fatal(err)
	}
	if s.Summed() {
		s.SetSum([]byte(body))
	}
	s.Resign(r, "", key, at)
}

// store is a destination that knows one key.
func store(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body) // what breaks off is not signed
	s, err := sigv4.Parse(r)
	if err == nil {
		if s.Summed() {
			s.SetSum(body)
		}
		err = s.Verify(r, realToken, time.Now())
	}
	w.Header().Set("X-Note", r.Header.Get("X-Amz-Security-Token"))
	if err != nil {
		w.WriteHeader(http.StatusForbidden)
		fmt.Fprintf(w, "store: %v %s", err, r.Header.Get("Cookie"))
		return
	}
	if r.URL.Path == "/error" {
		w.WriteHeader(http.StatusNotFound)
	}
	fmt.Fprintf(w, "key %s session %s range %s of %d", s.KeyID, s.Session, r.Header.Get("Range"), len(body))
}

type signedCase struct {
	name            string
	region, service string
	key             sigv4.Key
	age             time.Duration
	change          func(*http.Request)
	want            string
}

func signedCases() []signedCase {
	place := sigv4.Key{ID: placeID, Secret: placeToken, Session: placeSession}
	foreign, wrong, old := place, place, place
	foreign.ID, wrong.Secret, old.Session = "AKIAFOREIGN000000000", "not the placeholder", ""
	const good = "key " + realID + " session " + realSession + " range bytes=0-1 of 4"
	return []signedCase{
		{"signed anew", "eu-west-1", "s3", place, 0, nil, good},
		{"with the digest of the body", "eu-west-1", "dynamodb", place, 0, nil, good},
		{"with a cookie", "eu-west-1", "s3", place, 0, func(r *http.Request) { r.Header.Set("Cookie", "a=b") }, good},
		{"another key", "eu-west-1", "s3", foreign, 0, nil, "tripwire"},
		{"a whole key of another tenant", "eu-west-1", "s3", sigv4.Key{ID: "AKIAFOREIGN000000000", Secret: "x"}, 0, nil, "signed with another"},
		{"another secret", "eu-west-1", "s3", wrong, 0, nil, "not made with the key that the job has"},
		{"no session", "eu-west-1", "s3", old, 0, nil, "tripwire"},
		{"another region", "us-east-1", "s3", place, 0, nil, `does not sign for the region "us-east-1"`},
		{"another service", "eu-west-1", "iam", place, 0, nil, `does not sign for the service "iam"`},
		{"an old one", "eu-west-1", "s3", place, time.Hour, nil, "too old"},
		{"changed", "eu-west-1", "s3", place, 0, func(r *http.Request) { r.URL.RawQuery = "acl" }, "not of this request"},
		{"unsigned", "eu-west-1", "s3", place, 0, func(r *http.Request) { r.Header = http.Header{} }, "not signed"},
		{"a bearer token", "eu-west-1", "s3", place, 0, func(r *http.Request) { r.Header = http.Header{"Authorization": {"Bearer x"}} }, "not signed by AWS4"},
		{"the secret itself", "eu-west-1", "s3", place, 0, func(r *http.Request) { r.Header.Set("X-Note", placeToken) }, "tripwire"},
		{"the id elsewhere", "eu-west-1", "s3", place, 0, func(r *http.Request) { r.Header.Set("X-Note", placeID) }, "tripwire"},
		{"an error names nothing", "eu-west-1", "s3", place, 0, func(r *http.Request) { r.URL.Path = "/error" }, "key *** session *** range"},
	}
}

// TestSigned: what the store gets of what the job signs with its placeholders.
func TestSigned(t *testing.T) {
	t.Parallel()
	s := newSecured(t, true, http.HandlerFunc(store))
	if err := s.opens("lease", signing()); err != nil {
		t.Fatal(err)
	}
	for _, tt := range signedCases() {
		for _, h2 := range []bool{true, false} {
			r, err := http.NewRequest("PUT", s.url("/bucket/a%20b"), strings.NewReader("body"))
			if err != nil {
				t.Fatal(err)
			}
			if tt.name == "an error names nothing" {
				tt.change(r)
			}
			r.Header.Set("Range", "bytes=0-1")
			sign(t, r, "body", tt.region, tt.service, tt.key, time.Now().Add(-tt.age))
			if tt.change != nil {
				tt.change(r)
			}
			resp, err := s.client(h2).Do(r)
			if err != nil {
				t.Fatalf("%s: %v", tt.name, err)
			}
			b, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if got := string(b); err != nil || !strings.Contains(got, tt.want) {
				t.Errorf("%s: got %q, %v, want %q", tt.name, got, err, tt.want)
			}
			if strings.HasPrefix(tt.want, "key AKIA") && (resp.Header.Get("X-Note") != "***" || resp.ContentLength != int64(len(b))) {
				t.Errorf("%s: header %v, length %d of %d", tt.name, resp.Header, resp.ContentLength, len(b))
			}
		}
	}
	s.quiet()
}

// TestSignedWithout: what is not signed passes as it is where the rule says so,
// and is never signed by the gateway.
func TestSignedWithout(t *testing.T) {
	t.Parallel()
	s := newSecured(t, true, http.HandlerFunc(store))
	in := signing()
	in.Pass = true
	if err := s.opens("lease", in); err != nil {
		t.Fatal(err)
	}
	if _, _, body, _ := s.send(true, "GET", "/public", "Cookie: a=b"); body != "store: the request is not signed " {
		t.Errorf("got %q", body)
	}
}

// TestSignedWhole: a body whose digest is not sent is read first, up to a bound.
func TestSignedWhole(t *testing.T) {
	t.Parallel()
	s := newSecured(t, true, http.HandlerFunc(store))
	if err := s.opens("lease", signing()); err != nil {
		t.Fatal(err)
	}
	for size, want := range map[int]string{4 << 20: "of 4194304", 4<<20 + 1: "cannot be signed"} {
		body := strings.Repeat("x", size)
		r, err := http.NewRequest("POST", s.url("/"), strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		sign(t, r, body, "eu-west-1", "dynamodb", sigv4.Key{ID: placeID, Secret: placeToken, Session: placeSession}, time.Now())
		resp, err := s.client(true).Do(r)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || !strings.Contains(string(b), want) {
			t.Errorf("%d bytes: got %q, %v", size, b, err)
		}
	}
}

// TestBadSigning: a key that is not whole, or is for everything, is refused.
func TestBadSigning(t *testing.T) {
	t.Parallel()
	s := newSecured(t, true, http.NotFoundHandler())
	for name, change := range map[string]func(*egress.Injection){
		"no key":                    func(in *egress.Injection) { in.Signing = nil },
		"a key for a bearer":        func(in *egress.Injection) { in.As = egress.Bearer },
		"no regions":                func(in *egress.Injection) { in.Signing.Regions = nil },
		"no services":               func(in *egress.Injection) { in.Signing.Services = nil },
		"every service":             func(in *egress.Injection) { in.Signing.Services = []string{"*"} },
		"stripped":                  func(in *egress.Injection) { in.Strip = true },
		"no id":                     func(in *egress.Injection) { in.Signing.KeyID = creds.Secret{} },
		"the id in its place":       func(in *egress.Injection) { in.Signing.PlaceID = realID },
		"a session without a place": func(in *egress.Injection) { in.Signing.PlaceSession = "" },
		"a place without a session": func(in *egress.Injection) { in.Signing.Session = creds.Secret{} },
	} {
		in := signing()
		change(&in)
		err := s.gw.Open(context.Background(), "bad", egress.Opening{Parent: "job", Ledger: s.ledger, Rules: egress.Rules{Allow: []egress.Rule{{
			ID: "bad", Name: "web.example", Port: s.port, Protocol: egress.HTTPS, Resolve: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}, Inject: &in,
		}}}})
		if err == nil || strings.Contains(err.Error(), realID) || strings.Contains(err.Error(), realToken) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}
