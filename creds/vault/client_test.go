package vault_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/vault"
)

const testHandle = `{"login": "hvs.login-token", "token": "hvs.job-token", "accessor": "acc"}`

func signNothing(context.Context, creds.Subject, string) (vault.Identity, error) {
	return vault.Identity{Token: creds.NewSecret("jwt")}, nil
}

// TestOnlyTheServersWordIsAProof: what a proxy, a sealed server or another
// address says is not about the credential.
func TestOnlyTheServersWordIsAProof(t *testing.T) {
	t.Parallel()
	elsewhere := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("a redirect was followed, with token %q", r.Header.Get("X-Vault-Token"))
	}))
	defer elsewhere.Close()
	for name, c := range map[string]struct {
		status int
		body   string
		proof  bool
	}{
		"refusal":           {403, `{"errors": ["permission denied", "invalid token TOKEN"]}`, true},
		"page of a proxy":   {403, "<html>go away</html>", false},
		"JSON of a proxy":   {403, `{"message": "no"}`, false},
		"sealed":            {503, `{"errors": ["Vault is sealed"]}`, false},
		"not found":         {404, `{"errors": []}`, false},
		"redirect":          {307, "", false},
		"accepted":          {200, `{"data": {}}`, false},
		"accepted, strange": {200, `hello`, false},
		"endless":           {403, `{"errors": ["` + strings.Repeat("x", 9<<20) + `"]}`, false},
	} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", elsewhere.URL)
			w.WriteHeader(c.status)
			_, _ = w.Write([]byte(strings.ReplaceAll(c.body, "TOKEN", r.Header.Get("X-Vault-Token"))))
		}))
		i, err := vault.New(vault.Config{Address: server.URL, Role: "job", Owner: "o", Sign: signNothing})
		if err != nil {
			t.Fatal(err)
		}
		p, err := i.Probe(t.Context(), "l", []byte(testHandle))
		if (err == nil) != c.proof {
			t.Errorf("%s: got %+v and %v, proof wanted: %v", name, p, err, c.proof)
		}
		if want := name == "accepted"; errors.Is(err, creds.ErrStillValid) != want {
			t.Errorf("%s: got %v, ErrStillValid wanted: %v", name, err, want)
		}
		if !c.proof && c.status != 200 {
			if err := i.Revoke(t.Context(), "l", []byte(testHandle)); err == nil {
				t.Errorf("%s: Revoke: got nil", name)
			}
		}
		for _, text := range []string{p.How + p.Refusal, errText(err)} {
			if strings.Contains(text, "hvs.") {
				t.Errorf("%s: a token is in %q", name, text)
			}
		}
		i.Close()
		server.Close()
	}
}

func errText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func TestValidate(t *testing.T) {
	t.Parallel()
	good := vault.Config{Address: "https://bao.internal:8200", Role: "job", AgentRole: "agent", Owner: "o", Sign: signNothing}
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	for want, change := range map[string]func(*vault.Config){
		`address ""`:            func(c *vault.Config) { c.Address = "" },
		"in the clear":          func(c *vault.Config) { c.Address = "http://bao.internal:8200" },
		`address "https://a/v1`: func(c *vault.Config) { c.Address = "https://a/v1" },
		"job_address":           func(c *vault.Config) { c.JobAddress = "bao" },
		"ca_file":               func(c *vault.Config) { c.Address, c.CAFile = "http://127.0.0.1:1", "ca.pem" },
		"mount":                 func(c *vault.Config) { c.Mount = "../sys" },
		`role "a/b"`:            func(c *vault.Config) { c.Role = "a/b" },
		"agent_role":            func(c *vault.Config) { c.AgentRole = "job" },
		"namespace":             func(c *vault.Config) { c.Namespace = "a\nb" },
		"owner":                 func(c *vault.Config) { c.Owner = "" },
		"oidc":                  func(c *vault.Config) { c.Sign = nil },
	} {
		c := good
		change(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v", want, err)
		}
	}
	for _, c := range []vault.Config{{Address: "http://bao:1", Insecure: true}, {Address: "http://127.0.0.1:1"}} {
		c.Role, c.Owner, c.Sign = "job", "o", signNothing
		if err := c.Validate(); err != nil {
			t.Errorf("%s: %v", c.Address, err)
		}
	}
}

// TestWordsWithoutSecrets: a server that repeats what it was sent puts neither an
// identity nor a token into our errors and proofs.
func TestWordsWithoutSecrets(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var body map[string]string
		if err := json.NewDecoder(r.Body).Decode(&body); err != nil && !errors.Is(err, io.EOF) {
			t.Error(err)
		}
		w.WriteHeader(http.StatusForbidden)
		said := strings.Join([]string{body["jwt"], body["token"], r.Header.Get("X-Vault-Token")}, " ")
		if err := json.NewEncoder(w).Encode(map[string][]string{"errors": {"no such thing: " + said}}); err != nil {
			t.Error(err)
		}
	}))
	defer server.Close()
	sign := func(context.Context, creds.Subject, string) (vault.Identity, error) {
		return vault.Identity{Token: creds.NewSecret("eyJ.identity")}, nil
	}
	i, err := vault.New(vault.Config{Address: server.URL, Role: "job", Owner: "o", Sign: sign})
	if err != nil {
		t.Fatal(err)
	}
	defer i.Close()
	_, issued := i.Issue(t.Context(), "l", creds.Grant{Expires: time.Now().Add(time.Hour), Scope: []byte(`{"policies": ["a"], "token": true}`)})
	p, probed := i.Probe(t.Context(), "l", []byte(`{"login": "hvs.login-token", "wrapping": "hvs.wrapping", "token": "hvs.job-token"}`))
	said := fmt.Sprint(issued, p, probed)
	if issued == nil || !strings.Contains(said, "no such thing") {
		t.Errorf("got %s, want the server's words", said)
	}
	for _, secret := range []string{"eyJ.identity", "hvs."} {
		if strings.Contains(said, secret) {
			t.Errorf("%s is in %s", secret, said)
		}
	}
}
