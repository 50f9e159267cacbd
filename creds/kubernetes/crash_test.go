package kubernetes_test

import (
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/credstest"
	"github.com/mayfly-ci/mayfly/creds/kubernetes"
)

// A life is what the agent that is killed needs.
type life struct{ Address, CAFile, Token string }

func TestMain(m *testing.M) {
	flag.Parse()
	// They wait, and do not compute.
	if err := flag.Set("test.parallel", "32"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	credstest.Main(m, func(l life, trace func(string)) (creds.Issuer, creds.Grant, error) {
		i, err := kubernetes.New(kubernetes.Config{
			Address: l.Address, CAFile: l.CAFile, Namespace: namespace, Account: "job", Owner: owner, Trace: trace,
			Token: func() (creds.Secret, error) { return creds.NewSecret(l.Token), nil },
		})
		return i, grant(`{}`), err
	})
}

// testKilledAtEveryPoint: the next life knows the name and nothing else, or only
// what the cluster lists.
func testKilledAtEveryPoint(t *testing.T, w *world) {
	credstest.KilledAtEveryPoint(t, life{w.Address(), w.CAFile(), w.token}, 3, func(point, name string, _ []byte) {
		there := func() bool {
			infos, err := w.issuer.List(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			return slices.ContainsFunc(infos, func(i creds.Info) bool { return i.Name == name })
		}
		if got, want := there(), point != "kubernetes.revoke"; got != want {
			t.Errorf("killed at %s: listed %v, want %v", point, got, want)
		}
		if err := w.issuer.Revoke(t.Context(), name, nil); err != nil {
			t.Errorf("killed at %s: Revoke: %v", point, err)
		}
		p, err := w.issuer.Probe(t.Context(), name, nil)
		if err != nil || !strings.Contains(p.How, "was not tried") || there() {
			t.Errorf("killed at %s: Probe: got %+v and %v, want a proof that says what it rests on", point, p, err)
		}
	})
}
