package githubapp_test

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	clientID     = "Iv1.mayfly"
	installation = 4711
)

// A fakeGitHub behaves as the REST API documents what an App needs for tokens of
// one installation, which has two repositories. Whatever else it is asked, and
// whatever is asked otherwise, is an error of the test.
type fakeGitHub struct {
	*httptest.Server
	t   testing.TB
	key *rsa.PrivateKey

	mu     sync.Mutex
	tokens map[string]*token
	change func(t *token, answer map[string]any) // of a new token and its answer; nil is none
	lag    int                                   // so many uses of revoked tokens are still accepted
	down   bool
	frozen chan struct{} // nil while it answers
}

type token struct {
	repositories []int64
	permissions  map[string]string
	end          time.Time
	revoked      bool
}

func newFake(t testing.TB) *fakeGitHub {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	f := &fakeGitHub{t: t, key: key, tokens: map[string]*token{}}
	f.Server = httptest.NewServer(f)
	t.Cleanup(f.Close)
	return f
}

// pem is the key as GitHub gives it.
func (f *fakeGitHub) pem() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(f.key)}))
}

func (f *fakeGitHub) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// live counts tokens that work.
func (f *fakeGitHub) live() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for _, t := range f.tokens {
		if !t.revoked {
			n++
		}
	}
	return n
}

func say(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body)
}

func refuse(w http.ResponseWriter, status int, message string) {
	say(w, status, map[string]string{"message": message, "documentation_url": "https://docs.github.com/rest", "status": fmt.Sprint(status)})
}

func (f *fakeGitHub) ServeHTTP(w http.ResponseWriter, r *http.Request) {
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
	if !strings.HasPrefix(r.Header.Get("Accept"), "application/vnd.github") || r.Header.Get("X-Github-Api-Version") == "" {
		f.t.Errorf("fake: %s without the API's headers: %v", r.URL, r.Header)
	}
	presented, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok {
		f.t.Errorf("fake: %s without a bearer", r.URL)
	}
	switch call := r.Method + " " + r.URL.Path; call {
	case fmt.Sprintf("POST /app/installations/%d/access_tokens", installation):
		if f.app(w, presented) {
			f.mint(w, body)
		}
	case fmt.Sprintf("GET /app/installations/%d", installation):
		if f.app(w, presented) {
			say(w, 200, map[string]any{"id": installation, "suspended_at": nil})
		}
	case "DELETE /installation/token":
		if t := f.authorized(w, presented); t != nil {
			t.revoked = true
			w.WriteHeader(http.StatusNoContent)
		}
	case "GET /installation/repositories":
		if t := f.authorized(w, presented); t != nil {
			say(w, 200, map[string]any{"total_count": len(t.repositories), "repository_selection": "selected", "repositories": repositories(t.repositories)})
		}
	default:
		f.t.Errorf("fake: %s", call)
	}
}

func repositories(ids []int64) []any {
	list := []any{}
	for _, id := range ids {
		list = append(list, map[string]any{"id": id, "full_name": fmt.Sprintf("o/r%d", id)})
	}
	return list
}

// app verifies the App's own token as GitHub says: RS256, ten minutes at most.
func (f *fakeGitHub) app(w http.ResponseWriter, jwt string) bool {
	parts := strings.Split(jwt, ".")
	var claims struct {
		Iss      string
		Iat, Exp int64
	}
	if len(parts) == 3 {
		signature, _ := base64.RawURLEncoding.DecodeString(parts[2])
		sum := sha256.Sum256([]byte(parts[0] + "." + parts[1]))
		b, _ := base64.RawURLEncoding.DecodeString(parts[1])
		now := time.Now().Unix()
		if rsa.VerifyPKCS1v15(&f.key.PublicKey, crypto.SHA256, sum[:], signature) == nil && json.Unmarshal(b, &claims) == nil &&
			claims.Iss == clientID && claims.Iat <= now && claims.Exp > now && claims.Exp <= now+600 {
			return true
		}
	}
	refuse(w, 401, "A JSON web token could not be decoded")
	return false
}

func (f *fakeGitHub) authorized(w http.ResponseWriter, presented string) *token {
	t, ok := f.tokens[presented]
	if ok && t.revoked && f.lag > 0 {
		f.lag--
		return t
	}
	if !ok || t.revoked || time.Now().After(t.end) {
		refuse(w, 401, "Bad credentials")
		return nil
	}
	return t
}

// mint is as GitHub's, with its trap: what is empty is everything.
func (f *fakeGitHub) mint(w http.ResponseWriter, body []byte) {
	var asked struct {
		Repositories []int64           `json:"repository_ids"`
		Permissions  map[string]string `json:"permissions"`
	}
	d := json.NewDecoder(strings.NewReader(string(body)))
	d.DisallowUnknownFields()
	if err := d.Decode(&asked); err != nil {
		f.t.Errorf("fake: body %s: %v", body, err)
	}
	all, has := []int64{1, 2}, map[string]string{"contents": "write", "issues": "read", "metadata": "read"}
	t := &token{repositories: all, permissions: maps.Clone(has), end: time.Now().Add(time.Hour)}
	for _, id := range asked.Repositories {
		if !slices.Contains(all, id) {
			refuse(w, 422, "There is at least one repository that does not exist or is not accessible to the parent installation.")
			return
		}
		t.repositories = asked.Repositories
	}
	for name, level := range asked.Permissions {
		if has[name] != level && has[name] != "write" {
			refuse(w, 422, "The permissions requested are not granted to this installation.")
			return
		}
		t.permissions = maps.Clone(asked.Permissions)
		t.permissions["metadata"] = "read"
	}
	answer := map[string]any{
		"token": "ghs_" + rand.Text() + rand.Text(), "expires_at": t.end.UTC().Format(time.RFC3339), "permissions": t.permissions,
		"repository_selection": "selected", "repositories": repositories(t.repositories),
	}
	if f.change != nil {
		f.change(t, answer)
	}
	f.tokens[answer["token"].(string)] = t
	say(w, 201, answer)
}
