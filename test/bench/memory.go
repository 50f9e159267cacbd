package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/local"
)

const mib = 1 << 20

// settling is how long an agent or a box is left alone before its memory is
// read: Go returns memory to the kernel in the background.
const settling = 3 * time.Second

// memory compares boxes in which a job sleeps with a sleep in a control group
// of its own. A control group's usage includes the kernel's memory for it. What
// nobody is charged for shows in what the machine has left.
func memory(ctx context.Context, w *world, t *table) (err error) {
	a, err := w.start("idle", idleBoxes, "")
	if err != nil {
		return err
	}
	if _, err := a.run(ctx, "true.yml"); err != nil {
		return err
	}
	alone, err := sleepAlone(ctx)
	if err != nil {
		return err
	}
	var beyond, left []float64
	for range idleRounds {
		if err := pause(ctx, settling); err != nil {
			return err
		}
		before, err := available()
		if err != nil {
			return err
		}
		usages, after, err := a.idle(ctx)
		if err != nil {
			return err
		}
		left = append(left, (before-after)/idleBoxes)
		for _, u := range usages {
			beyond = append(beyond, u-alone)
		}
	}
	t.most(4, "memory of an idle box beyond the job's own, kernel's included", "MiB", beyond...)
	t.info("  the job's own: sleep in a control group", "MiB", alone)
	t.info("  what a box takes from the machine's MemAvailable, the job's own included", "MiB", left...)
	return a.stop()
}

// idle fills the slots with boxes that sleep, and returns what each is charged
// for and what the machine has left.
func (a *agent) idle(ctx context.Context) (usages []float64, left float64, err error) {
	var ids []string
	for range idleBoxes {
		id, err := a.submit("sleep.yml")
		if err != nil {
			return nil, 0, err
		}
		ids = append(ids, id)
	}
	defer func() {
		for _, id := range ids {
			err = errors.Join(err, local.Cancel(a.spool(), id))
		}
		for _, id := range ids {
			r, werr := local.Wait(ctx, a.spool(), id)
			if werr == nil && r.Conclusion != providers.Cancelled {
				werr = fmt.Errorf("job %s: %s: %s", id, r.Conclusion, r.Reason)
			}
			err = errors.Join(err, werr)
		}
	}()
	var groups []string
	err = until(ctx, "eight boxes sleep", func() (bool, error) {
		groups, err = a.sleeping()
		return len(groups) == idleBoxes, err
	})
	if err == nil {
		err = pause(ctx, settling)
	}
	for _, g := range groups {
		u, uerr := usage(g)
		usages, err = append(usages, u), errors.Join(err, uerr)
	}
	left, lerr := available()
	return usages, left, errors.Join(err, lerr)
}

// sleeping are the control groups of the agent's boxes whose step has begun.
func (a *agent) sleeping() ([]string, error) {
	claims, err := os.ReadDir(filepath.Join(a.spool(), "claimed"))
	if err != nil {
		return nil, err
	}
	var groups []string
	for _, c := range claims {
		for _, parent := range []string{"/sys/fs/cgroup/memory", "/sys/fs/cgroup"} {
			found, err := filepath.Glob(parent + "/mayfly/*/" + c.Name() + "-box")
			if err != nil || len(found) == 0 {
				continue
			}
			if has(found[0], "sleep") {
				groups = append(groups, found[0])
			}
			break
		}
	}
	return groups, nil
}

// has says whether a program of that name runs in a control group.
func has(group, name string) bool {
	pids, err := os.ReadFile(group + "/cgroup.procs")
	if err != nil {
		return false
	}
	for _, pid := range strings.Fields(string(pids)) {
		comm, err := os.ReadFile("/proc/" + pid + "/comm")
		if err == nil && strings.TrimSpace(string(comm)) == name {
			return true
		}
	}
	return false
}

// usage is what a control group is charged for, in MiB.
func usage(group string) (float64, error) {
	for _, file := range []string{"memory.usage_in_bytes", "memory.current"} {
		b, err := os.ReadFile(filepath.Join(group, file))
		if err == nil {
			n, err := strconv.ParseFloat(strings.TrimSpace(string(b)), 64)
			return n / mib, err
		}
	}
	return 0, fmt.Errorf("control group %s: no memory usage", group)
}

// sleepAlone is what the job itself takes.
func sleepAlone(ctx context.Context) (used float64, err error) {
	parent := "/sys/fs/cgroup"
	if _, err := os.Stat(parent + "/memory"); err == nil {
		parent += "/memory"
	}
	group := fmt.Sprintf("%s/mayfly-bench-%d", parent, os.Getpid())
	if err := os.Mkdir(group, 0o755); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.Remove(group)) }()
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", "echo $$ >"+group+"/cgroup.procs && exec sleep 1000")
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	defer func() {
		err = errors.Join(err, cmd.Process.Kill())
		_ = cmd.Wait() // it was killed
	}()
	err = until(ctx, "sleep runs", func() (bool, error) { return has(group, "sleep"), nil })
	if err == nil {
		err = pause(ctx, settling)
	}
	if err != nil {
		return 0, err
	}
	return usage(group)
}

// available is what the machine has left, in MiB.
func available() (float64, error) {
	return field("/proc/meminfo", "MemAvailable:")
}

// idleRSS is the agent's resident memory after a while without work, in MiB, and
// what of it is no page of a file.
func idleRSS(ctx context.Context, a *agent) (all, own float64, err error) {
	if err := pause(ctx, settling); err != nil {
		return 0, 0, err
	}
	status := fmt.Sprintf("/proc/%d/status", a.cmd.Process.Pid)
	all, aerr := field(status, "VmRSS:")
	own, oerr := field(status, "RssAnon:")
	return all, own, errors.Join(aerr, oerr)
}

// cpu is the processor time of a process and of all that it has waited for, and
// so of the processes of its boxes (proc_pid_stat(5), fields 14 to 17). What
// the kernel does behind their back is not part of it.
func cpu(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	words := strings.Fields(rest)
	if len(words) < 15 {
		return 0, fmt.Errorf("stat of process %d is malformed", pid)
	}
	var ticks int64
	for _, w := range words[11:15] {
		n, err := strconv.ParseInt(w, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("stat of process %d: %w", pid, err)
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond, nil // USER_HZ is 100
}

// field is a line "name number kB" of a file of /proc, in MiB.
func field(file, name string) (float64, error) {
	f, err := os.Open(file)
	if err != nil {
		return 0, err
	}
	defer f.Close() // read only
	for s := bufio.NewScanner(f); s.Scan(); {
		if w := strings.Fields(s.Text()); len(w) == 3 && w[0] == name {
			n, err := strconv.ParseFloat(w[1], 64)
			return n * 1024 / mib, err
		}
	}
	return 0, fmt.Errorf("%s: no %s", file, name)
}

func binarySize(w *world, t *table) error {
	info, err := os.Stat(w.bin)
	if err != nil {
		return err
	}
	t.most(40, "binary", "MiB", float64(info.Size())/mib)
	return nil
}

// until asks until done, for a minute at most.
func until(ctx context.Context, what string, done func() (bool, error)) error {
	for range 6000 {
		if ok, err := done(); ok || err != nil {
			return err
		}
		if err := pause(ctx, 10*time.Millisecond); err != nil {
			return err
		}
	}
	return fmt.Errorf("not within a minute: %s", what)
}

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
