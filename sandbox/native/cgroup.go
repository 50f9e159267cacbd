package native

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/kernel"
)

// A hierarchy is one version of control groups. A box has one directory per
// controller tree, named after it, so that a name is enough to find all of it.
type hierarchy interface {
	// make creates the groups of a box with its limits.
	make(name string, l sandbox.Limits) error
	// spawn calls start so that the process it starts is born in the groups.
	spawn(name string, start func(*syscall.SysProcAttr) error) error
	// dirs are the directories of a box, whether or not they exist.
	dirs(name string) []string
	// kills is how many processes of the box the kernel killed for memory.
	kills(name string) (int64, error)
}

// period is the CPU accounting period in microseconds, the kernel's default.
const period = 100_000

// setting is a file of a group and what to write to it.
type setting struct {
	file, value string
	optional    bool // the kernel may lack it, and then it limits nothing here
}

func makeGroup(dir string, settings []setting) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return fmt.Errorf("cgroup: %w", err)
	}
	for _, s := range settings {
		p := filepath.Join(dir, s.file)
		f, err := os.OpenFile(p, os.O_WRONLY, 0)
		if s.optional && errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("cgroup: %w", err)
		}
		_, err = f.WriteString(s.value)
		if err := errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("cgroup: set %s to %s: %w", p, s.value, err)
		}
	}
	return nil
}

// v1 is the hierarchy of trees with a controller each.
type v1 struct{ memory, pids, cpu string } // parents of the boxes' groups

func (h v1) dirs(name string) []string {
	return []string{filepath.Join(h.memory, name), filepath.Join(h.pids, name), filepath.Join(h.cpu, name)}
}

func (h v1) make(name string, l sandbox.Limits) error {
	d := h.dirs(name)
	memory := strconv.FormatInt(l.Memory, 10)
	return errors.Join(
		makeGroup(d[0], []setting{
			{file: "memory.limit_in_bytes", value: memory},
			{file: "memory.memsw.limit_in_bytes", value: memory, optional: true}, // only if swap is accounted
		}),
		makeGroup(d[1], []setting{{file: "pids.max", value: strconv.FormatInt(l.Pids, 10)}}),
		makeGroup(d[2], []setting{
			{file: "cpu.cfs_period_us", value: strconv.Itoa(period)},
			{file: "cpu.cfs_quota_us", value: strconv.FormatInt(l.MilliCPU*period/1000, 10)},
		}),
	)
}

// spawn enters the groups with a thread of its own and starts the process from
// there. A thread that moves itself needs no lock over all threads of the
// machine, as moving a process does, and the process is in its groups before
// its first instruction.
func (h v1) spawn(name string, start func(*syscall.SysProcAttr) error) error {
	return kernel.OnThread(func() error {
		for _, d := range h.dirs(name) {
			if err := os.WriteFile(filepath.Join(d, "tasks"), []byte("0"), 0); err != nil {
				return fmt.Errorf("cgroup: %w", err)
			}
		}
		return start(&syscall.SysProcAttr{})
	})
}

func (h v1) kills(name string) (int64, error) {
	return kernel.Counter(filepath.Join(h.memory, name, "memory.oom_control"), "oom_kill")
}

// v2 is the unified hierarchy.
type v2 struct{ parent string }

func (h v2) dirs(name string) []string { return []string{filepath.Join(h.parent, name)} }

func (h v2) make(name string, l sandbox.Limits) error {
	return makeGroup(h.dirs(name)[0], h.settings(l))
}

func (h v2) settings(l sandbox.Limits) []setting {
	return []setting{
		{file: "memory.max", value: strconv.FormatInt(l.Memory, 10)},
		{file: "memory.swap.max", value: "0", optional: true},
		{file: "pids.max", value: strconv.FormatInt(l.Pids, 10)},
		{file: "cpu.max", value: fmt.Sprintf("%d %d", l.MilliCPU*period/1000, period)},
	}
}

// spawn uses CLONE_INTO_CGROUP.
func (h v2) spawn(name string, start func(*syscall.SysProcAttr) error) error {
	f, err := os.Open(h.dirs(name)[0])
	if err != nil {
		return fmt.Errorf("cgroup: %w", err)
	}
	err = start(&syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(f.Fd())})
	return errors.Join(err, f.Close())
}

func (h v2) kills(name string) (int64, error) {
	return kernel.Counter(filepath.Join(h.parent, name, "memory.events"), "oom_kill")
}

// findHierarchy reads a mountinfo file and makes the parent groups.
func findHierarchy(mountinfo []byte, parent string) (hierarchy, error) {
	trees := map[string]string{}
	for scan := bufio.NewScanner(bytes.NewReader(mountinfo)); scan.Scan(); {
		left, right, ok := strings.Cut(scan.Text(), " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if !ok || len(l) < 5 || len(r) < 3 {
			continue
		}
		switch r[0] {
		case "cgroup":
			for option := range strings.SplitSeq(r[2], ",") {
				trees[option] = l[4]
			}
		case "cgroup2":
			trees["2"] = l[4]
		}
	}
	if trees["memory"] != "" && trees["pids"] != "" && trees["cpu"] != "" {
		h := v1{filepath.Join(trees["memory"], parent), filepath.Join(trees["pids"], parent), filepath.Join(trees["cpu"], parent)}
		for _, d := range []string{h.memory, h.pids, h.cpu} {
			if err := os.MkdirAll(d, 0o755); err != nil {
				return nil, fmt.Errorf("cgroup: %w", err)
			}
		}
		return h, nil
	}
	if root := trees["2"]; root != "" {
		return unified(root, parent)
	}
	return nil, fmt.Errorf("cgroup: no memory, pids and cpu controllers are mounted: %w", sandbox.ErrUnsupported)
}

// stepAside moves this process out of dir, if it is in it, into a group below:
// groups with processes in them give no controllers to others. It is in it if a
// service manager delegated dir to it.
func stepAside(dir string) error {
	procs, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if !slices.Contains(strings.Fields(string(procs)), strconv.Itoa(os.Getpid())) {
		return nil
	}
	own := filepath.Join(dir, "agent")
	if err := os.Mkdir(own, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return os.WriteFile(filepath.Join(own, "cgroup.procs"), []byte("0"), 0)
}

// unified makes the parent group of version 2 and turns the controllers on for
// the groups below it.
func unified(root, parent string) (hierarchy, error) {
	h := v2{filepath.Join(root, parent)}
	if err := os.MkdirAll(h.parent, 0o755); err != nil {
		return nil, fmt.Errorf("cgroup: %w", err)
	}
	rest, err := filepath.Rel(root, h.parent)
	if err != nil {
		return nil, fmt.Errorf("cgroup: %w", err)
	}
	dir := root
	for _, part := range append([]string{"."}, strings.Split(rest, "/")...) {
		dir = filepath.Join(dir, part)
		if dir != root {
			if err := stepAside(dir); err != nil {
				return nil, fmt.Errorf("cgroup: %w", err)
			}
		}
		p := filepath.Join(dir, "cgroup.subtree_control")
		if err := os.WriteFile(p, []byte("+memory +pids +cpu"), 0); err != nil {
			return nil, fmt.Errorf("cgroup: turn controllers on: %w: %w", err, sandbox.ErrUnsupported)
		}
	}
	return h, nil
}
