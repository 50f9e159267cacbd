package kubernetes_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/kubernetes"
	"github.com/mayfly-ci/mayfly/test/kubetest"
)

const (
	owner     = "inst-1"
	namespace = "mayfly-jobs"
	lag       = 30 * time.Second // the server's cache has ten
	lasts     = 20 * time.Minute
)

// A world is a cluster with an account for the agent, and one for jobs that may
// read the ConfigMaps of its namespace.
type world struct {
	*kubetest.Server
	t      testing.TB
	token  string // the agent's
	issuer *kubernetes.Issuer
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{Server: kubetest.Start(t), t: t}
	const rbac, core = "/apis/rbac.authorization.k8s.io/v1/", "/api/v1/namespaces"
	w.make(core, `{"metadata": {"name": "mayfly-jobs"}}`)
	for _, name := range []string{"mayfly", "job"} {
		w.make(core+"/mayfly-jobs/serviceaccounts", `{"metadata": {"name": %q}}`, name)
		w.make(rbac+"namespaces/mayfly-jobs/rolebindings", `{"metadata": {"name": %[1]q}, "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": %[1]q},
			"subjects": [{"kind": "ServiceAccount", "name": %[1]q, "namespace": "mayfly-jobs"}]}`, name)
	}
	// What configs/agent-kubernetes.yaml says that the agent needs.
	w.make(rbac+"namespaces/mayfly-jobs/roles", `{"metadata": {"name": "mayfly"}, "rules": [
		{"apiGroups": [""], "resources": ["secrets"], "verbs": ["create", "list", "deletecollection"]},
		{"apiGroups": [""], "resources": ["serviceaccounts/token"], "resourceNames": ["job"], "verbs": ["create"]}]}`)
	w.make(rbac+"clusterrolebindings", `{"metadata": {"name": "mayfly"}, "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:auth-delegator"},
		"subjects": [{"kind": "ServiceAccount", "name": "mayfly", "namespace": "mayfly-jobs"}]}`)
	w.make(rbac+"namespaces/mayfly-jobs/roles", `{"metadata": {"name": "job"}, "rules": [{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["list"]}]}`)
	var a struct{ Status struct{ Token string } }
	if err := w.Do(t.Context(), http.MethodPost, core+"/mayfly-jobs/serviceaccounts/mayfly/token", json.RawMessage(`{"spec": {"expirationSeconds": 7200}}`), &a); err != nil {
		t.Fatal(err)
	}
	w.token = a.Status.Token
	w.issuer = w.newIssuer(w.config(w.Address()))
	wait(t, "the agent's rights are known", func() bool { _, err := w.issuer.List(t.Context()); return err == nil })
	return w
}

func (w *world) make(path, form string, args ...any) {
	w.t.Helper()
	wait(w.t, "made "+path, func() bool {
		err := w.Do(w.t.Context(), http.MethodPost, path, json.RawMessage(fmt.Sprintf(form, args...)), nil)
		if err != nil && !strings.Contains(err.Error(), "not found") && !strings.Contains(err.Error(), "forbidden") {
			w.t.Fatal(err)
		}
		return err == nil
	})
}

func (w *world) config(address string) kubernetes.Config {
	return kubernetes.Config{
		Address: address, CAFile: w.CAFile(), Namespace: namespace, Account: "job", Owner: owner,
		Token: func() (creds.Secret, error) { return creds.NewSecret(w.token), nil },
	}
}

func (w *world) newIssuer(c kubernetes.Config) *kubernetes.Issuer {
	w.t.Helper()
	i, err := kubernetes.New(c)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(i.Close)
	return i
}

func grant(scope string) creds.Grant {
	return creds.Grant{
		Subject: creds.Subject{Provider: "local", Repository: "o/r", Ref: "refs/heads/main", Job: "mf-1"},
		Scope:   json.RawMessage(scope), Expires: time.Now().Add(lasts),
	}
}

func (w *world) issue(t testing.TB, name, scope string) creds.Lease {
	t.Helper()
	l, err := w.issuer.Issue(t.Context(), name, grant(scope))
	if err != nil {
		t.Fatalf("Issue: %v", err)
	}
	return l
}

// get is a request of a job.
func (w *world) get(ctx context.Context, l creds.Lease, what string) (int, error) {
	status, _, err := w.As(ctx, l.Values["token"].Reveal(), http.MethodGet, "/api/v1/namespaces/mayfly-jobs/"+what, nil)
	return status, err
}

// use is what a job may do.
func (w *world) use(ctx context.Context, l creds.Lease) error {
	status, err := w.get(ctx, l, "configmaps")
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("status %d", status)
	}
	return err
}

// wait waits until ok.
func wait(t testing.TB, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	bound := time.After(time.Minute)
	for !ok() {
		select {
		case <-tick.C:
		case <-bound:
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// A line is a way to the server that can be cut, so that the server need not be
// stopped, which takes it seconds.
type line struct {
	listener net.Listener
	server   string

	mu    sync.Mutex
	state int // open, down or frozen
	conns map[net.Conn]bool
}

const (
	open = iota
	down
	frozen
)

func newLine(t testing.TB, server string) *line {
	t.Helper()
	l := &line{server: strings.TrimPrefix(server, "https://"), conns: map[net.Conn]bool{}}
	var err error
	if l.listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.listener.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { l.serve(c) })
		}
	})
	t.Cleanup(func() {
		_ = l.listener.Close()
		l.set(down)
		wg.Wait()
	})
	return l
}

func (l *line) address() string { return "https://" + l.listener.Addr().String() }

// set cuts what there is, and says what happens to what comes.
func (l *line) set(state int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.state = state
	for c := range l.conns {
		_ = c.Close()
	}
}

// keep notes connections that end with the state, and says which that is.
func (l *line) keep(conns ...net.Conn) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range conns {
		l.conns[c] = true
	}
	return l.state
}

func (l *line) serve(c net.Conn) {
	defer func() { _ = c.Close() }()
	switch l.keep(c) {
	case down:
		return
	case frozen:
		_, _ = io.Copy(io.Discard, c) // until set closes it
		return
	}
	s, err := net.Dial("tcp", l.server)
	if err != nil {
		return
	}
	defer func() { _ = s.Close() }()
	if l.keep(s) != open {
		return
	}
	ended := make(chan error, 1)
	go func() {
		_, err := io.Copy(s, c)
		ended <- errors.Join(err, s.Close())
	}()
	_, _ = io.Copy(c, s)
	_ = c.Close()
	<-ended
}
