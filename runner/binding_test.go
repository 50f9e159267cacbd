package runner_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/providers"
)

const bindingPolicy = `version: 1
rules:
  - name: release
    match: {provider: ci, repository: acme/app, ref: refs/heads/main, event: push, workflow: release.yml, trust: protected}
    when: job.sha == "` + commit + `" && job.actor == "alice"
    leases:
      - {name: key, issuer: pg, step: deploy, env: {DEPLOY_KEY: password}}
    egress:
      - {name: deploy.example, port: 443, protocol: tls, step: deploy}
  - name: rest
    match: {trust: [fork, branch, tag, protected, environment, local]}
`

// TestBinding: a job that differs in one fact from the one that a rule is for runs the
// same steps, and no issuer is asked for it, no way is opened and nothing is owed.
func TestBinding(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(j *providers.Job){
		"":                    func(*providers.Job) {},
		"another branch":      func(j *providers.Job) { j.Subject.Ref = "refs/heads/main2" },
		"a tag of that name":  func(j *providers.Job) { j.Subject.Ref = "refs/tags/main" },
		"a fork":              func(j *providers.Job) { j.Trust = providers.TrustFork },
		"an unprotected ref":  func(j *providers.Job) { j.Trust = providers.TrustBranch },
		"another commit":      func(j *providers.Job) { j.Subject.SHA = strings.Repeat("1", 40) },
		"another repository":  func(j *providers.Job) { j.Subject.Repository = "acme/app2" },
		"another owner":       func(j *providers.Job) { j.Subject.Repository = "evil/app" },
		"another spelling":    func(j *providers.Job) { j.Subject.Repository = "ACME/app" },
		"another event":       func(j *providers.Job) { j.Subject.Event = "pull_request_target" },
		"another workflow":    func(j *providers.Job) { j.Subject.Workflow = "ci.yml" },
		"another provider":    func(j *providers.Job) { j.Subject.Provider = "ci2" },
		"another person":      func(j *providers.Job) { j.Subject.Actor = "mallory" },
		"another step":        func(j *providers.Job) { j.Steps[1].ID = "deploy2" },
		"a step of that name": func(j *providers.Job) { j.Steps[1].ID, j.Steps[1].Name = "x", "deploy" },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			j := job(providers.Step{Run: "env DEPLOY_KEY"}, providers.Step{ID: "deploy", Run: "env DEPLOY_KEY"}, providers.Step{ID: "last", Run: "print ran"})
			j.Trust, j.Subject.Actor = providers.TrustProtected, "alice"
			j.Subject.SHA, j.Subject.Event, j.Subject.Workflow = commit, "push", "release.yml"
			change(&j)
			w.offers <- j
			ctx := lifetime(t)
			if err := w.agent(withPolicy(t, bindingPolicy)).Run(ctx, ctx); err != nil {
				t.Fatal(err)
			}
			if r := <-w.results; r.Conclusion != providers.Success || !strings.Contains(w.shown(), "ran\n") {
				t.Errorf("got %+v; log:\n%s", r, w.shown())
			}
			opened := len(slices.DeleteFunc(w.happened(), func(call string) bool { return call != "open" }))
			if issued := slices.Contains(w.happened(), "issue"); issued != (name == "") || strings.Contains(w.shown(), "***") != issued {
				t.Errorf("issued %t; log:\n%s", issued, w.shown())
			}
			if want := map[bool]int{true: 2, false: 1}[name == ""]; opened != want {
				t.Errorf("%d gateways were opened, want %d", opened, want)
			}
			w.clean()
		})
	}
}
