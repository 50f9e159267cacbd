package docker

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/docker/docker/api/types/system"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/engine"
)

// cleanup bounds the destruction of the box that Check makes.
const cleanup = 10 * time.Second

// Check implements sandbox.Runtime. It makes a box of the configured image, reads
// a file of it and destroys it, with each wall that the configuration has. Create looks in the kernel whether the engine
// did what it was asked, so a runtime that passes enforces all of it.
func (r *Runtime) Check(ctx context.Context) ([]sandbox.Claim, error) {
	if err := r.reach(ctx); err != nil {
		return nil, fmt.Errorf("docker: check: %w", err)
	}
	info, err := r.engine.Info(ctx)
	if err != nil {
		return nil, fmt.Errorf("docker: check: %w", err)
	}
	if missing := unlimited(info); len(missing) > 0 {
		return missing, fmt.Errorf("docker: the daemon cannot limit containers, and boxes without limits are not made: %w", sandbox.ErrUnsupported)
	}
	// What is there is not asked for here, whatever Pull says: a registry that is
	// away keeps no agent from starting.
	base, err := r.pull(ctx, sandbox.Pull{Image: r.cfg.Image}, engine.Missing)
	if err != nil {
		return nil, fmt.Errorf("docker: check: image %s: %w", r.cfg.Image, err)
	}
	_, uid, err := r.try(ctx, sandbox.Kernel, base, "/etc/resolv.conf")
	if err != nil {
		return nil, err
	}
	claims := r.claims(info, uid, base)
	if r.cfg.GVisor.Runsc != "" {
		claims = append(claims, r.runsc.Claim(ctx, func() (string, error) {
			version, _, err := r.try(ctx, sandbox.GVisor, base, "/proc/version")
			return version, err
		}))
	}
	return claims, nil
}

// try makes a box of the configured image, reads a file of it, sees who root of it
// is outside, and destroys it.
func (r *Runtime) try(ctx context.Context, wall sandbox.Isolation, base sandbox.Image, file string) (content string, uid int, err error) {
	name := sandbox.CheckPrefix + strings.ToLower(rand.Text())
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanup)
		defer cancel()
		err = errors.Join(err, r.Destroy(ctx, name))
	}()
	b, err := r.Create(ctx, name, sandbox.Spec{
		Labels:    sandbox.Labels{Owner: r.cfg.Owner},
		Image:     base.Ref,
		Isolation: wall,
		Expires:   time.Now().Add(time.Minute),
	})
	if err != nil {
		return "", 0, err
	}
	out, err := b.Get(ctx, file, 4096)
	if err == nil {
		uid, _, err = b.(*engine.Box).Process.Root()
	}
	if err != nil {
		return "", 0, fmt.Errorf("docker: check: %w", err)
	}
	return string(out), uid, nil
}

// unlimited are the claims that do not hold because the daemon has no control
// groups, as one without root on version 1.
func unlimited(info system.Info) []sandbox.Claim {
	const what = "not enforced by this daemon (%s): run one as root, with control groups"
	why := fmt.Sprintf(what, "cgroup driver "+info.CgroupDriver+" "+info.CgroupVersion)
	var out []sandbox.Claim
	for _, c := range []struct {
		name string
		has  bool
	}{{"memory limit", info.MemoryLimit}, {"cpu limit", info.CPUCfsQuota}, {"process limit", info.PidsLimit}} {
		if !c.has || info.CgroupDriver == "none" {
			out = append(out, sandbox.Claim{Name: c.name, Detail: why})
		}
	}
	return out
}

func (r *Runtime) claims(info system.Info, uid int, base sandbox.Image) []sandbox.Claim {
	about := fmt.Sprintf("Docker %s, %s", info.ServerVersion, info.Driver)
	groups := fmt.Sprintf("control groups version %s, seen in the kernel for each box", info.CgroupVersion)
	ids := sandbox.Claim{Name: "user id range", Detail: "root of a box is root outside, without its capabilities: start the daemon with userns-remap"}
	if uid != 0 {
		ids.Enforced = true
		ids.Detail = fmt.Sprintf("a user namespace from id %d, one for all boxes of the daemon", uid)
	}
	life := "a restart of the daemon ends the boxes: live-restore in its configuration keeps them"
	if info.LiveRestoreEnabled {
		life = "boxes survive a restart of the daemon"
	}
	how := "seccomp allow-list, socket families included"
	if slices.Contains(info.SecurityOptions, "name=apparmor") {
		how += "; and AppArmor"
	}
	return []sandbox.Claim{
		{Name: "engine", Enforced: true, Detail: about + "; " + life},
		{Name: "namespaces", Enforced: true, Detail: "mount, pid, network, ipc, uts and cgroup namespaces of its own"},
		{Name: "privileges", Enforced: true, Detail: "eight capabilities, no_new_privs"},
		{Name: "system calls", Enforced: true, Detail: how},
		{Name: "network", Enforced: true, Detail: "loopback only; nothing leaves but through the agent's sockets"},
		{Name: "expiry", Enforced: true, Detail: "the guest ends at the deadline and when the agent is gone"},
		{Name: "memory limit", Enforced: true, Detail: groups},
		{Name: "cpu limit", Enforced: true, Detail: groups},
		{Name: "process limit", Enforced: true, Detail: groups},
		{Name: "disk limit", Enforced: true, Detail: "the image below a file system of that size and number of files per box"},
		ids,
		{Name: "base", Enforced: true, Detail: "the image " + r.cfg.Image + ", " + base.Digest + ", copy-on-write"},
		{Name: "images", Enforced: true, Detail: r.cfg.Images.String()},
	}
}
