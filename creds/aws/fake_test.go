package aws_test

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	sdk "github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/mayfly-ci/mayfly/test/miniotest"
)

const (
	fakeRole      = "arn:aws:iam::123456789012:role/ci/deploy"
	fakeRegion    = "eu-central-1"
	revokerKey    = "AKIAREVOKER"
	revokerSecret = "revoker-secret"
)

// A fakeAWS behaves as AWS documents its STS, the inline policies of one role and
// two calls of S3. Whatever else it is asked, and whatever is asked otherwise, is
// an error of the test.
type fakeAWS struct {
	*httptest.Server
	t testing.TB

	mu       sync.Mutex
	sessions map[string]*session // by access key
	policies map[string]string   // inline ones of the role, by name
	limit    time.Duration       // MaxSessionDuration of the role
	lag      int                 // so many uses after a policy came are still judged without it
	denies   string              // what the role's own policies deny by name
	down     bool
	frozen   chan struct{} // nil while it answers
}

type session struct {
	key    sdk.Credentials
	name   string
	policy document
	end    time.Time
}

type document struct {
	Version   string
	Statement statements
}

type statement struct {
	Effect    string
	Action    words
	Resource  words
	Condition map[string]map[string]string
}

// statements and words are one or several.
type (
	statements []statement
	words      []string
)

func (s *statements) UnmarshalJSON(b []byte) error { return oneOrMany((*[]statement)(s), b) }
func (w *words) UnmarshalJSON(b []byte) error      { return oneOrMany((*[]string)(w), b) }

func oneOrMany[T any](into *[]T, b []byte) error {
	var one T
	if json.Unmarshal(b, &one) == nil {
		*into = []T{one}
		return nil
	}
	return json.Unmarshal(b, into)
}

func newFakeAWS(t testing.TB) *fakeAWS {
	f := &fakeAWS{t: t, sessions: map[string]*session{}, policies: map[string]string{}, limit: time.Hour}
	f.Server = httptest.NewServer(f)
	t.Cleanup(f.Close)
	return f
}

func (f *fakeAWS) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *fakeAWS) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	f.mu.Lock()
	down, frozen := f.down, f.frozen
	f.mu.Unlock()
	if frozen != nil {
		select {
		case <-frozen:
		case <-r.Context().Done():
			return
		}
	}
	if down {
		panic(http.ErrAbortHandler)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.Method == http.MethodGet {
		f.s3(w, r)
		return
	}
	form, err := url.ParseQuery(string(body))
	switch {
	case err != nil || r.Method != http.MethodPost || r.URL.String() != "/" || r.Header.Get("Content-Type") != "application/x-www-form-urlencoded":
		f.t.Errorf("fake: %s %s with %s", r.Method, r.URL, body)
	case form.Get("Version") == "2011-06-15":
		f.sts(w, r, form)
	case form.Get("Version") == "2010-05-08":
		f.iam(w, r, string(body), form)
	default:
		f.t.Errorf("fake: no such API: %s", body)
	}
}

func refuse(w http.ResponseWriter, status int, code, message string) {
	w.WriteHeader(status)
	_, _ = fmt.Fprintf(w, `<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type><Code>%s</Code><Message>%s</Message></Error><RequestId>1</RequestId></ErrorResponse>`, code, message)
}

// sts is AssumeRoleWithWebIdentity of the API reference 2011-06-15.
func (f *fakeAWS) sts(w http.ResponseWriter, r *http.Request, form url.Values) {
	keys := []string{"Action", "DurationSeconds", "Policy", "RoleArn", "RoleSessionName", "Version", "WebIdentityToken"}
	for key := range form {
		if !slices.Contains(keys, key) {
			f.t.Errorf("fake STS: parameter %s", key)
		}
	}
	if form.Get("Action") != "AssumeRoleWithWebIdentity" || r.Header.Get("Authorization") != "" {
		f.t.Errorf("fake STS: %v, authorization %q; want AssumeRoleWithWebIdentity, unsigned", form, r.Header.Get("Authorization"))
	}
	duration := form.Get("DurationSeconds")
	if duration == "" {
		duration = "3600"
	}
	seconds, err := strconv.Atoi(duration)
	var doc document
	bad := json.Unmarshal([]byte(form.Get("Policy")), &doc)
	var claims struct {
		Aud string
		Exp int64
	}
	parts := strings.Split(form.Get("WebIdentityToken"), ".")
	if len(parts) == 3 {
		b, _ := base64.RawURLEncoding.DecodeString(parts[1])
		_ = json.Unmarshal(b, &claims)
	}
	switch {
	case err != nil || seconds < 900 || time.Duration(seconds)*time.Second > f.limit:
		refuse(w, 400, "ValidationError", "The requested DurationSeconds exceeds the MaxSessionDuration set for this role.")
	case len(parts) != 3:
		refuse(w, 400, "InvalidIdentityToken", "The ID Token provided is not a valid JWT.")
	case bad != nil || doc.Version != "2012-10-17" || len(form.Get("Policy")) > 2048:
		refuse(w, 400, "MalformedPolicyDocument", "Syntax errors in policy.")
	case claims.Aud != miniotest.Audience:
		refuse(w, 400, "InvalidIdentityToken", "Incorrect token audience")
	case claims.Exp < time.Now().Unix():
		refuse(w, 400, "ExpiredTokenException", "Token expired")
	case form.Get("RoleArn") != fakeRole:
		refuse(w, 403, "AccessDenied", "Not authorized to perform sts:AssumeRoleWithWebIdentity")
	default:
		s := &session{
			key:  sdk.Credentials{AccessKeyID: "ASIA" + rand.Text()[:16], SecretAccessKey: rand.Text(), SessionToken: rand.Text() + rand.Text()},
			name: form.Get("RoleSessionName"), policy: doc, end: time.Now().Add(time.Duration(seconds) * time.Second),
		}
		f.sessions[s.key.AccessKeyID] = s
		_, _ = fmt.Fprintf(w, `<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleWithWebIdentityResult>
<AssumedRoleUser><Arn>arn:aws:sts::123456789012:assumed-role/deploy/%s</Arn><AssumedRoleId>AROAFAKE:%s</AssumedRoleId></AssumedRoleUser>
<Credentials><AccessKeyId>%s</AccessKeyId><SecretAccessKey>%s</SecretAccessKey><SessionToken>%s</SessionToken><Expiration>%s</Expiration></Credentials>
</AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>`, s.name, s.name, s.key.AccessKeyID, s.key.SecretAccessKey, s.key.SessionToken, s.end.UTC().Format(time.RFC3339))
	}
}

// signed says whether a request is signed with a key, for a service of a region.
func signed(r *http.Request, c sdk.Credentials, service, region string) bool {
	at, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date"))
	if err != nil || time.Since(at).Abs() > 5*time.Minute {
		return false
	}
	again := r.Clone(r.Context())
	again.Header.Del("Authorization")
	for name := range again.Header { // what transports add
		if name == "Accept-Encoding" || name == "User-Agent" {
			again.Header.Del(name)
		}
	}
	again.URL.Host, again.URL.Scheme = r.Host, "http"
	err = v4.NewSigner().SignHTTP(r.Context(), c, again, r.Header.Get("X-Amz-Content-Sha256"), service, region, at)
	return err == nil && r.Header.Get("Authorization") == again.Header.Get("Authorization")
}

// iam is PutRolePolicy, ListRolePolicies and DeleteRolePolicy of the API reference
// 2010-05-08.
func (f *fakeAWS) iam(w http.ResponseWriter, r *http.Request, _ string, form url.Values) {
	if !signed(r, sdk.Credentials{AccessKeyID: revokerKey, SecretAccessKey: revokerSecret}, "iam", "us-east-1") {
		refuse(w, 403, "SignatureDoesNotMatch", "The request signature we calculated does not match")
		return
	}
	if form.Get("RoleName") != "deploy" {
		refuse(w, 404, "NoSuchEntity", "The role cannot be found")
		return
	}
	name := form.Get("PolicyName")
	switch form.Get("Action") {
	case "PutRolePolicy":
		var doc document
		if err := json.Unmarshal([]byte(form.Get("PolicyDocument")), &doc); err != nil || doc.Version != "2012-10-17" || len(name) > 128 {
			refuse(w, 400, "MalformedPolicyDocument", "Syntax errors in policy.")
			return
		}
		f.policies[name] = form.Get("PolicyDocument")
		_, _ = io.WriteString(w, `<PutRolePolicyResponse/>`)
	case "ListRolePolicies":
		_, _ = io.WriteString(w, `<ListRolePoliciesResponse><ListRolePoliciesResult><PolicyNames>`)
		for name := range f.policies {
			_, _ = io.WriteString(w, "<member>"+name+"</member>")
		}
		_, _ = io.WriteString(w, `</PolicyNames><IsTruncated>false</IsTruncated></ListRolePoliciesResult></ListRolePoliciesResponse>`)
	case "DeleteRolePolicy":
		delete(f.policies, name)
		_, _ = io.WriteString(w, `<DeleteRolePolicyResponse/>`)
	default:
		f.t.Errorf("fake IAM: %v", form)
	}
}

// s3 is ListBuckets and GetObject.
func (f *fakeAWS) s3(w http.ResponseWriter, r *http.Request) {
	id, _, _ := strings.Cut(strings.TrimPrefix(r.Header.Get("Authorization"), "AWS4-HMAC-SHA256 Credential="), "/")
	s, ok := f.sessions[id]
	switch {
	case !ok:
		f.s3Error(w, 403, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records.")
	case !signed(r, s.key, "s3", fakeRegion) || r.Header.Get("X-Amz-Security-Token") != s.key.SessionToken:
		f.s3Error(w, 403, "SignatureDoesNotMatch", "The request signature we calculated does not match")
	case !time.Now().Before(s.end):
		f.s3Error(w, 400, "ExpiredToken", "The provided token has expired.")
	default:
		action, resource := "s3:GetObject", "arn:aws:s3:::"+strings.TrimPrefix(r.URL.Path, "/")
		if r.URL.Path == "/" {
			action, resource = "s3:ListAllMyBuckets", "*"
		}
		if why := f.judge(s, action, resource); why != "" {
			f.s3Error(w, 403, "AccessDenied", "User: arn:aws:sts::123456789012:assumed-role/deploy/"+s.name+" is not authorized to perform: "+action+" "+why)
			return
		}
		_, _ = io.WriteString(w, "<ListAllMyBucketsResult/>")
	}
}

func (f *fakeAWS) s3Error(w http.ResponseWriter, status int, code, message string) {
	w.WriteHeader(status)
	b, err := xml.Marshal(struct {
		XMLName       xml.Name `xml:"Error"`
		Code, Message string
	}{Code: code, Message: message})
	if err != nil {
		f.t.Error(err)
	}
	_, _ = w.Write(b)
}

// judge is as AWS decides: a denial counts more than all else, and both the role
// and the session must allow. The role allows everything.
func (f *fakeAWS) judge(s *session, action, resource string) string {
	if f.denies == action {
		return "with an explicit deny in an identity-based policy"
	}
	for _, text := range f.policies {
		var doc document
		if json.Unmarshal([]byte(text), &doc) != nil {
			continue
		}
		for _, st := range doc.Statement {
			if st.Condition["StringLike"]["aws:userid"] == "*:"+s.name && st.Effect == "Deny" && st.Action[0] == "*" && st.Resource[0] == "*" {
				if f.lag--; f.lag < 0 {
					return "with an explicit deny in an identity-based policy"
				}
			}
		}
	}
	allowed := false
	for _, st := range s.policy.Statement {
		if !matches(st.Action, action) || !matches(st.Resource, resource) {
			continue
		}
		if from := st.Condition["DateGreaterThanEquals"]["aws:CurrentTime"]; from != "" {
			at, err := time.Parse(time.RFC3339, from)
			if err != nil {
				f.t.Errorf("fake: date %q", from)
			}
			if time.Now().Before(at) {
				continue
			}
		}
		if st.Effect == "Deny" {
			return "with an explicit deny in a session policy"
		}
		allowed = true
	}
	if !allowed {
		return "because no session policy allows the " + action + " action"
	}
	return ""
}

func matches(patterns []string, text string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		before, star := strings.CutSuffix(p, "*")
		return p == text || star && strings.HasPrefix(text, before)
	})
}
