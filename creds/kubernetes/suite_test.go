package kubernetes_test

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/credstest"
)

// TestOneServer runs, beside each other, all that can share a server: most of what
// they do is to wait until it forgets a token.
func TestOneServer(t *testing.T) {
	w := newWorld(t)
	for _, test := range []struct {
		name string
		run  func(*testing.T, *world)
	}{
		{"Scope", testScope},
		{"Audience", testAudience},
		{"Objects", testObjects},
		{"ShortGrant", testShortGrant},
		{"Account", testAccount},
		{"Strangers", testStrangers},
		{"Down", testDown},
		{"KilledAtEveryPoint", testKilledAtEveryPoint},
		{"WrongAuthority", testWrongAuthority},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			test.run(t, w)
		})
	}
	t.Run("Conformance", func(t *testing.T) {
		t.Parallel()
		credstest.Run(t, func(t *testing.T) credstest.Harness {
			t.Parallel()
			return w.suite(t)
		})
	})
}

// suite has a way to the server of its own, since clauses cut it.
func (w *world) suite(t *testing.T) credstest.Harness {
	l := newLine(t, w.Address())
	set := func(state int) func(context.Context) error {
		return func(context.Context) error { l.set(state); return nil }
	}
	var bad []json.RawMessage
	for _, s := range []string{
		`[]`, `{} {}`, `{"service_account": "a/b"}`, `{"service_account": "UPPER"}`, `{"service_account": "../x"}`, `{"audiences": [""]}`, `{"audiences": "a"}`,
	} {
		bad = append(bad, json.RawMessage(s))
	}
	return credstest.Harness{
		Issuer: w.newIssuer(w.config(l.address())), Owner: owner, Scope: json.RawMessage(`{"service_account": "job"}`), BadScopes: bad,
		Lasts: lasts, Lag: lag, Use: w.use,
		Down: set(down), Up: set(open), Freeze: set(frozen), Thaw: set(open),
	}
}

// dead probes until there is a proof.
func (w *world) dead(t *testing.T, name string, handle []byte) creds.Proof {
	t.Helper()
	var p creds.Proof
	wait(t, name+" is dead", func() bool {
		var err error
		if p, err = w.issuer.Probe(t.Context(), name, handle); err != nil && !errors.Is(err, creds.ErrStillValid) {
			t.Fatalf("Probe: %v", err)
		}
		return err == nil
	})
	return p
}

func testScope(t *testing.T, w *world) {
	l := w.issue(t, "scope", `{}`)
	for what, want := range map[string]int{"configmaps": 200, "secrets": 403, "pods": 403} {
		if got, err := w.get(t.Context(), l, what); got != want {
			t.Errorf("%s: got %d and %v, want %d", what, got, err, want)
		}
	}
	var config struct {
		Users    []struct{ User struct{ Token string } }
		Clusters []struct {
			Cluster struct {
				Server string
				CA     []byte `json:"certificate-authority-data"`
			}
		}
	}
	if err := json.Unmarshal([]byte(l.Values["kubeconfig"].Reveal()), &config); err != nil {
		t.Fatal(err)
	}
	if config.Users[0].User.Token != l.Values["token"].Reveal() || config.Clusters[0].Cluster.Server != w.Address() ||
		string(config.Clusters[0].Cluster.CA) != l.Facts["ca"] || l.Facts["ca"] == "" {
		t.Errorf("kubeconfig: got %+v", config)
	}
	if err := w.issuer.Revoke(t.Context(), "scope", l.Handle); err != nil {
		t.Fatal(err)
	}
	if p := w.dead(t, "scope", l.Handle); !strings.Contains(p.Refusal, "401") {
		t.Errorf("proof: got %+v, want the 401", p)
	}
	if got, err := w.get(t.Context(), l, "configmaps"); got != http.StatusUnauthorized {
		t.Errorf("use of a dead token: got %d and %v, want 401", got, err)
	}
}

// testAudience: a token for others is nothing to the API server, and is seen dead
// in the way that the others see it.
func testAudience(t *testing.T, w *world) {
	l := w.issue(t, "audience", `{"audiences": ["vault"]}`)
	if got, err := w.get(t.Context(), l, "configmaps"); got != http.StatusUnauthorized {
		t.Errorf("the API server: got %d and %v, want 401", got, err)
	}
	if p, err := w.issuer.Probe(t.Context(), "audience", l.Handle); !errors.Is(err, creds.ErrStillValid) {
		t.Errorf("Probe: got %+v and %v, want ErrStillValid", p, err)
	}
	if err := w.issuer.Revoke(t.Context(), "audience", l.Handle); err != nil {
		t.Fatal(err)
	}
	if p := w.dead(t, "audience", l.Handle); !strings.Contains(p.How, "TokenReview") || !strings.Contains(p.Refusal, "not authenticated") {
		t.Errorf("proof: got %+v", p)
	}
}

// testObjects: an auditor of the cluster sees whose it is.
func testObjects(t *testing.T, w *world) {
	l := w.issue(t, "objects", `{}`)
	var got struct {
		Immutable bool
		Data      map[string]string
		Metadata  struct{ Labels, Annotations map[string]string }
	}
	if err := w.Do(t.Context(), http.MethodGet, "/api/v1/namespaces/mayfly-jobs/secrets/mayfly-objects-lease", nil, &got); err != nil {
		t.Fatal(err)
	}
	if got.Metadata.Labels["mayfly-ci/installation"] != owner || got.Metadata.Annotations["mayfly-ci/job"] != "mf-1" ||
		got.Metadata.Annotations["mayfly-ci/repository"] != "o/r" || !got.Immutable || got.Data != nil {
		t.Errorf("the object of a lease: got %+v", got)
	}
	if err := w.issuer.Revoke(t.Context(), "objects", l.Handle); err != nil {
		t.Fatal(err)
	}
}

// testShortGrant: Kubernetes has a least life, and a lease may not outlive its grant.
func testShortGrant(t *testing.T, w *world) {
	g := grant(`{}`)
	g.Expires = time.Now().Add(10 * time.Minute)
	l, err := w.issuer.Issue(t.Context(), "short", g)
	if err == nil || !strings.Contains(err.Error(), "10m0s") || l.Values != nil {
		t.Errorf("Issue for ten minutes: got %v, want it refused, with the least that there is", err)
	}
	g.Expires = time.Now().Add(10*time.Minute + 5*time.Second)
	if l, err = w.issuer.Issue(t.Context(), "least", g); err != nil {
		t.Error(err)
	}
	if err := w.issuer.Revoke(t.Context(), "least", l.Handle); err != nil {
		t.Error(err)
	}
}

// testAccount: RBAC says whose tokens the agent may make.
func testAccount(t *testing.T, w *world) {
	for _, account := range []string{"mayfly", "none"} {
		l, err := w.issuer.Issue(t.Context(), "account-"+account, grant(`{"service_account": "`+account+`"}`))
		if err == nil || !strings.Contains(err.Error(), "serviceaccounts/token") || l.Values != nil {
			t.Errorf("token of %s: got %v, want it refused", account, err)
		}
		if err := w.issuer.Revoke(t.Context(), "account-"+account, l.Handle); err != nil {
			t.Error(err)
		}
		if infos, err := w.issuer.List(t.Context()); err != nil || slices.ContainsFunc(infos, func(i creds.Info) bool { return i.Name == "account-"+account }) {
			t.Errorf("List: got %+v and %v", infos, err)
		}
	}
}

// testStrangers: what others made is not listed and not deleted.
func testStrangers(t *testing.T, w *world) {
	c := w.config(w.Address())
	c.Owner = "inst-2"
	other := w.newIssuer(c)
	l, err := other.Issue(t.Context(), "stranger", grant(`{}`))
	if err != nil {
		t.Fatal(err)
	}
	w.make("/api/v1/namespaces/mayfly-jobs/secrets", `{"metadata": {"name": "theirs", "labels": {"mayfly-ci/installation": "inst-1"}, "annotations": {"mayfly-ci/lease": "x"}}}`)
	if infos, err := w.issuer.List(t.Context()); err != nil || slices.ContainsFunc(infos, func(i creds.Info) bool { return i.Name == "stranger" || i.Name == "x" }) {
		t.Errorf("List: got %+v and %v", infos, err)
	}
	if err := w.issuer.Revoke(t.Context(), "stranger", nil); err != nil {
		t.Errorf("Revoke: %v", err)
	}
	if infos, err := other.List(t.Context()); err != nil || len(infos) != 1 || infos[0].Owner != "inst-2" {
		t.Errorf("List of the other: got %+v and %v, want its lease", infos, err)
	}
	if err := other.Revoke(t.Context(), "stranger", l.Handle); err != nil {
		t.Error(err)
	}
}

// testDown: the server is away while the job ends.
func testDown(t *testing.T, w *world) {
	line := newLine(t, w.Address())
	i := w.newIssuer(w.config(line.address()))
	l, err := i.Issue(t.Context(), "down", grant(`{}`))
	if err != nil {
		t.Fatal(err)
	}
	line.set(down)
	if err := i.Revoke(t.Context(), "down", l.Handle); err == nil {
		t.Error("Revoke while the server is down: got nil")
	}
	line.set(open)
	if err := w.use(t.Context(), l); err != nil {
		t.Errorf("harness: token is dead: %v", err)
	}
	if err := w.issuer.Revoke(t.Context(), "down", l.Handle); err != nil { // another life
		t.Error(err)
	}
	w.dead(t, "down", l.Handle)
	if err := w.use(t.Context(), l); err == nil {
		t.Error("the token still works")
	}
}

// testWrongAuthority: a certificate that others signed is not the server's.
func testWrongAuthority(t *testing.T, w *world) {
	stranger := httptest.NewTLSServer(nil)
	defer stranger.Close()
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: stranger.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	c := w.config(w.Address())
	for _, c.CAFile = range []string{"", file} {
		_, err := w.newIssuer(c).Issue(t.Context(), "ca", grant(`{}`))
		if err == nil || !strings.Contains(err.Error(), "certificate") {
			t.Errorf("ca_file %q: got %v, want the certificate refused", c.CAFile, err)
		}
	}
}
