package issuers_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/test/agenttest"
	"github.com/mayfly-ci/mayfly/test/giteatest"
	"github.com/mayfly-ci/mayfly/test/kubetest"
	"github.com/mayfly-ci/mayfly/test/miniotest"
	"github.com/mayfly-ci/mayfly/test/oauthtest"
	"github.com/mayfly-ci/mayfly/test/openbaotest"
	"github.com/mayfly-ci/mayfly/test/servertest"
	"github.com/mayfly-ci/mayfly/test/sshdtest"
)

// A provider is a real one, and what is said of it where.
type provider struct {
	*front
	section string // of the issuer in the configuration
	lease   string // of the policy
	trust   func() // has the provider believe the agent's documents, where it does not by itself
	tool    string // program that the job fetches
	files   int    // port where it is
	script  string // what it does with the credential, which is in $KEY
	want    string // in the log then

	used    string // request that needed the credential
	refusal string // what the receipt of the revocation says
	// dead says whether the provider refuses what the job used, where there is no
	// request to be sent again.
	dead func() error
}

func rows() map[string]func(t *testing.T, identity string) provider {
	return map[string]func(*testing.T, string) provider{
		"aws": minio, "gitea": gitea, "kubernetes": cluster, "oauth2": oauth, "ssh": sshd, "vault": openbao,
	}
}

// built is a program that was built for tests.
func built(t *testing.T, server, program string) string {
	t.Helper()
	dir, err := servertest.Dir(t.Context(), server)
	agenttest.Must(t, err)
	return filepath.Join(dir, program)
}

// file is one that the agent reads.
func file(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	agenttest.Must(t, os.WriteFile(path, []byte(content), 0o600))
	return path
}

func minio(t *testing.T, identity string) provider {
	s := miniotest.Prepare(t, identity)
	f := newFront(t, s.Address(), s.Client())
	return provider{
		front:   f,
		section: fmt.Sprintf("type: aws, service: minio, endpoint: '%s', role: '%s', ca_file: %s", s.Address(), s.Role(), s.CAFile()),
		trust: func() {
			s.Serve(t)
			status, text, err := s.Do(t.Context(), miniotest.Root(), http.MethodPut, "/artifacts", "")
			if err != nil || status != http.StatusOK {
				t.Fatalf("bucket: %d %s %v", status, text, err)
			}
		},
		lease: `scope: {statements: [{Effect: Allow, Action: "s3:*", Resource: "arn:aws:s3:::artifacts/*"}]}
env: {AWS_ACCESS_KEY_ID: access_key_id, AWS_SECRET_ACCESS_KEY: secret_access_key, AWS_SESSION_TOKEN: session_token, KEY: secret_access_key}
` + f.broker("as: aws-sigv4; value: secret_access_key; with: {key_id: access_key_id, session: session_token, regions: [us-east-1], services: [s3]}"),
		tool: built(t, "clients", "clients"), script: "./tool s3 " + f.url() + " artifacts", want: "put and get: ok",
		used: "/artifacts/small", refusal: "InvalidAccessKeyId",
	}
}

func gitea(t *testing.T, _ string) provider {
	s := giteatest.Start(t, giteatest.Config{})
	const password = "Bot-pass-1"
	_, err := s.NewRepository(t.Context(), "app")
	agenttest.Must(t, errors.Join(err, s.NewUser(t.Context(), "bot", password),
		s.API(t.Context(), http.MethodPatch, "/repos/lab/app", map[string]any{"private": true}, nil),
		s.API(t.Context(), http.MethodPut, "/repos/lab/app/collaborators/bot", map[string]any{"permission": "write"}, nil)))
	f := newFront(t, s.URL(), http.DefaultClient)
	return provider{
		front:   f,
		section: fmt.Sprintf("type: gitea, url: '%s', user: bot, password_file: %s, scopes: [write:repository]", s.URL(), file(t, password)),
		lease:   "scope: {scopes: [write:repository]}\nenv: {KEY: token}\n" + f.broker("as: basic; value: token; absent: pass"),
		script: strings.ReplaceAll(`git clone -q https://bot:$KEY@HOST/lab/app.git work
cd work
git -c user.name=a -c user.email=a@b.c commit -q --allow-empty -m pushed
git push -q origin HEAD:main
git ls-remote origin`, "HOST", strings.TrimPrefix(f.url(), "https://")),
		want: "refs/heads/main", used: "/lab/app.git/info/refs?service=git-receive-pack", refusal: "401",
	}
}

func cluster(t *testing.T, _ string) provider {
	s := kubetest.Start(t)
	for path, body := range map[string]string{
		"/api/v1/namespaces/default/serviceaccounts": `{"metadata": {"name": "job"}}`,
		"/apis/rbac.authorization.k8s.io/v1/namespaces/default/roles": `{"metadata": {"name": "job"},
			"rules": [{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["create", "list"]}]}`,
		"/apis/rbac.authorization.k8s.io/v1/namespaces/default/rolebindings": `{"metadata": {"name": "job"},
			"roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "job"}, "subjects": [{"kind": "ServiceAccount", "name": "job"}]}`,
	} {
		agenttest.Must(t, s.Do(t.Context(), http.MethodPost, path, json.RawMessage(body), nil))
	}
	f := newFront(t, s.Address(), s.Client())
	return provider{
		front: f,
		section: fmt.Sprintf("type: kubernetes, address: '%s', ca_file: %s, namespace: default, service_account: job, token_file: %s",
			s.Address(), s.CAFile(), file(t, kubetest.AdminToken)),
		lease: "env: {KEY: token}\n" + f.broker("as: bearer; value: token"),
		tool:  built(t, "kubernetes", "kubectl"),
		script: "kubectl() { ./tool --server " + f.url() + ` --token "$KEY" "$@"; }
kubectl create configmap made --from-literal=a=b
kubectl get configmaps -o name`,
		want: "configmap/made", used: "/api/v1/namespaces/default/configmaps", refusal: "401",
	}
}

func oauth(t *testing.T, identity string) provider {
	s := oauthtest.Start(t, identity+"/.well-known/jwks.json")
	f := newFront(t, s.URL(), http.DefaultClient)
	return provider{
		front: f,
		section: fmt.Sprintf(`type: oauth2, token_url: "%[1]s/oauth/token", revocation_url: "%[1]s/revoke", introspection_url: "%[1]s/oauth/introspect",
    use_url: "%[1]s/api", client_id: agent, client_secret_file: %[2]s, scopes: [api:read], exchange: "%[1]s"`, s.URL(), file(t, "agent-secret")),
		lease:  "scope: {scopes: [\"api:read\"]}\nenv: {KEY: access_token}\n" + f.broker("as: bearer; value: access_token"),
		script: `curl -sS -f -o /dev/null -w 'answer %{http_code}\n' -H "Authorization: Bearer $KEY" ` + f.url() + "/api",
		want:   "answer 200", used: "/api", refusal: "401",
	}
}

func openbao(t *testing.T, identity string) provider {
	s := openbaotest.Start(t)
	f := newFront(t, s.Address(), s.Client())
	const job = `path \"auth/token/create\" { capabilities = [\"update\"] } path \"secret/app\" { capabilities = [\"read\"] }`
	const agent = `path \"sys/leases/*\" { capabilities = [\"update\"] } path \"auth/token/accessors*\" { capabilities = [\"list\", \"sudo\"] } path \"auth/token/*\" { capabilities = [\"update\"] }`
	return provider{
		front:   f,
		section: fmt.Sprintf("type: vault, address: '%s', audience: vault, role: job, agent_role: mayfly, ca_file: %s", s.Address(), s.CAFile()),
		trust: func() {
			for _, c := range [][2]string{
				{"sys/auth/jwt", `{"type": "jwt"}`},
				{"auth/jwt/config", fmt.Sprintf(`{"oidc_discovery_url": %q, "bound_issuer": %[1]q}`, identity)},
				{"sys/policies/acl/job", `{"policy": "` + job + `"}`},
				{"sys/policies/acl/agent", `{"policy": "` + agent + `"}`},
				{"auth/jwt/role/job", `{"role_type": "jwt", "user_claim": "sub", "bound_audiences": ["vault"], "token_policies": ["job"], "token_ttl": "1h", "bound_claims": {"ref": "refs/heads/main", "step": "use"}}`},
				{"auth/jwt/role/mayfly", `{"role_type": "jwt", "user_claim": "sub", "bound_audiences": ["vault"], "token_policies": ["agent"], "token_ttl": "1m", "bound_claims_type": "glob", "bound_claims": {"sub": "installation:*"}}`},
				{"sys/mounts/secret", `{"type": "kv"}`},
				{"secret/app", `{"greeting": "hello-from-the-server"}`},
			} {
				agenttest.Must(t, s.Do(t.Context(), http.MethodPost, c[0], json.RawMessage(c[1]), nil))
			}
		},
		lease: "scope: {token: true}\nenv: {VAULT_TOKEN: vault_token, KEY: vault_token}\n" + f.broker("as: header; header: X-Vault-Token; value: vault_token"),
		tool:  built(t, "openbao", "openbao"), script: "export VAULT_ADDR=" + f.url() + "\n./tool read secret/app", want: "hello-from-the-server",
		used: "/v1/secret/app", refusal: "403",
	}
}

// sshd is seen through its own log: what the job used never leaves the gateway,
// which signs with it.
func sshd(t *testing.T, _ string) provider {
	dir := t.TempDir()
	ca := filepath.Join(dir, "ca")
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", ca).CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen: %v: %s", err, out)
	}
	public, err := os.ReadFile(ca + ".pub")
	agenttest.Must(t, err)
	s := sshdtest.Start(t, strings.TrimSpace(string(public)), "deploy\n")
	known, err := os.ReadFile(s.KnownHosts())
	agenttest.Must(t, err)
	_, hostKey, _ := strings.Cut(strings.TrimSpace(string(known)), " ")
	addr, err := net.ResolveTCPAddr("tcp", s.Address())
	agenttest.Must(t, err)
	f := &front{name: "fleet.corp", port: addr.Port}
	return provider{
		front: f,
		section: fmt.Sprintf("type: ssh, ca_private_key_file: %s, principals: [deploy], address: '%s', known_hosts: %s, user: root, krl_file: %s",
			ca, s.Address(), s.KnownHosts(), s.List()),
		lease: fmt.Sprintf(`scope: {principals: [deploy]}
files: {id: identity}
env: {KEY: identity}
login:
  - {protocol: ssh, name: %s, port: %d, value: identity, as: root, host-keys: ["%s"], resolve: [127.0.0.1], commands: ["echo *"]}
`, f.name, f.port, hostKey),
		script: fmt.Sprintf("ssh -p %d root@%s echo hello-from-the-fleet", f.port, f.name), want: "hello-from-the-fleet",
		refusal: "unable to authenticate",
		dead: func() error {
			in := regexp.MustCompile(`Accepted publickey for root .*: ED25519-CERT (SHA256:\S+) ID "?mayfly `).FindAllStringSubmatch(s.Log(), -1)
			for _, login := range in {
				if strings.Contains(s.Log(), "Authentication key ED25519-CERT "+login[1]+" revoked by file") {
					return nil
				}
			}
			return fmt.Errorf("none of the %d logins was refused later:\n%s", len(in), s.Log())
		},
	}
}

// refused asks the provider for what it did for the job.
func (p *provider) refused(ctx context.Context) (secret string, err error) {
	if p.dead != nil {
		return "", p.dead()
	}
	s, ok := p.last(p.used)
	if !ok || s.secret() == "" {
		return "", fmt.Errorf("the provider was not asked for %s with a credential: %+v", p.used, p.all())
	}
	status, err := p.again(ctx, s)
	if err == nil && status != http.StatusUnauthorized && status != http.StatusForbidden {
		err = fmt.Errorf("GET %s is answered %d after the job, want a refusal", s.uri, status)
	}
	return s.secret(), err
}
