package configs

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner/policy"
)

func TestExampleAgent(t *testing.T) {
	t.Parallel()
	c, err := Load("agent.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if c.State != "/var/lib/mayfly" || c.Slots != 4 || c.Keep != 2 || c.Policy != "policy.yaml" || c.Drain != 10*time.Minute || c.Log != (Log{"info", "json"}) {
		t.Errorf("Load: got %+v", c)
	}
	var spool struct {
		Dir string `yaml:"dir"`
	}
	if err := c.Providers["local"].Decode(&spool); err != nil || spool.Dir != "/var/spool/mayfly" || c.Providers["local"].Type != "local" {
		t.Errorf("provider: got %+v, %v", spool, err)
	}
	var db struct {
		Host     string `yaml:"host"`
		Port     int    `yaml:"port"`
		Database string `yaml:"database"`
		User     string `yaml:"user"`
		Password string `yaml:"password_file"`
	}
	if err := c.Issuers["build-db"].Decode(&db); err != nil || db.Port != 5432 || c.Issuers["build-db"].Type != "postgres" {
		t.Errorf("issuer: got %+v, %v", db, err)
	}
	var nothing struct{}
	if err := errors.Join(c.Gateway.Decode(&nothing), c.Runtimes["native"].Decode(&nothing)); err != nil {
		t.Errorf("empty sections: %v", err)
	}
}

func TestExampleGitea(t *testing.T) {
	t.Parallel()
	c, err := Load("agent-gitea.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var forge struct {
		URL       string   `yaml:"url"`
		Token     string   `yaml:"token_file"`
		Labels    []string `yaml:"labels"`
		Ephemeral bool     `yaml:"ephemeral"`
	}
	if err := c.Providers["forge"].Decode(&forge); err != nil || c.Providers["forge"].Type != "gitea" || forge.URL == "" || len(forge.Labels) != 2 || !forge.Ephemeral {
		t.Errorf("provider: got %+v, %v", forge, err)
	}
}

func TestExamplePolicy(t *testing.T) {
	t.Parallel()
	src, err := os.ReadFile("policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.Parse(src, "policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	j := providers.Job{Subject: creds.Subject{Repository: "acme/app", Ref: "refs/heads/main", Event: "push"}, Trust: providers.TrustProtected}
	if plan, err := p.Decide(j); err != nil || len(plan.Egress) != 3 || len(plan.Leases) != 1 {
		t.Errorf("main build: got %+v, %v, want 3 ways out and a lease", plan, err)
	}
	j.Trust = providers.TrustFork
	if plan, err := p.Decide(j); err != nil || len(plan.Egress) != 0 || len(plan.Leases) != 0 {
		t.Errorf("fork: got %+v, %v, want nothing granted", plan, err)
	}
	c, err := Load("agent.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range p.Grants() {
		if _, ok := c.Issuers[g.Issuer]; !ok {
			t.Errorf("%s: issuer %s is not in agent.yaml", g.Rule, g.Issuer)
		}
	}
}

// TestExampleHTTPS: facts of the job are in the paths, sets are expanded, and a
// fact that is no word refuses the job.
func TestExampleHTTPS(t *testing.T) {
	t.Parallel()
	src, err := os.ReadFile("policy-https.yaml")
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.Parse(src, "policy-https.yaml")
	if err != nil {
		t.Fatal(err)
	}
	j := providers.Job{Subject: creds.Subject{Repository: "acme/app", Ref: "refs/heads/main"}, Trust: providers.TrustProtected}
	plan, err := p.Decide(j)
	if err != nil || len(plan.Egress) != 7 || plan.Egress[4].Rule.Requests[0].Path != "/acme/app.git/info/refs" {
		t.Errorf("got %+v, %v, want 7 ways out and the job's repository in a path", plan.Egress, err)
	}
	j.Subject.Repository = "acme/.."
	if _, err := p.Decide(j); !errors.Is(err, policy.ErrDenied) {
		t.Errorf("repository %s: got %v, want it refused", j.Subject.Repository, err)
	}
}

// TestExampleLogin: the job's repository is in the commands.
func TestExampleLogin(t *testing.T) {
	t.Parallel()
	src, err := os.ReadFile("policy-login.yaml")
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.Parse(src, "policy-login.yaml")
	if err != nil {
		t.Fatal(err)
	}
	j := providers.Job{Subject: creds.Subject{Repository: "acme/app"}, Trust: providers.TrustProtected}
	plan, err := p.Decide(j)
	if err != nil || len(plan.Leases) != 2 || plan.Leases[0].Broker[0].Rule.Session.Commands[1] != "git-receive-pack 'acme/app.git'" {
		t.Errorf("got %+v, %v, want two leases and the job's repository in a command", plan.Leases, err)
	}
}

func TestExampleDocker(t *testing.T) {
	t.Parallel()
	own := exampleEngine(t, "docker")
	if own.Image != "debian:12" || own.Host != "unix:///var/run/docker.sock" || own.Images.Pull != "missing" || len(own.Images.From) != 1 {
		t.Errorf("runtime: got %+v", own)
	}
	src, err := os.ReadFile("policy-docker.yaml")
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.Parse(src, "policy-docker.yaml")
	if err != nil {
		t.Fatal(err)
	}
	plan, err := p.Decide(providers.Job{Subject: creds.Subject{Repository: "acme/app"}, Trust: providers.TrustProtected})
	if err != nil || len(plan.Images) != 2 || len(plan.Egress) != 2 || plan.Egress[1].Service != "search" {
		t.Errorf("builds: got %+v, %v, want images that a workflow may name, and a way out of a service", plan, err)
	}
}

func TestExampleContainerd(t *testing.T) {
	t.Parallel()
	if own := exampleEngine(t, "containerd"); own.Image != "debian:12" || own.Images.Pull != "missing" || len(own.Images.From) != 1 {
		t.Errorf("runtime: got %+v", own)
	}
}

// An ownEngine is what the examples say of a runtime over an engine.
type ownEngine struct {
	Image  string `yaml:"image"`
	Host   string `yaml:"host"`
	Images struct {
		Pull       string   `yaml:"pull"`
		From       []string `yaml:"from"`
		DigestOnly bool     `yaml:"digest_only"`
	} `yaml:"images"`
}

// exampleEngine reads the example of a runtime, and the policy that goes with it.
func exampleEngine(t *testing.T, runtime string) (own ownEngine) {
	t.Helper()
	file := "agent-" + runtime + ".yaml"
	c, err := Load(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Runtimes[runtime].Decode(&own); err != nil || c.Runtimes[runtime].Type != runtime {
		t.Errorf("runtime: got %+v, %v", own, err)
	}
	src, err := os.ReadFile(c.Policy)
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.Parse(src, c.Policy)
	if err != nil {
		t.Fatal(err)
	}
	places := p.Places()
	if len(places) != 2 || places[0].Runtime != runtime || places[0].Image != "golang:1.26" || places[1].Runtime != "native" {
		t.Errorf("places: got %+v", places)
	}
	for _, place := range places {
		if _, ok := c.Runtimes[place.Runtime]; !ok {
			t.Errorf("%s: runtime %s is not in %s", place.Rule, place.Runtime, file)
		}
	}
	return own
}

func TestExampleImages(t *testing.T) {
	t.Parallel()
	c, err := Load("agent-images.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var own struct {
		Images struct {
			Pull      string            `yaml:"pull"`
			From      []string          `yaml:"from"`
			Sources   map[string]string `yaml:"sources"`
			MaxBytes  string            `yaml:"max_bytes"`
			MaxFiles  int               `yaml:"max_files"`
			KeepBytes string            `yaml:"keep_bytes"`
			KeepAge   time.Duration     `yaml:"keep_age"`
		} `yaml:"images"`
	}
	if err := c.Runtimes["native"].Decode(&own); err != nil || own.Images.Pull != "missing" || len(own.Images.From) != 2 || len(own.Images.Sources) != 1 {
		t.Errorf("images: got %+v, %v", own, err)
	}
	src, err := os.ReadFile(c.Policy)
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.Parse(src, c.Policy)
	if err != nil {
		t.Fatal(err)
	}
	j := providers.Job{Subject: creds.Subject{Repository: "team/app"}, Trust: providers.TrustProtected}
	if plan, err := p.Decide(j); err != nil || plan.Image == "" || plan.Pull != "registry" || len(plan.Leases) != 1 || plan.Leases[0].Step != policy.PullStep {
		t.Errorf("team: got %+v, %v, want an image, and a lease to pull it with", plan, err)
	}
}

func TestDefaults(t *testing.T) {
	t.Parallel()
	c, err := Parse([]byte("version: 1\npolicy: p.yaml\nproviders: {spool: {type: local}, other: }\n"), "/etc/mayfly/agent.yaml")
	if err != nil {
		t.Fatal(err)
	}
	d := Default(DefaultState)
	if c.State != d.State || c.Slots != 1 || c.Keep != 2 || c.Drain != 0 || c.Log != d.Log || c.Runtimes["native"].Type != "native" {
		t.Errorf("Parse: got %+v, want the defaults", c)
	}
	if c.Policy != "/etc/mayfly/p.yaml" {
		t.Errorf("Policy: got %s, want it relative to the file", c.Policy)
	}
	if c.Providers["spool"].Type != "local" || c.Providers["other"].Type != "other" {
		t.Errorf("Providers: got %+v", c.Providers)
	}
	if got := c.Providers["spool"].Path("x"); got != "/etc/mayfly/x" {
		t.Errorf("Section.Path: got %s", got)
	}
	if err := d.Validate(); err != nil {
		t.Errorf("Default: %v", err)
	}
}

func TestProblems(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ src, want string }{
		{"", "agent.yaml:1: file is empty"},
		{"version: 2\nnew: key", "agent.yaml:1:10: version 2 is not supported: this agent reads version: 1"},
		{"polcy: x", `agent.yaml:1:1: unknown key "polcy" (known: version, state, slots, keep, policy, drain, providers, sandbox, issuers, gateway, outbound, git_cache, quotas, warm, monitor, log)
agent.yaml:1:1: key "version" is missing
agent.yaml:1:1: key "policy" is missing
agent.yaml:1:1: key "providers" is missing`},
		{`version: 1
policy: ""
state: ""
slots: 0
drain: 0s
providers: {}
log: {level: loud, format: xml}`, `agent.yaml:2:9: name of the policy file is empty
agent.yaml:3:8: name of the state directory is empty
agent.yaml:4:8: 0 is out of range: 1 to 1024
agent.yaml:5:8: 0s is out of range: write more than 0s, or remove the key to wait until the jobs end
agent.yaml:6:12: no providers: the agent would have nobody to ask for jobs
agent.yaml:7:14: unknown word "loud" (known: debug, info, warn, error)
agent.yaml:7:28: unknown word "xml" (known: json, console)`},
		{`version: 1
policy: p.yaml
slots: 1000
keep: 25
providers: {local: {}}`, `agent.yaml:4:7: 25 is out of range: 0 to 24, so that with the slots there are at most 1024`},
		{`version: 1
policy: p.yaml
providers: {Local: {}, b: text, c: {type: 5}}`, `agent.yaml:3:13: "Local" is not a name: write lower-case letters, digits and -
agent.yaml:3:27: want a mapping
agent.yaml:3:43: "5" is not a name: write lower-case letters, digits and -`},
		{`version: 1
policy: p.yaml
providers:
  a: {token: hunter2, nested: [{db_password: hunter3}], url: "postgres://u:hunter4@db/x"}
  b: {password: 12345, token_file: fine, key: fine, secret: }`, `agent.yaml:4:14: secret in the configuration: put it into a file that only the agent can read, and name that as token_file
agent.yaml:4:46: secret in the configuration: put it into a file that only the agent can read, and name that as db_password_file
agent.yaml:4:62: password in a URL: put it into a file that only the agent can read, and name that with a key that ends in _file
agent.yaml:5:17: secret in the configuration: put it into a file that only the agent can read, and name that as password_file`},
	} {
		_, err := Parse([]byte(c.src), "agent.yaml")
		if err == nil || err.Error() != c.want {
			t.Errorf("%q: got\n%v\nwant\n%s", c.src, err, c.want)
		}
	}
	if _, err := Load(filepath.Join(t.TempDir(), "absent")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Load: got %v, want ErrNotExist", err)
	}
}

// A section is strict for its owner too, and says where it stands.
func TestSectionErrors(t *testing.T) {
	t.Parallel()
	c, err := Parse([]byte(`version: 1
policy: p.yaml
providers:
  local:
    type: local
    dirr: /x
gateway:
  naems: 3
`), "agent.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var spool struct {
		Dir string `yaml:"dir"`
	}
	err = c.Providers["local"].Decode(&spool)
	if want := `agent.yaml:6:5: unknown key "dirr" (known: dir)`; err == nil || err.Error() != want {
		t.Errorf("Decode: got %v, want %s", err, want)
	}
	if err := c.Gateway.Decode(&spool); err == nil || !strings.HasPrefix(err.Error(), "agent.yaml:8:3: unknown key") {
		t.Errorf("Decode: got %v", err)
	}
	if err := c.Providers["local"].Errorf("dirr", "no such directory"); err.Error() != "agent.yaml:6:11: no such directory" {
		t.Errorf("Errorf: got %v", err)
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	put := func(name, text string, mode fs.FileMode) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(path, []byte(text), 0o600), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
	}
	put("agent.yaml", `version: 1
policy: policy.yaml
providers:
  a: {token_file: good}
  b: {token_file: open}
  c: {ca_file: open, password-file: absent}
`, 0o640)
	put("policy.yaml", "", 0o666)
	put("good", "s", 0o640)
	put("open", "s", 0o644)
	c, err := Load(filepath.Join(dir, "agent.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	err = c.Validate()
	file := filepath.Join(dir, "agent.yaml")
	want := file + ":2:9: " + dir + "/policy.yaml: everybody on this machine can change it (mode 0666): chmod o-w it\n" +
		file + ":5:19: " + dir + "/open: everybody on this machine can use it (mode 0644): chmod o= it, and replace the secret\n" +
		file + ":6:37: stat " + dir + "/absent: no such file or directory"
	if err == nil || err.Error() != want {
		t.Errorf("Validate: got\n%v\nwant\n%s", err, want)
	}
}

func TestReadSecret(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "secret")
	for _, c := range []struct {
		text string
		mode fs.FileMode
		want string
		err  string
	}{
		{"hunter2\n", 0o600, "hunter2", ""},
		{"hunter2\r\n", 0o640, "hunter2", ""},
		{"two\nlines\n\n", 0o600, "two\nlines\n", ""},
		{"hunter2", 0o644, "", "chmod o= it"},
		{"hunter2", 0o602, "", "chmod o= it"},
		{"\n", 0o600, "", "file is empty"},
		{strings.Repeat("hunter2", 10_000), 0o600, "", "larger than 65536 bytes"},
	} {
		if err := errors.Join(os.WriteFile(path, []byte(c.text), 0o600), os.Chmod(path, c.mode)); err != nil {
			t.Fatal(err)
		}
		got, err := ReadSecret(path)
		switch {
		case c.err == "" && (err != nil || got.Reveal() != c.want):
			t.Errorf("mode %o: got error %v, or another text", c.mode, err)
		case c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err) || !strings.Contains(err.Error(), path)):
			t.Errorf("mode %o: got %v, want %s: %s", c.mode, err, path, c.err)
		case err != nil && strings.Contains(err.Error(), "hunter2"):
			t.Errorf("mode %o: the error shows the secret", c.mode)
		}
	}
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadSecret(fifo); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("fifo: got %v, want an error at once", err)
	}
	if _, err := ReadSecret(dir); err == nil {
		t.Error("directory: got no error")
	}
}
