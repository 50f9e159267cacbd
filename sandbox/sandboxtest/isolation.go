package sandboxtest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/wall"
)

func isolationClauses() []clause {
	return []clause{
		{"no socket reaches the host", "network", checkSockets},
		{"process 1 reaches nothing either", "network", checkLook},
		{"no process of the host is visible", "namespaces", checkProcesses},
		{"no file of the host is visible", "namespaces", checkFiles},
		{"no environment of the host is visible", "namespaces", checkEnviron},
		{"no socket of the host is in the file system", "namespaces", checkSocketFiles},
		{"no privilege can be gained", "privileges", checkNoNewPrivs},
		{"system calls are filtered", "system calls", checkFilter},
		{"no capability over the machine is held", "privileges", checkCapabilities},
		{"a setuid program gains nothing", "user id range", checkSetuid},
		{"a box cannot see another", "namespaces", checkNeighbour},
	}
}

// checkSockets sends a token to every address of the host, in every way that
// reaches it from the host itself, which is tried as well: afterwards, so that
// what the box had sent would have arrived.
func checkSockets(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) (err error) {
		canary, err := ListenHost(ctx)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, canary.Close()) }()
		inside := token()
		for i, t := range canary.Targets() {
			mine, own := fmt.Sprintf("%s-%d.", inside, i), fmt.Sprintf("%s-%d.", token(), i)
			r := b.probe(ctx, "connect", t.Network, t.Address, mine)
			if r.err != nil || r.exit.Code > 1 && r.exit.Signal == 0 {
				return fmt.Errorf("probe: got %v", r)
			}
			if err := send(ctx, t, own); err != nil {
				return fmt.Errorf("the host itself does not reach %v, so this clause would say nothing: %w", t, err)
			}
			if err := eventually(ctx, time.Minute, fmt.Sprintf("the host's own token at %v", t), func() bool { return canary.Reached(own) }); err != nil {
				return err
			}
			if canary.Reached(mine) {
				return fmt.Errorf("the box reaches %v of the host", t)
			}
		}
		if canary.Reached(inside) {
			return errors.New("the box reaches the host")
		}
		return nil
	})
}

// checkLook has process 1 try what the agent has it try before each job.
func checkLook(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) (err error) {
		canary, err := wall.Listen(ctx)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, canary.Close()) }()
		prober, ok := b.Sandbox.(sandbox.Prober)
		if !ok {
			return errors.New("the box is no Prober")
		}
		for _, bad := range [][]sandbox.Attempt{make([]sandbox.Attempt, 1), {{Network: "tcp"}}, {{Network: "carrier pigeon"}}} {
			if _, err := prober.Probe(ctx, bad); err == nil || errors.Is(err, sandbox.ErrDied) {
				return fmt.Errorf("probe %+v: got %v, want an error, and the box alive", bad, err)
			}
		}
		_, err = wall.NewLook().Run(ctx, b.Sandbox, wall.Options{Canary: canary})
		return err
	})
}

// send reaches a target as anybody on the host does.
func send(ctx context.Context, t Target, text string) error {
	conn, err := (&net.Dialer{Timeout: time.Minute}).DialContext(ctx, t.Network, t.Address)
	if err != nil {
		return err
	}
	message := []byte(text)
	if strings.HasPrefix(t.Network, "ip") {
		message = append([]byte{0, 1, 0, 0, 0, 0, 0, 0}, message...) // of no ICMP type that is answered
	}
	_, err = conn.Write(message)
	return errors.Join(err, conn.Close())
}

func checkProcesses(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) (err error) {
		mark := token()
		cmd := exec.CommandContext(ctx, "/bin/sh", "-c", "read line", "sh", mark)
		stdin, err := cmd.StdinPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			return fmt.Errorf("a process of the host: %w", err)
		}
		defer func() {
			err = errors.Join(err, stdin.Close())
			_ = cmd.Wait() // the shell fails for want of a line
		}()
		if err := eventually(ctx, time.Minute, "a process of the host seen by the host", func() bool { return len(hostPids(mark)) > 0 }); err != nil {
			return err
		}
		// Encoded, so that the search does not find itself.
		r := b.script(ctx, `ls -d /proc/[0-9]* | wc -l; for p in /proc/[0-9]*; do tr '\000' '\n' < $p/cmdline; done 2>/dev/null`)
		if err := r.succeeded(); err != nil {
			return err
		}
		if strings.Contains(r.out, mark) {
			return errors.New("the box sees the arguments of a process of the host")
		}
		pid := strconv.Itoa(cmd.Process.Pid)
		return wrap("kill a process of the host", b.probe(ctx, "kill", pid, mark).refused())
	})
}

// checkFiles makes files with a name of their own where a host has secrets.
func checkFiles(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) (err error) {
		mark := "mayfly-canary-" + token()
		made := 0
		for _, dir := range []string{os.TempDir(), "/var/tmp", "/root", "/home", "/usr/local/etc", "/var/lib"} {
			p := filepath.Join(dir, mark)
			if os.WriteFile(p, []byte(mark), 0o644) != nil {
				continue // an ordinary user's host has fewer
			}
			made++
			defer func() { err = errors.Join(err, os.Remove(p)) }()
		}
		if made == 0 {
			return errors.New("the host lets us make no file, so this clause would say nothing")
		}
		return b.probe(ctx, "find", mark).refused()
	})
}

func checkEnviron(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		r := b.script(ctx, `for p in /proc/[0-9]*; do tr '\000' '\n' < $p/environ; done 2>/dev/null; true`)
		if err := r.succeeded(); err != nil {
			return err
		}
		given := shell("").Env[0]
		for line := range strings.Lines(r.out) {
			name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
			if had, ok := os.LookupEnv(name); ok && had == value && strings.TrimSpace(line) != given && name != "PWD" {
				return fmt.Errorf("the box sees %s of the host", name)
			}
		}
		// The guest's own is nobody's business, not even if it is empty.
		return wrap("environment of process 1", b.probe(ctx, "open", "/proc/1/environ").refused())
	})
}

func checkSocketFiles(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		if err := b.probe(ctx, "sockets").refused(); err != nil {
			return err
		}
		for _, p := range []string{"/var/run/docker.sock", "/run/docker.sock", "/run/containerd/containerd.sock"} {
			if err := b.probe(ctx, "connect", "unix", p, "x").refused(); err != nil {
				return err
			}
		}
		return nil
	})
}

// status is a line of /proc/PID/status.
func (b *box) status(ctx context.Context, pid, key string) (string, error) {
	r := b.probe(ctx, "status", pid)
	if err := r.succeeded(); err != nil {
		return "", err
	}
	for line := range strings.Lines(r.out) {
		if value, ok := strings.CutPrefix(line, key+":"); ok {
			return strings.TrimSpace(value), nil
		}
	}
	return "", fmt.Errorf("status of process %s has no %s", pid, key)
}

// holds wants a line of the status of a step and of process 1 to be so.
func (h Harness) holds(ctx context.Context, key string, ok func(value string) bool) error {
	return h.within(ctx, func(b *box) error {
		for _, pid := range []string{"self", "1"} {
			value, err := b.status(ctx, pid, key)
			if err != nil {
				return err
			}
			if !ok(value) {
				return fmt.Errorf("process %s has %s %s", pid, key, value)
			}
		}
		return nil
	})
}

func checkNoNewPrivs(ctx context.Context, h Harness) error {
	return h.holds(ctx, "NoNewPrivs", func(v string) bool { return v == "1" })
}

func checkFilter(ctx context.Context, h Harness) error {
	return h.holds(ctx, "Seccomp", func(v string) bool { return v == "2" })
}

// allowedCaps are those that a build needs, over the box's own user namespace:
// CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID, NET_BIND_SERVICE
// (linux/capability.h).
const allowedCaps = 1<<0 | 1<<1 | 1<<3 | 1<<4 | 1<<5 | 1<<6 | 1<<7 | 1<<10

func checkCapabilities(ctx context.Context, h Harness) error {
	for _, set := range []string{"CapBnd", "CapEff", "CapPrm", "CapInh", "CapAmb"} {
		err := h.holds(ctx, set, func(v string) bool {
			bits, err := strconv.ParseUint(v, 16, 64)
			return err == nil && bits&^allowedCaps == 0
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func checkSetuid(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		const program, file = sandbox.Workspace + "/su", sandbox.Workspace + "/roots"
		if err := b.probe(ctx, "copy", program, file).succeeded(); err != nil {
			return err
		}
		// Somebody else can run it at all, and what he may not read is there.
		if err := b.probe(ctx, "setuid", program, "/etc/passwd", "root").succeeded(); err != nil {
			return err
		}
		if err := b.probe(ctx, "read", file, "root's own").succeeded(); err != nil {
			return err
		}
		return b.probe(ctx, "setuid", program, file, "root's own").refused()
	})
}

func checkNeighbour(ctx context.Context, h Harness) error {
	return h.within(ctx, func(first *box) error {
		mark := token()
		if err := first.run(ctx, shell(`for d in /workspace /tmp /var/tmp /root /run/mayfly /dev/shm; do echo secret > $d/"$1"; done; `+daemons, mark)).succeeded(); err != nil {
			return err
		}
		if err := first.probe(ctx, "find", mark).succeeded(); err != nil {
			return fmt.Errorf("the box itself: %w", err)
		}
		return h.within(ctx, func(second *box) error {
			if r := second.script(ctx, `cat /proc/[0-9]*/cmdline`); strings.Contains(r.out, mark) {
				return errors.New("a process of another box is visible")
			}
			return wrap("a file of another box", second.probe(ctx, "find", mark).refused())
		})
	})
}
