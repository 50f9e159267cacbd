package gitea

import (
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/gitea/fakegitea"
	"github.com/mayfly-ci/mayfly/providers/workflow"
)

// evaluate is what the agent makes of a template of the job.
func evaluate(t *testing.T, job providers.Job, template string) string {
	t.Helper()
	contexts := map[string]any{"secrets": map[string]any{}}
	for k, v := range job.Contexts {
		contexts[k] = v
	}
	for k, v := range job.Secrets {
		contexts["secrets"].(map[string]any)[k] = v
	}
	v, err := workflow.Interpolate(template, workflow.Scope{Contexts: contexts})
	if err != nil {
		t.Errorf("%s: %v", template, err)
	}
	return v
}

func TestJob(t *testing.T) {
	t.Parallel()
	s := instance(t)
	c := config(s)
	c.Provider, c.Labels = "forge", []string{"linux", "big"}
	p := open(t, c)
	job, id := claimed(t, s, p, "c", fakegitea.Job{
		Workflow: "name: ci\non: push\njobs:\n  test:\n    name: test (1)\n    runs-on: [linux, big]\n    strategy:\n      matrix:\n        v: [1]\n" +
			"    env:\n      GITHUB_SERVER_URL: mine\n    outputs:\n      o: ${{ steps.a.outputs.o }}\n    steps:\n      - id: a\n        run: echo\n",
		Steps: 1, RunsOn: []string{"linux"}, Secrets: map[string]string{"MINE": "s3cret"}, Vars: map[string]string{"V": "v"},
		Needs: map[string]fakegitea.Need{"build": {Result: fakegitea.Success, Outputs: map[string]string{"d": "abc"}}},
	})
	want := creds.Subject{
		Provider: "forge", Repository: "acme/app", Ref: "refs/heads/main", SHA: strings.Repeat("ab", 20), Workflow: "ci.yml", Event: "push", Job: "test",
		Origin: creds.Origin{RunID: job.Subject.RunID, RunNumber: "1", RunAttempt: "1", Actor: "mona"},
	}
	if job.Subject.RunID == "" {
		t.Error("the job has no run id")
	}
	if job.Subject != want || job.Trust != providers.TrustBranch || !slices.Equal(job.Labels, c.Labels) || job.ByName || len(job.Steps) != 1 {
		t.Errorf("job = %+v, want one of %+v", job, want)
	}
	token, runtime := fakegitea.Token(id), fakegitea.RuntimeToken(id)
	for template, want := range map[string]string{
		"${{ secrets.MINE }} ${{ vars.V }} ${{ matrix.v }}":                                                            "s3cret v 1",
		"${{ needs.build.outputs.d }} ${{ needs.build.result }}":                                                       "abc success",
		"${{ github.token }} ${{ secrets.GITHUB_TOKEN }} ${{ secrets.GITEA_TOKEN }}":                                   token + " " + token + " " + token,
		"${{ gitea.repository }} ${{ github.actor }} ${{ github.job }} ${{ github.event_name }}":                       "acme/app mona test push",
		"${{ github.gitea_runtime_token }}":                                                                            "",
		job.Env.Vars["GITHUB_SERVER_URL"] + "|" + job.Env.Vars["GITHUB_API_URL"] + "|" + job.Env.Vars["GITHUB_RUN_ID"]: fmt.Sprintf("http://gitea.test|http://gitea.test/api/v1|%d", id),
		job.Env.Vars["ACTIONS_RUNTIME_TOKEN"] + "|" + job.Env.Vars["ACTIONS_RUNTIME_URL"]:                              runtime + "|http://gitea.test/api/actions_pipeline/",
		job.Env.Vars["ACTIONS_RESULTS_URL"] + job.Env.Vars["GITEA_ACTIONS"] + job.Env.Vars["ACTIONS_CACHE_URL"]:        "http://gitea.testtrue",
	} {
		if got := evaluate(t, job, template); got != want {
			t.Errorf("%s = %q, want %q", template, got, want)
		}
	}
	var masked []string
	for _, v := range job.Secrets {
		masked = append(masked, v.Reveal())
	}
	for _, secret := range []string{"s3cret", token, runtime} {
		if !slices.Contains(masked, secret) {
			t.Errorf("%q is not among the job's secrets, so that it would not be masked", secret)
		}
	}
	for _, secret := range []string{"s3cret", token, runtime, p.current.Token} {
		if printed := fmt.Sprintf("%v %+v %#v", job.Contexts, job.Env.Vars, job.Secrets); strings.Contains(printed, secret) {
			t.Errorf("the job prints %q", secret)
		}
	}
	// A label that this agent did not promise.
	other := simple("x")
	other.Workflow = strings.Replace(other.Workflow, "linux", "windows", 1)
	s.Submit(other)
	if _, _, err := take(t, p, "d"); !errors.Is(err, providers.ErrBadJob) || !strings.Contains(err.Error(), `"windows", this agent has linux, big`) {
		t.Errorf("a job for windows: Claim = %v, want ErrBadJob", err)
	}
}

func TestTrust(t *testing.T) {
	t.Parallel()
	pull := func(repo any) map[string]any {
		return map[string]any{"event": map[string]any{"pull_request": map[string]any{"head": map[string]any{"repo": repo}}}}
	}
	ran := func(event, name string) map[string]any {
		return map[string]any{"event": map[string]any{"workflow_run": map[string]any{"event": event, "head_repository": map[string]any{"full_name": name}}}}
	}
	after := func(event string) map[string]any {
		return map[string]any{"event": map[string]any{"workflow_run": map[string]any{"event": event}}}
	}
	from := func(name string) any { return map[string]any{"full_name": name} }
	for _, c := range []struct {
		event, ref string
		context    map[string]any
		want       providers.Trust
	}{
		{"push", "refs/heads/main", nil, providers.TrustBranch},
		{"push", "refs/heads/main", map[string]any{"ref_protected": true}, providers.TrustProtected},
		{"push", "refs/heads/main", map[string]any{"ref_protected": "true"}, providers.TrustBranch},
		{"pull_request", "refs/pull/1/merge", pull(from("acme/app")), providers.TrustBranch},
		{"pull_request", "refs/pull/1/merge", pull(from("evil/app")), providers.TrustFork},
		{"pull_request_target", "refs/heads/main", pull(from("evil/app")), providers.TrustFork},
		{"pull_request_target", "refs/heads/main", map[string]any{"ref_protected": true, "event": "x"}, providers.TrustFork},
		{"pull_request", "refs/pull/1/merge", pull(nil), providers.TrustFork},
		{"pull_request", "refs/heads/main", nil, providers.TrustFork},
		{"push", "refs/pull/1/head", map[string]any{"ref_protected": true}, providers.TrustFork},
		{"issue_comment", "refs/heads/main", pull(from("evil/app")), providers.TrustFork},
		{"schedule", "refs/heads/main", map[string]any{"event": nil}, providers.TrustBranch},
		{"push", "refs/tags/v1", nil, providers.TrustTag},
		{"push", "refs/tags/v1", map[string]any{"ref_protected": true}, providers.TrustProtected},
		{"push", "", nil, providers.TrustFork},
		{"push", "main", nil, providers.TrustFork},
		{"push", "refs/for/main", map[string]any{"ref_protected": true}, providers.TrustFork},
		{"workflow_run", "refs/heads/main", ran("pull_request", "acme/app"), providers.TrustBranch},
		{"workflow_run", "refs/heads/main", ran("push", "acme/app"), providers.TrustBranch},
		{"workflow_run", "refs/heads/main", ran("pull_request", "evil/app"), providers.TrustFork},
		{"workflow_run", "refs/heads/main", ran("push", "evil/app"), providers.TrustFork},
		{"workflow_run", "refs/heads/main", ran("workflow_run", "acme/app"), providers.TrustFork},
		{"workflow_run", "refs/heads/main", ran("issue_comment", "acme/app"), providers.TrustFork},
		{"workflow_run", "refs/heads/main", nil, providers.TrustFork},
		{"workflow_run", "refs/heads/main", after("push"), providers.TrustBranch},
		{"workflow_run", "refs/heads/main", after("pull_request"), providers.TrustFork},
		{"workflow_run", "refs/heads/main", after("workflow_run"), providers.TrustFork},
	} {
		got := trust(c.context, creds.Subject{Repository: "acme/app", Event: c.event, Ref: c.ref})
		if got != c.want {
			t.Errorf("%s of %s with %v: trust %q, want %q", c.event, c.ref, c.context, got, c.want)
		}
	}
}

// TestOrigin: ids are those of the job's own repository and actor, or unknown.
func TestOrigin(t *testing.T) {
	t.Parallel()
	with := func(change func(context, event map[string]any)) creds.Origin {
		event := map[string]any{
			"repository": map[string]any{"full_name": "acme/app", "id": 42.0, "owner": map[string]any{"id": 7.0}},
			"sender":     map[string]any{"login": "mona", "id": 9.0},
		}
		context := map[string]any{"repository": "acme/app", "actor": "mona", "run_id": "17", "event": event}
		change(context, event)
		return origin(context)
	}
	all := creds.Origin{RepositoryID: "42", OwnerID: "7", ActorID: "9", RunID: "17", Actor: "mona"}
	if got := with(func(_, _ map[string]any) {}); got != all {
		t.Errorf("got %+v, want %+v", got, all)
	}
	if got := with(func(c, _ map[string]any) { c["repository_id"] = "43" }); got.RepositoryID != "43" {
		t.Errorf("what the context says: got %+v", got)
	}
	for what, change := range map[string]func(c, e map[string]any){
		"an event of others": func(c, _ map[string]any) { c["repository"], c["actor"] = "acme/other", "eve" },
		"no event":           func(c, _ map[string]any) { delete(c, "event") },
		"an event of text":   func(c, _ map[string]any) { c["event"] = "acme/app" },
		"an id of text": func(_, e map[string]any) {
			e["repository"] = map[string]any{"full_name": "acme/app", "id": "42"}
			e["sender"] = map[string]any{"login": "mona", "id": 1.5}
		},
		"an id of none": func(_, e map[string]any) {
			e["repository"] = map[string]any{"full_name": "acme/app", "id": 0.0}
			e["sender"] = map[string]any{"login": "mona", "id": -1.0}
		},
	} {
		if got := with(change); got.RepositoryID+got.OwnerID+got.ActorID != "" {
			t.Errorf("%s: got %+v, want no ids", what, got)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	t.Parallel()
	good := Config{URL: "https://gitea.test/sub/", Labels: []string{"ubuntu-latest", "linux_2.x"}, Store: &memory{}}
	for name, c := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"nothing wrong":  {func(*Config) {}, ""},
		"loopback":       {func(c *Config) { c.URL = "http://127.0.0.1:3000" }, ""},
		"loopback 6":     {func(c *Config) { c.URL = "http://[::1]:3000" }, ""},
		"insecure":       {func(c *Config) { c.URL, c.Insecure = "http://gitea.test", true }, ""},
		"clear text":     {func(c *Config) { c.URL = "http://gitea.test" }, "in clear"},
		"almost":         {func(c *Config) { c.URL = "http://127.0.0.1.evil.test" }, "in clear"},
		"no scheme":      {func(c *Config) { c.URL = "gitea.test" }, "want https"},
		"another scheme": {func(c *Config) { c.URL = "ssh://gitea.test" }, "scheme"},
		"password":       {func(c *Config) { c.URL = "https://a:b@gitea.test" }, "want https"},
		"no labels":      {func(c *Config) { c.Labels = nil }, "labels: none"},
		"windows":        {func(c *Config) { c.Labels = []string{"Windows-2022"} }, "boxes are Linux"},
		"macos":          {func(c *Config) { c.Labels = []string{"linux", "macos-14"} }, "boxes are Linux"},
		"image":          {func(c *Config) { c.Labels = []string{"linux:docker://debian"} }, "policy's choice"},
		"twice":          {func(c *Config) { c.Labels = []string{"a", "a"} }, "twice"},
		"no store":       {func(c *Config) { c.Store = nil }, "store"},
		"hurry":          {func(c *Config) { c.Poll = 1 }, "poll"},
		"two lines":      {func(c *Config) { c.Runner = "a\nb" }, "name"},
		"no authority":   {func(c *Config) { c.RootCA = "/nonexistent" }, "ca_file"},
	} {
		conf := good
		c.change(&conf)
		_, err := New(conf)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: New = %v, want %q", name, err, c.want)
		}
	}
}

// The server proves who it is, to an authority that the configuration names, in
// a version of TLS that is not broken.
func TestTLS(t *testing.T) {
	t.Parallel()
	s := instance(t)
	for version, want := range map[uint16]string{tls.VersionTLS12: "", tls.VersionTLS11: "protocol version"} {
		server := httptest.NewUnstartedServer(s)
		server.TLS = &tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: version}
		server.StartTLS()
		defer server.Close()
		file := filepath.Join(t.TempDir(), "ca.pem")
		if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}), 0o600); err != nil {
			t.Fatal(err)
		}
		c := config(s)
		c.URL, c.RootCA = server.URL, file
		_, err := open(t, c).Check(t.Context())
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("TLS version %x: Check = %v, want %q", version, err, want)
		}
		c.RootCA = ""
		if _, err := open(t, c).Check(t.Context()); err == nil {
			t.Errorf("TLS version %x: Check of a server that nobody vouches for = nil", version)
		}
	}
}
