package runner

import (
	"bytes"
	"context"
	"fmt"
	"slices"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// knownHosts is where OpenSSH looks for the keys of hosts, for all users.
const knownHosts = "/etc/ssh/ssh_known_hosts"

// introduce has the programs of a box know the host key of its gateway, which it
// shows for each SSH destination: the destination's own is pinned in the policy,
// and looked at by the gateway. What the image says of other hosts stays.
func (l *life) introduce(ctx context.Context, box sandbox.Sandbox, image *sandbox.Image, gateway string, rules []egress.Rule) error {
	if slices.ContainsFunc(rules, func(r egress.Rule) bool { return r.Protocol == egress.Postgres }) {
		// libpq looks at no bundle of the system's.
		image.Env = append(slices.Clone(image.Env), "PGSSLROOTCERT="+sandbox.Run+"/"+authorityFile)
	}
	rules = slices.DeleteFunc(slices.Clone(rules), func(r egress.Rule) bool { return r.Protocol != egress.SSH })
	if len(rules) == 0 {
		return nil
	}
	h, ok := l.cfg.Gateway.(egress.Host)
	if !ok {
		return fmt.Errorf("host key of the job: the gateway ends no SSH, which a rule for %s needs", rules[0].Name)
	}
	key, err := h.HostKey(gateway)
	if err != nil {
		return fmt.Errorf("host key of the job: %w", err)
	}
	found, err := present(ctx, box, knownHosts)
	if err != nil {
		return err
	}
	var b bytes.Buffer
	for _, r := range rules {
		name := r.Name
		if r.Port != 22 {
			name = fmt.Sprintf("[%s]:%d", r.Name, r.Port)
		}
		fmt.Fprintf(&b, "%s %s\n", name, key)
	}
	b.Write(found)
	if err := putFiles(ctx, box, map[string][]byte{knownHosts: b.Bytes()}); err != nil {
		return fmt.Errorf("host key of the job: %w", err)
	}
	// For programs that read no file of the system's, of those that look at it.
	image.Env = append(slices.Clone(image.Env), "SSH_KNOWN_HOSTS="+knownHosts)
	return nil
}
