package gitea

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/workflow"
)

// Names under which a job's secrets hold tokens that Gitea does not send among
// the secrets. Nobody else can set them: Gitea refuses secrets whose names begin
// with GITEA_.
const (
	secretRuntime = "GITEA_RUNTIME_TOKEN"  // artifacts and caches of this run
	secretIDToken = "GITEA_ID_TOKEN_TOKEN" // asks for identity tokens
)

// maxFact is the longest name or address in the context that is believed, in
// bytes.
const maxFact = 1024

func bad(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{providers.ErrBadJob}, args...)...)
}

var (
	repositoryShape = regexp.MustCompile(`^[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+$`)
	shaShape        = regexp.MustCompile(`^([0-9a-f]{40}|[0-9a-f]{64})$`)
	fileShape       = regexp.MustCompile(`^[^/\\]+\.ya?ml$`)
)

// facts are what the policy and the audit will believe. They come from the
// server, which has them from whoever pushed: a name that leads elsewhere, or is
// no name, refuses the job.
func (p *Provider) facts(context map[string]any) (workflow.Facts, error) {
	text := func(key string) string { s, _ := context[key].(string); return s }
	f := workflow.Facts{Trust: providers.TrustFork}
	f.Subject = creds.Subject{
		Provider: p.config.Provider, Repository: text("repository"), Ref: text("ref"), SHA: text("sha"),
		Workflow: text("workflow"), Event: text("event_name"), Origin: origin(context),
	}
	s := f.Subject
	for _, key := range slices.Sorted(maps.Keys(context)) {
		if v, ok := context[key].(string); ok && key != "token" && key != "gitea_runtime_token" && !sound(v) {
			return f, bad("%s: it has control characters or more than %d bytes", clip(key), maxFact)
		}
	}
	if !isRepository(s.Repository) {
		return f, bad("repository %q: it must be OWNER/NAME", clip(s.Repository))
	}
	if !fileShape.MatchString(s.Workflow) {
		return f, bad("workflow %q: it must be the name of a YAML file", clip(s.Workflow))
	}
	if !shaShape.MatchString(s.SHA) {
		return f, bad("sha %q: it must be the hexadecimal digits of a commit", clip(s.SHA))
	}
	if s.Ref != "" && (!strings.HasPrefix(s.Ref, "refs/") || strings.Contains(s.Ref, "..")) {
		return f, bad("ref %q: it must be a full name such as refs/heads/main", clip(s.Ref))
	}
	if server := text("server_url"); server != "" {
		if u, err := url.Parse(server); err != nil || u.Host == "" || u.User != nil || u.Scheme != "https" && u.Scheme != "http" {
			return f, bad("server_url %q: it must be the URL of a Gitea", clip(server))
		}
	}
	f.Trust = trust(context, s)
	return f, nil
}

func isRepository(s string) bool {
	return repositoryShape.MatchString(s) && !slices.ContainsFunc(strings.Split(s, "/"), func(part string) bool { return strings.Trim(part, ".") == "" })
}

func sound(s string) bool {
	return len(s) <= maxFact && utf8.ValidString(s) && !strings.ContainsFunc(s, unicode.IsControl)
}

// trust judges by where the code comes from. What a pull request from another
// repository starts is a fork's, pull_request_target too, whose workflow is the
// base's but which may check out the head; and so is a run that began because
// another run of such a request ended, which may take what that one left. Gitea
// 1.27 says of no ref that it is protected (services/actions/context.go). What is
// neither a branch nor a tag is not known, and so the least.
func trust(context map[string]any, s creds.Subject) providers.Trust {
	event, _ := context["event"].(map[string]any)
	pull, isPull := event["pull_request"].(map[string]any)
	if isPull || strings.HasPrefix(s.Event, "pull_request") || strings.HasPrefix(s.Ref, "refs/pull/") {
		head, _ := pull["head"].(map[string]any)
		repo, _ := head["repo"].(map[string]any)
		if name, _ := repo["full_name"].(string); name == "" || name != s.Repository {
			return providers.TrustFork
		}
		return providers.TrustBranch
	}
	if s.Event == "workflow_run" && !ownRun(event, s) {
		return providers.TrustFork
	}
	branch, tag := strings.HasPrefix(s.Ref, "refs/heads/"), strings.HasPrefix(s.Ref, "refs/tags/")
	switch protected, _ := context["ref_protected"].(bool); {
	case protected && (branch || tag):
		return providers.TrustProtected
	case tag:
		return providers.TrustTag
	case branch:
		return providers.TrustBranch
	}
	return providers.TrustFork
}

// ownRun says whether the run that a job follows was of the repository's own code:
// it began by an event of which only people who can push are the cause, or for a
// pull request whose head is in the repository. Gitea 1.27 does not say where the
// head is. Of other events the head is the default branch, whatever they are about:
// of a run that itself followed one of a fork, for one.
func ownRun(event map[string]any, s creds.Subject) bool {
	head := child(event, "workflow_run", "head_repository", "full_name")
	began, _ := child(event, "workflow_run", "event").(string)
	if slices.Contains([]string{"push", "schedule", "workflow_dispatch"}, began) {
		return head == nil || head == s.Repository
	}
	return strings.HasPrefix(began, "pull_request") && head == s.Repository
}

// origin is what Gitea 1.27 says of a run beside its commit. Ids are in the event,
// which is believed about the repository and the user that it names, if they are
// the job's.
func origin(context map[string]any) creds.Origin {
	text := func(key string) string { s, _ := context[key].(string); return s }
	o := creds.Origin{
		RepositoryID: text("repository_id"), OwnerID: text("repository_owner_id"), ActorID: text("actor_id"),
		RunID: text("run_id"), RunNumber: text("run_number"), RunAttempt: text("run_attempt"), Actor: text("actor"),
		HeadRef: text("head_ref"), BaseRef: text("base_ref"), WorkflowRef: text("workflow_ref"), WorkflowSHA: text("workflow_sha"),
	}
	if name := text("repository"); name != "" && child(context, "event", "repository", "full_name") == name {
		o.RepositoryID = cmp.Or(o.RepositoryID, id(child(context, "event", "repository", "id")))
		o.OwnerID = cmp.Or(o.OwnerID, id(child(context, "event", "repository", "owner", "id")))
	}
	if o.Actor != "" && child(context, "event", "sender", "login") == o.Actor {
		o.ActorID = cmp.Or(o.ActorID, id(child(context, "event", "sender", "id")))
	}
	return o
}

// id is a number of JSON that names something, "" if it is none.
func id(v any) string {
	n, _ := v.(float64)
	if n < 1 || n > 1<<53 || n != math.Trunc(n) {
		return ""
	}
	return strconv.FormatInt(int64(n), 10)
}

// job builds the job. Beside what workflow.Workflow.Job sets, the github context
// is what Gitea says, and github.token is the token of the task.
func (p *Provider) job(t *task) (providers.Job, error) {
	f, err := p.facts(t.Context)
	bare := providers.Job{Subject: f.Subject, Trust: f.Trust}
	if err != nil {
		return providers.Job{Subject: creds.Subject{Provider: p.config.Provider}, Trust: providers.TrustFork}, err
	}
	w, err := workflow.Load(t.WorkflowPayload, f.Subject.Workflow)
	if err != nil {
		return bare, err
	}
	f.Secrets = secrets(t)
	f.GitHub = github(t)
	f.Inputs, _ = child(t.Context, "event", "inputs").(map[string]any)
	f.Vars = map[string]any{}
	for k, v := range t.Vars {
		f.Vars[k] = v
	}
	f.Needs = map[string]workflow.Need{}
	for id, n := range t.Needs {
		f.Needs[id] = workflow.Need{Result: strings.TrimPrefix(string(n.Result), "RESULT_"), Outputs: n.Outputs}
	}
	job, err := w.Job("", f)
	if err != nil {
		return job, err
	}
	if job.Env.Vars == nil {
		job.Env.Vars = map[string]string{}
	}
	maps.Copy(job.Env.Vars, environment(f.GitHub, f.Secrets))
	for _, l := range job.Labels {
		if !slices.Contains(p.config.Labels, l) {
			return job, bad("runs-on asks for %q, this agent has %s", clip(l), strings.Join(p.config.Labels, ", "))
		}
	}
	return job, nil
}

// Source is the repository at the instance that the agent was told of, with the
// token of the task.
func (p *Provider) Source(j providers.Job) (providers.Source, error) {
	s := providers.Source{
		URL:  strings.TrimRight(p.config.URL, "/") + "/" + j.Subject.Repository + ".git",
		User: "x-access-token", Token: j.Secrets["GITEA_TOKEN"], RootCA: p.config.RootCA,
	}
	if !isRepository(j.Subject.Repository) {
		return s, fmt.Errorf("gitea: repository %q is none", clip(j.Subject.Repository))
	}
	return s, nil
}

// secrets are the job's own, and the tokens that the context holds.
func secrets(t *task) map[string]creds.Secret {
	all := map[string]creds.Secret{}
	for k, v := range t.Secrets {
		all[k] = creds.NewSecret(v)
	}
	for name, key := range map[string]string{
		"GITHUB_TOKEN": "token", "GITEA_TOKEN": "token",
		secretRuntime: "gitea_runtime_token", secretIDToken: "actions_id_token_request_token",
	} {
		if v, _ := t.Context[key].(string); v != "" {
			all[name] = creds.NewSecret(v)
		}
	}
	return all
}

// github is the github context: Gitea's, with its tokens taken out or wrapped.
func github(t *task) map[string]any {
	g := maps.Clone(t.Context)
	for _, key := range []string{"gitea_runtime_token", "actions_id_token_request_token", "workspace", "job"} {
		delete(g, key)
	}
	if token, ok := g["token"].(string); ok {
		g["token"] = creds.NewSecret(token)
	}
	if server, ok := g["server_url"].(string); ok {
		g["server_url"] = strings.TrimRight(server, "/") // as GitHub's is, so that URLs can be put together
	}
	return g
}

func child(v any, path ...string) any {
	for _, key := range path {
		m, _ := v.(map[string]any)
		v = m[key]
	}
	return v
}

// environment is what Gitea's own runner sets for a job, beside what the agent
// sets for all. The values are templates, so that a branch called ${{ … }} is a
// branch, and a token takes the way of all secrets.
func environment(g map[string]any, secrets map[string]creds.Secret) map[string]string {
	env := map[string]string{"GITEA_ACTIONS": "true"}
	for variable, key := range map[string]string{
		"GITHUB_SERVER_URL": "server_url", "GITHUB_API_URL": "api_url", "GITHUB_GRAPHQL_URL": "graphql_url",
		"GITHUB_RUN_ID": "run_id", "GITHUB_RUN_NUMBER": "run_number", "GITHUB_RUN_ATTEMPT": "run_attempt", "GITEA_RUN_ID": "run_id",
		"GITHUB_REPOSITORY_OWNER": "repository_owner", "GITHUB_TRIGGERING_ACTOR": "triggering_actor",
		"GITHUB_BASE_REF": "base_ref", "GITHUB_HEAD_REF": "head_ref", "GITHUB_REF_TYPE": "ref_type", "GITHUB_RETENTION_DAYS": "retention_days",
		"ACTIONS_ID_TOKEN_REQUEST_URL": "actions_id_token_request_url",
	} {
		if v, ok := g[key].(string); ok && (v != "" || strings.HasSuffix(key, "_ref")) {
			env[variable] = "${{ github." + key + " }}"
		}
	}
	if _, ok := secrets[secretIDToken]; ok {
		env["ACTIONS_ID_TOKEN_REQUEST_TOKEN"] = "${{ secrets." + secretIDToken + " }}"
	}
	if _, ok := secrets[secretRuntime]; ok {
		env["ACTIONS_RUNTIME_TOKEN"] = "${{ secrets." + secretRuntime + " }}"
		env["ACTIONS_RUNTIME_URL"] = "${{ github.server_url }}/api/actions_pipeline/"
		env["ACTIONS_RESULTS_URL"] = "${{ github.server_url }}"
	}
	return env
}
