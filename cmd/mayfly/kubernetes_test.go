package main

import (
	"context"
	"encoding/json"
	"net/http"
	"os"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/mayfly-ci/mayfly/test/kubetest"
)

// TestKubernetesScript is TestScript for the script that needs an API server:
// "cluster" sets $CLUSTER and writes its certificate and the agent's token.
func TestKubernetesScript(t *testing.T) {
	t.Parallel()
	testscript.Run(t, testscript.Params{
		Files:               []string{"testdata/kubernetes.txtar"},
		RequireExplicitExec: true,
		Setup:               setup,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"cluster": func(ts *testscript.TestScript, _ bool, _ []string) {
				s := kubetest.Start(t)
				ca, err := os.ReadFile(s.CAFile())
				ts.Check(err)
				ts.Check(os.WriteFile(ts.MkAbs("k8s.pem"), ca, 0o600))
				ts.Check(os.WriteFile(ts.MkAbs("k8s.token"), []byte(kubetest.AdminToken+"\n"), 0o600))
				ts.Check(s.Do(context.Background(), http.MethodPost, "/api/v1/namespaces/default/serviceaccounts", json.RawMessage(`{"metadata": {"name": "job"}}`), nil))
				ts.Setenv("CLUSTER", s.Address())
			},
		},
	})
}
