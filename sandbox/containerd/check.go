package containerd

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/engine"
	"github.com/mayfly-ci/mayfly/sandbox/kernel"
)

// cleanup bounds the destruction of the box that Check makes.
const cleanup = 10 * time.Second

// Check implements sandbox.Runtime. It makes a box of the configured image, reads
// a file of it and destroys it, with each wall that the configuration has. Create looks in the kernel whether containerd did
// what it was asked, so a runtime that passes enforces all of it.
func (r *Runtime) Check(ctx context.Context) ([]sandbox.Claim, error) {
	version, err := r.reach(ctx)
	if err != nil {
		return nil, fmt.Errorf("containerd: check: %w", err)
	}
	base, err := r.pull(r.within(ctx), sandbox.Pull{Image: r.cfg.Image}, engine.Missing)
	if err != nil {
		return nil, fmt.Errorf("containerd: check: image %s: %w", r.cfg.Image, refused(err))
	}
	if _, err := r.try(ctx, sandbox.Kernel, "/etc/resolv.conf"); err != nil {
		return nil, err
	}
	claims := r.claims(version, base.Digest)
	if r.cfg.GVisor.Runsc != "" {
		claims = append(claims, r.runsc.Claim(ctx, func() (string, error) { return r.try(ctx, sandbox.GVisor, "/proc/version") }))
	}
	return claims, nil
}

// try makes a box of the configured image, reads a file of it and destroys it.
func (r *Runtime) try(ctx context.Context, wall sandbox.Isolation, file string) (content string, err error) {
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
	out, err := b.Get(ctx, file, 4096)
	if err != nil {
		return "", fmt.Errorf("containerd: check: %w", err)
	}
	return string(out), nil
}

func (r *Runtime) claims(version, base string) []sandbox.Claim {
	const groups = "a control group of its own, seen in the kernel for each box"
	about := fmt.Sprintf("containerd %s, %s, %s; boxes survive a restart of it", version, r.cfg.Snapshotter, r.cfg.Runtime)
	var all []sandbox.Claim
	for _, c := range [][2]string{
		{"engine", about},
		{"namespaces", "user, mount, pid, network, ipc, uts and cgroup namespaces of its own"},
		{"privileges", "eight capabilities over its own user namespace, no_new_privs"},
		{"system calls", "seccomp allow-list, socket families included"},
		{"network", "loopback only; nothing leaves but through the agent's sockets"},
		{"expiry", "the guest ends at the deadline and when the agent is gone"},
		{"memory limit", groups},
		{"cpu limit", groups},
		{"process limit", groups},
		{"disk limit", "the image below a file system of that size and number of files per box"},
		{"user id range", fmt.Sprintf("%d ids from %d, %d for each box", r.cfg.Slots*kernel.Span, r.cfg.FirstID, kernel.Span)},
		{"base", "the image " + r.cfg.Image + ", " + base + ", copy-on-write"},
		{"images", r.cfg.Images.String()},
	} {
		all = append(all, sandbox.Claim{Name: c[0], Enforced: true, Detail: c[1]})
	}
	return all
}
