package kubernetes_test

import (
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/kubernetes"
)

func agentToken() (creds.Secret, error) { return creds.NewSecret("agent-token"), nil }

// TestOnlyTheServersWordIsAProof: what a proxy says is not about the token.
func TestOnlyTheServersWordIsAProof(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		status int
		body   string
		proof  bool
	}{
		"refusal":         {401, `{"kind": "Status", "code": 401, "reason": "Unauthorized", "message": "TOKEN"}`, true},
		"forbidden":       {403, `{"kind": "Status", "code": 403, "reason": "Forbidden"}`, false},
		"page of a proxy": {401, "<html>go away</html>", false},
		"JSON of a proxy": {401, `{"message": "no"}`, false},
		"other code":      {401, `{"kind": "Status", "code": 500}`, false},
		"unavailable":     {503, `{"kind": "Status", "code": 503}`, false},
		"redirect":        {307, "", false},
		"accepted":        {201, `{}`, false},
		"endless":         {401, `{"kind": "Status", "code": 401, "message": "` + strings.Repeat("x", 9<<20) + `"}`, false},
	} {
		server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", "https://127.0.0.1:1/")
			w.WriteHeader(c.status)
			_, _ = io.WriteString(w, strings.ReplaceAll(c.body, "TOKEN", r.Header.Get("Authorization")))
		}))
		file := filepath.Join(t.TempDir(), "ca.pem")
		if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}), 0o600); err != nil {
			t.Fatal(err)
		}
		i, err := kubernetes.New(kubernetes.Config{Address: server.URL, CAFile: file, Namespace: "n", Owner: "o", Token: agentToken})
		if err != nil {
			t.Fatal(err)
		}
		p, err := i.Probe(t.Context(), "l", []byte(`{"token": "job-token"}`))
		if (err == nil) != c.proof || errors.Is(err, creds.ErrStillValid) != (name == "accepted") {
			t.Errorf("%s: got %+v and %v, proof wanted: %v", name, p, err, c.proof)
		}
		if strings.Contains(fmt.Sprint(p, err), "job-token") {
			t.Errorf("%s: the token is in %+v, %v", name, p, err)
		}
		i.Close()
		server.Close()
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	good := kubernetes.Config{Address: "https://k8s.internal:6443", Namespace: "mayfly-jobs", Account: "job", Owner: "o", Token: agentToken}
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	for want, change := range map[string]func(*kubernetes.Config){
		`address ""`:      func(c *kubernetes.Config) { c.Address = "" },
		`address "http:`:  func(c *kubernetes.Config) { c.Address = "http://127.0.0.1:6443" },
		"job_address":     func(c *kubernetes.Config) { c.JobAddress = "https://a/b" },
		"namespace":       func(c *kubernetes.Config) { c.Namespace = "../kube-system" },
		"service_account": func(c *kubernetes.Config) { c.Account = "a/token" },
		"owner":           func(c *kubernetes.Config) { c.Owner = "a,b" },
		"token_file":      func(c *kubernetes.Config) { c.Token = nil },
	} {
		c := good
		change(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v", want, err)
		}
	}
}
