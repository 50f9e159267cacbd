package runner_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

const toolsPolicy = `version: 1
rules:
  - name: all
    match: {trust: [local]}
    leases:
      - {name: cloud, issuer: cloud, step: deploy, tools: [aws]}
      - name: forge
        issuer: pg
        step: deploy
        tools: [git, docker]
        broker: [{name: git.example, port: 8443, as: basic, value: password, user: username}]
`

// cloud issues keys in clear.
type cloud struct{ *worldIssuer }

func (i cloud) Issue(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
	l, err := i.worldIssuer.Issue(ctx, name, g)
	l.Values = map[string]creds.Secret{"secret_access_key": creds.NewSecret("the-secret-of-the-key")}
	l.Facts = map[string]string{"access_key_id": "AKIDEXAMPLE"}
	return l, err
}

// crowded is a gateway of a box in which the first ports are taken.
type crowded struct {
	*observed
	taken int
	asked []uint16
}

func (g *crowded) Open(ctx context.Context, name string, o egress.Opening) error {
	for _, s := range o.Serve {
		if g.asked = append(g.asked, s.Local); len(g.asked) <= g.taken {
			return fmt.Errorf("local port: %w", syscall.EADDRINUSE)
		}
	}
	return g.observed.Open(ctx, name, o)
}

// TestTools: a step, and no other, finds what its programs look for; what is brokered
// is a placeholder there.
func TestTools(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	g := &crowded{observed: &observed{(*worldGateway)(w), map[string]egress.Opening{}}, taken: 3}
	names := []string{
		"AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_AUTHORIZATION_TOKEN", "DOCKER_CONFIG", "GIT_CONFIG_COUNT",
		"GIT_CONFIG_KEY_0", "GIT_CONFIG_KEY_1", "GIT_CONFIG_VALUE_1", "GIT_CONFIG_KEY_2", "GIT_CONFIG_VALUE_2",
	}
	show := "env " + strings.Join(names, "\nenv ")
	own := providers.Env{Vars: map[string]string{"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "user.name", "GIT_CONFIG_VALUE_0": "a"}}
	r := w.run(lifetime(t), func(c *runner.Config) {
		withPolicy(t, toolsPolicy)(c)
		c.Gateway = g
		c.Issuers["cloud"] = cloud{(*worldIssuer)(w)}
	}, providers.Step{ID: "deploy", Run: show, Env: own}, providers.Step{Run: "print next\n" + show})
	if r.Conclusion != providers.Success {
		t.Fatalf("got %+v; log:\n%s", r, w.shown())
	}
	log, next, _ := strings.Cut(w.shown(), "next\n")
	uri := fmt.Sprintf("http://127.0.0.1:%d/credentials", g.asked[len(g.asked)-1])
	for _, want := range []string{
		uri, "/run/mayfly/secrets/docker-forge\n", "\n3\n", "user.name", "credential.https://git.example:8443.helper", "'username=u' 'password=",
	} {
		if !strings.Contains(log, want) {
			t.Errorf("the step lacks %q:\n%s", want, log)
		}
	}
	if strings.Contains(log, "pw-mf-") || strings.Contains(next, "127.0.0.1") || strings.Contains(next, "docker") || strings.Contains(next, "git.example") {
		t.Errorf("got\n%s\nand then\n%s", log, next)
	}
	if len(g.asked) != 4 {
		t.Errorf("ports %v, want three that are taken and one", g.asked)
	}
	o := g.opened["cloud"]
	if len(o.Serve) != 1 {
		t.Fatalf("opened %+v", o)
	}
	for what, header := range map[string][]string{"no token": nil, "an empty token": {""}, "another token": {"x"}} {
		answer, ask := httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/credentials", nil)
		ask.Header["Authorization"] = header
		o.Serve[0].Handler.ServeHTTP(answer, ask)
		if answer.Code != http.StatusUnauthorized || strings.Contains(answer.Body.String(), "the-secret") {
			t.Errorf("%s: got %d %s", what, answer.Code, answer.Body)
		}
	}
	w.clean()
}

// caught is a runtime whose last box can be looked into.
type caught struct {
	worldRuntime
	box sandbox.Sandbox
}

func (r *caught) Create(ctx context.Context, name string, s sandbox.Spec) (sandbox.Sandbox, error) {
	box, err := r.worldRuntime.Create(ctx, name, s)
	r.box = box
	return box, err
}

// TestToolsOfAKeptBox: whoever looks into a box that is kept finds nothing of the
// job's leases, also not in what was made for Docker's tools.
func TestToolsOfAKeptBox(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		text := toolsPolicy[:strings.Index(toolsPolicy, "    leases:")] + `    keep-on-failure: 10m
    leases:
      - name: forge
        issuer: pg
        tools: [docker]
        clear: [password]
        broker: [{name: git.example, port: 8443, as: basic, value: password, user: username}]
`
		runtime := &caught{worldRuntime: worldRuntime{w.boxes, w}}
		stop := w.serve(w.agent(func(c *runner.Config) {
			withPolicy(t, text)(c)
			c.Runtimes["native"] = runtime
			c.Keep, c.Once = 1, false
		}))
		name, _ := w.failing()
		w.kept("after the report", name)
		b, err := runtime.box.Get(t.Context(), sandbox.Run+"/secrets/docker-forge/config.json", 1<<10)
		if err != nil || len(b) > 0 {
			t.Errorf("in the box is %q, %v; want an empty file", b, err)
		}
		stop()
		w.clean()
	})
}

// TestToolsCrowded: a box without a free port fails the job, and leaves nothing.
func TestToolsCrowded(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	g := &crowded{observed: &observed{(*worldGateway)(w), map[string]egress.Opening{}}, taken: 1000}
	r := w.run(lifetime(t), func(c *runner.Config) {
		withPolicy(t, toolsPolicy)(c)
		c.Gateway = g
		c.Issuers["cloud"] = cloud{(*worldIssuer)(w)}
	}, providers.Step{ID: "deploy", Run: "print one"})
	if r.Conclusion != providers.Failure || !strings.Contains(r.Reason, syscall.EADDRINUSE.Error()) || len(g.asked) > 100 {
		t.Errorf("got %+v after %d ports", r, len(g.asked))
	}
	w.clean()
}
