package engine

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/kernel"
)

// period is the CPU accounting period in microseconds, which the engine leaves
// at the kernel's default.
const period = 100_000

// groups are the control groups of a container, as directories of the host. The
// unified hierarchy has the same one for all controllers.
type groups struct{ memory, pids, cpu string }

// groups finds them, wherever the daemon puts them.
func (p *Process) groups() (groups, error) {
	own, err := os.ReadFile(proc(p.pid, "cgroup"))
	mounts, mountErr := os.ReadFile("/proc/self/mountinfo")
	if err := errors.Join(err, mountErr); err != nil {
		return groups{}, fmt.Errorf("control groups: %w", err)
	}
	return findGroups(string(own), string(mounts))
}

// findGroups reads cgroup of a process (cgroups(7)) and mountinfo (proc(5)).
func findGroups(own, mounts string) (groups, error) {
	at := map[string]string{} // controller, or "" for the unified hierarchy
	for line := range strings.Lines(own) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 {
			continue
		}
		for controller := range strings.SplitSeq(f[1], ",") {
			at[controller] = f[2]
		}
	}
	found := map[string]string{} // a path that begins with /.. is out of our reach
	for line := range strings.Lines(mounts) {
		left, right, _ := strings.Cut(line, " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if len(l) < 5 || len(r) < 3 || r[0] != "cgroup" && r[0] != "cgroup2" {
			continue
		}
		controllers := append(strings.Split(r[2], ","), "")
		if r[0] == "cgroup" {
			controllers = controllers[:len(controllers)-1]
		}
		for _, c := range controllers {
			path, ok := at[c]
			rel, err := filepath.Rel(l[3], path)
			if ok && err == nil && !strings.HasPrefix(path, "/..") && filepath.IsLocal(rel) && found[c] == "" {
				found[c] = filepath.Join(l[4], rel)
			}
		}
	}
	g := groups{found["memory"], found["pids"], found["cpu"]}
	if g.memory == "" && g.pids == "" && g.cpu == "" {
		g = groups{found[""], found[""], found[""]}
	}
	if g.memory == "" || g.pids == "" || g.cpu == "" {
		return g, fmt.Errorf("control groups: the container has none for memory, pids and cpu: %w", sandbox.ErrUnsupported)
	}
	return g, nil
}

// limited looks in the kernel whether the limits are in force: a daemon without
// control groups accepts them without a word.
func (g groups) limited(l sandbox.Limits) error {
	quota := l.MilliCPU * period / 1000
	for _, want := range []struct {
		what, dir, v1, v2 string
		most              int64
	}{
		{"memory", g.memory, "memory.limit_in_bytes", "memory.max", l.Memory},
		{"processes", g.pids, "pids.max", "pids.max", l.Pids},
		{"cpu", g.cpu, "cpu.cfs_quota_us", "cpu.max", quota},
	} {
		b, err := os.ReadFile(filepath.Join(want.dir, want.v1))
		if errors.Is(err, fs.ErrNotExist) {
			b, err = os.ReadFile(filepath.Join(want.dir, want.v2))
		}
		if err != nil {
			return fmt.Errorf("control groups: %w", err)
		}
		word, _, _ := strings.Cut(strings.TrimSpace(string(b)), " ")
		if n, err := strconv.ParseInt(word, 10, 64); err != nil || n < 0 || n > want.most {
			return fmt.Errorf("limit of %s is %q in the kernel, want at most %d: the daemon cannot limit containers: %w", want.what, word, want.most, sandbox.ErrUnsupported)
		}
	}
	return nil
}

// kills is how many processes of the box the kernel killed for memory.
func (g groups) kills() (int64, error) {
	n, err := kernel.Counter(filepath.Join(g.memory, "memory.oom_control"), "oom_kill")
	if errors.Is(err, fs.ErrNotExist) {
		return kernel.Counter(filepath.Join(g.memory, "memory.events"), "oom_kill")
	}
	return n, err
}
