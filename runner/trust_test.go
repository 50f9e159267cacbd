package runner_test

import (
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/policy"
)

// authorityText is what the gateway of a world says is a job's authority.
const authorityText = "-----BEGIN CERTIFICATE-----\nbWF5Zmx5\n-----END CERTIFICATE-----\n"

// Authority implements egress.Terminator.
func (g *worldGateway) Authority(name string) ([]byte, error) {
	if err := (*world)(g).note("authority", name); err != nil {
		return nil, err
	}
	return []byte(authorityText), nil
}

// withPolicy gives the agent another policy.
func withPolicy(t *testing.T, text string) func(*runner.Config) {
	t.Helper()
	return func(c *runner.Config) {
		p, err := policy.Parse([]byte(text), "policy.yaml")
		if err != nil {
			t.Fatal(err)
		}
		c.Policy = p
	}
}

const httpsPolicy = `version: 1
rules:
  - name: all
    match: {trust: [local]}
    egress:
      - {name: deploy.example, port: 443, protocol: https, step: deploy}
      - {name: absent.example, port: 443, protocol: https, step: absent}
`

// TestTrust: the box of a job with an https rule, for whatever step of it, trusts
// the authority, and its steps may say otherwise.
func TestTrust(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const bundle = "/etc/ssl/certs/ca-certificates.crt"
	w.files = map[string]string{bundle: "-----BEGIN CERTIFICATE-----\nc3lzdGVt\n-----END CERTIFICATE-----\n"}
	w.run(lifetime(t), withPolicy(t, httpsPolicy),
		providers.Step{ID: "deploy", Run: "env SSL_CERT_FILE\nenv NODE_EXTRA_CA_CERTS\nenv PIP_CERT", Env: providers.Env{Vars: map[string]string{"PIP_CERT": "mine"}}})
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, want := range []string{bundle + "\n", "/run/mayfly/ca.pem\n", "mine\n"} {
		if !strings.Contains(w.log.String(), want) {
			t.Errorf("got log %q, want %q", w.log.String(), want)
		}
	}
	if got := strings.Join(w.order, " "); !strings.Contains(got, "attach box.probe authority") {
		t.Errorf("got order %q, want the authority once the box has been looked at", got)
	}
}

// TestNoTrust: a job that has no https rule for a step of its own has no
// authority, and no variables.
func TestNoTrust(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run(lifetime(t), withPolicy(t, httpsPolicy), providers.Step{ID: "other", Run: "print [\nenv SSL_CERT_FILE\nprint ]"})
	w.mu.Lock()
	defer w.mu.Unlock()
	if got := strings.Join(w.order, " "); strings.Contains(got, "authority") || !strings.Contains(w.log.String(), "[\n\n]\n") {
		t.Errorf("got order %q and log %q, want no authority", got, w.log.String())
	}
}
