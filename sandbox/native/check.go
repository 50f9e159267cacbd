package native

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/kernel"
)

// cleanup bounds the destruction of the box that Check makes.
const cleanup = 10 * time.Second

// Check implements sandbox.Runtime. It makes a box, runs a program in it and
// destroys it, with each wall that the configuration has. So a runtime that passes
// has everything that Create needs, and the base is ready for the first job.
func (r *Runtime) Check(ctx context.Context) ([]sandbox.Claim, error) {
	for _, link := range []string{"/bin", "/sbin", "/lib"} {
		if to, err := os.Readlink(link); err != nil || strings.TrimPrefix(to, "/") != "usr"+link {
			return nil, fmt.Errorf("native: %s is not a link into /usr, and boxes have the host's /usr only: %w", link, sandbox.ErrUnsupported)
		}
	}
	if _, err := r.try(ctx, sandbox.Kernel, "/bin/true"); err != nil {
		return nil, err
	}
	claims := r.claims()
	if r.cfg.GVisor.Runsc != "" {
		claims = append(claims, r.checkGVisor(ctx))
	}
	return claims, nil
}

// try makes a box, runs a program in it for what it prints, and destroys it.
func (r *Runtime) try(ctx context.Context, wall sandbox.Isolation, args ...string) (out string, err error) {
	name := sandbox.CheckPrefix + strings.ToLower(rand.Text())
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanup)
		defer cancel()
		err = errors.Join(err, r.Destroy(ctx, name))
	}()
	b, err := r.Create(ctx, name, sandbox.Spec{
		Labels:    sandbox.Labels{Owner: r.cfg.Owner},
		Isolation: wall,
		Expires:   time.Now().Add(time.Minute),
	})
	if err != nil {
		return "", err
	}
	var said strings.Builder
	exit, err := b.Run(ctx, sandbox.Process{Args: args, Stdout: func(_ time.Time, p []byte) error {
		said.Write(p)
		return nil
	}})
	if err != nil {
		return "", fmt.Errorf("native: check: %w", err)
	}
	if exit.Code != 0 {
		return "", fmt.Errorf("native: check: %s ended with %d", args[0], exit.Code)
	}
	return said.String(), nil
}

func (r *Runtime) claims() []sandbox.Claim {
	claims := []sandbox.Claim{
		{Name: "namespaces", Enforced: true, Detail: "user, mount, pid, network, ipc, uts and cgroup namespaces of its own"},
		{Name: "privileges", Enforced: true, Detail: "eight capabilities over its own user namespace, no_new_privs"},
		{Name: "system calls", Enforced: true, Detail: "seccomp allow-list, socket families included"},
		{Name: "network", Enforced: true, Detail: "loopback only; nothing leaves but through the agent's sockets"},
		{Name: "expiry", Enforced: true, Detail: "the guest ends at the deadline and when the agent is gone"},
	}
	if r.cfg.Unprivileged {
		return append(claims,
			sandbox.Claim{Name: "memory limit", Detail: "not enforced without root: a job can use up the memory of the host; run the agent as root"},
			sandbox.Claim{Name: "cpu limit", Detail: "not enforced without root: a job can use all cores; run the agent as root"},
			sandbox.Claim{Name: "process limit", Enforced: true, Detail: "RLIMIT_NPROC in the box's user namespace"},
			sandbox.Claim{Name: "disk limit", Enforced: true, Detail: "the box's disk is a tmpfs of that size and number of files; what it holds is memory of the host"},
			sandbox.Claim{Name: "user id range", Detail: "the box runs with the agent's own user id outside; run the agent as root"},
			sandbox.Claim{Name: "base", Detail: "/usr and /etc are read-only: packages cannot be installed; run the agent as root"})
	}
	version, note := "1", ""
	if _, ok := r.groups.(v2); ok {
		version, note = "2", "; version 2 has been tested on recorded files only"
	}
	groups := "control groups version " + version + note
	return append(claims,
		sandbox.Claim{Name: "memory limit", Enforced: true, Detail: groups},
		sandbox.Claim{Name: "cpu limit", Enforced: true, Detail: groups},
		sandbox.Claim{Name: "process limit", Enforced: true, Detail: groups},
		sandbox.Claim{Name: "disk limit", Enforced: true, Detail: "a file system of that size and number of files per box"},
		sandbox.Claim{Name: "user id range", Enforced: true, Detail: fmt.Sprintf("%d ids from %d, %d for each box", r.cfg.Slots*kernel.Span, r.cfg.FirstID, kernel.Span)},
		sandbox.Claim{Name: "base", Enforced: true, Detail: "/usr, /etc and the package database, copy-on-write"})
}
