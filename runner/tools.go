package runner

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// Programs that ask for credentials by themselves: at an endpoint, which the
// gateway serves inside of the box while the lease is held, or in a configuration
// that is made for them. What they get is what a variable would have: a placeholder
// of what is brokered.

// Ports of loopback at which AWS's tools ask. Nothing is given a port there by the
// kernel, and few servers choose one.
const (
	firstLocal = 20000
	localPorts = 8000
	localTries = 32
)

// endpoint is the name in the box at which a lease's programs ask.
func endpoint(l policy.Lease) string { return l.Name + "-lease." + egress.Reserved }

// openFor opens the rules of a lease, and what its programs ask.
func (s *steps) openFor(ctx context.Context, name string, o egress.Opening, l policy.Lease, h *holding) error {
	if !l.Serves() {
		return s.cfg.Gateway.Open(ctx, name, o)
	}
	if l.Has(policy.GitHubOIDC) {
		served, err := s.serveOIDC(l, h)
		if err != nil {
			return err
		}
		o.Serve = append(o.Serve, served)
	}
	if !l.Has(policy.AWSContainer) {
		return s.cfg.Gateway.Open(ctx, name, o)
	}
	served, err := s.serveAWS(l, h)
	if err != nil {
		return err
	}
	for try := 1; ; try++ {
		n, err := rand.Int(rand.Reader, big.NewInt(localPorts))
		if err != nil {
			return err
		}
		served.Local = firstLocal + uint16(n.Int64())
		h.env["AWS_CONTAINER_CREDENTIALS_FULL_URI"] = fmt.Sprintf("http://127.0.0.1:%d%s", served.Local, awsPath)
		o := o
		o.Serve = append(slices.Clone(o.Serve), served)
		if err = s.cfg.Gateway.Open(ctx, name, o); !errors.Is(err, syscall.EADDRINUSE) || try == localTries {
			return err
		}
	}
}

// servedAt is the rule of a lease's endpoint.
func (s *steps) servedAt(l policy.Lease, t policy.Tool, port uint16, d *door) egress.Served {
	d.record = func(err error, detail []string) error {
		detail = append([]string{"issuer", l.Issuer, "step", l.Step, "tool", string(t)}, detail...)
		return s.audit(context.Background(), s.log.Job, "lease.ask", leaseName(s.log.Job, l, 0), err, detail...)
	}
	return egress.Served{
		Rule: egress.Rule{ID: "lease " + l.Name, Name: endpoint(l), Port: port, Protocol: egress.HTTP}, Handler: d,
	}
}

func (s *steps) serveOIDC(l policy.Lease, h *holding) (egress.Served, error) {
	asker, ok := s.cfg.Issuers[l.Issuer].(creds.Asker)
	token := h.Values[creds.RequestToken]
	if !ok || token.IsZero() {
		return egress.Served{}, fmt.Errorf("lease %s: issuer %s gives no identity tokens: name one of type oidc", l.Name, l.Issuer)
	}
	maps.Copy(h.env, map[string]string{
		"ACTIONS_ID_TOKEN_REQUEST_URL":   "http://" + endpoint(l) + oidcPath + "?api-version=2.0",
		"ACTIONS_ID_TOKEN_REQUEST_TOKEN": token.Reveal(),
	})
	give := askFor(asker, leaseName(s.log.Job, l, 0), s.out.concealNext, s.out.hide)
	return s.servedAt(l, policy.GitHubOIDC, 80, &door{path: oidcPath, scheme: "Bearer", token: token, give: give}), nil
}

func (s *steps) serveAWS(l policy.Lease, h *holding) (egress.Served, error) {
	token := creds.NewSecret(rand.Text() + rand.Text())
	if err := s.out.conceal(map[string]creds.Secret{"aws": token}); err != nil {
		return egress.Served{}, err
	}
	id, secret, session := l.AWSKey()
	body := map[string]string{
		"AccessKeyId": h.field(l, id), "SecretAccessKey": h.field(l, secret), "Expiration": stamp(h.ExpiresAt),
	}
	if body["AccessKeyId"] == "" || body["SecretAccessKey"] == "" {
		return egress.Served{}, fmt.Errorf("lease %s: tool %s wants %q and %q, which issuer %s does not give", l.Name, policy.AWSContainer, id, secret, l.Issuer)
	}
	if session != "" && h.field(l, session) != "" {
		body["Token"] = h.field(l, session)
	}
	h.env["AWS_CONTAINER_AUTHORIZATION_TOKEN"] = token.Reveal()
	return s.servedAt(l, policy.AWSContainer, 80, &door{path: awsPath, token: token, give: always(body)}), nil
}

// configure makes what git and Docker's tools read.
func (h *holding) configure(l policy.Lease) error {
	auths := map[string]map[string]string{}
	for _, b := range l.Logins() {
		host, user := b.Rule.Name, egress.DefaultUser
		if b.Rule.Port != 443 {
			host += ":" + strconv.Itoa(int(b.Rule.Port))
		}
		if b.User != "" {
			user = h.field(l, b.User)
		}
		password := h.field(l, b.Value)
		auths[host] = map[string]string{"auth": base64.StdEncoding.EncodeToString([]byte(user + ":" + password))}
		if l.Has(policy.GitHelper) {
			if strings.ContainsAny(user+password, "'\n\x00") {
				return fmt.Errorf("lease %s: tool git: the user or the password has a quote or a line's end", l.Name)
			}
			// An empty one first: what else is configured is not asked, and keeps nothing.
			key := "credential.https://" + host + ".helper"
			answer := "!f() { test \"$1\" != get || printf '%s\\n' 'username=" + user + "' 'password=" + password + "'; }; f"
			h.git = append(h.git, [2]string{key, ""}, [2]string{key, answer})
		}
	}
	if l.Has(policy.DockerHelper) {
		b, err := json.Marshal(map[string]any{"auths": auths})
		if err != nil {
			return err
		}
		h.files = map[string]string{dockerFile(l): string(b)}
		h.env["DOCKER_CONFIG"] = secretsDir + "/" + strings.TrimSuffix(dockerFile(l), "/config.json")
	}
	return nil
}

// dockerFile is Docker's configuration, below secretsDir.
func dockerFile(l policy.Lease) string { return "docker-" + l.Name + "/config.json" }

// equip gives a step what the programs of a lease look for. Git's settings are
// joined with those that the job has.
func (h holding) equip(env map[string]string) {
	maps.Copy(env, h.env)
	if len(h.git) == 0 {
		return
	}
	n, err := strconv.Atoi(env["GIT_CONFIG_COUNT"])
	if err != nil || n < 0 {
		n = 0 // what git would not read either
	}
	for _, kv := range h.git {
		env[fmt.Sprintf("GIT_CONFIG_KEY_%d", n)], env[fmt.Sprintf("GIT_CONFIG_VALUE_%d", n)] = kv[0], kv[1]
		n++
	}
	env["GIT_CONFIG_COUNT"] = strconv.Itoa(n)
}
