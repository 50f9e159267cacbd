package hostile_test

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/test/agenttest"
	"github.com/mayfly-ci/mayfly/test/postgrestest"
)

const secretPolicy = `version: 1
rules:
  - name: all
    match: {trust: local}
    limits: {memory: 256MiB, pids: 64, cpu: 1, disk: 32MiB}
    leases:
      - {name: db, issuer: db, env: {PGUSER: username, PGPASSWORD: password}, files: {db.pass: password}, scope: {schemas: [{name: public, privileges: [usage]}]}}
`

// TestSecretIsNowhere: the password of a job is in the processes of its box, and
// in no argument and no environment of another process, in no file of the agent
// or of the machine's temporary directory, and not in what the agent says, while
// the job runs, when it has ended, and when the agent dies of a signal that makes
// it say where it stood. The agent leaves no core. How often its memory has the
// password after the release is reported (docs/adr/0035).
func TestSecretIsNowhere(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, agenttest.Config{Database: postgrestest.Start(t), Policy: secretPolicy})
	a := w.Start(t)
	id := begins(t, w, w.Workflow(t, "use", "      - run: echo begun; sleep 3600 || true; echo \"$PGPASSWORD\"; sed s/x/x/ /run/mayfly/secrets/db.pass; exit 1\n"))
	password := ""
	sleeper := 0
	agenttest.Eventually(t, time.Minute, "a process of the box has the password", func() bool {
		password, sleeper = valueIn(w, "PGPASSWORD=", "sleep")
		return password != ""
	})
	held := memory(t, a.Pid(), password)
	nowhere(t, w, a, password, "while the job runs")
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", a.Pid()))
	agenttest.Must(t, err)
	if f := strings.Fields(string(limits[bytes.Index(limits, []byte("Max core file size")):])); f[4] != "0" || f[5] != "0" {
		t.Errorf("the agent may leave a core of %s (%s)", f[4], f[5])
	}
	agenttest.Must(t, syscall.Kill(sleeper, syscall.SIGKILL)) // the job goes on
	r := w.Result(t, id, 3*time.Minute)
	if r.Conclusion != providers.Failure {
		t.Errorf("got %+v", r)
	}
	if log := w.Log(t, id); strings.Count(log, "***") < 2 || strings.Contains(log, password) {
		t.Errorf("the job's log: %s", log)
	}
	nowhere(t, w, a, password, "after the job")
	for _, args := range [][]string{{"audit", "show", "--output", "json"}, {"jobs", "--output", "json"}, {"job", r.Name}, {"audit", "explain", r.Name}} {
		if out, _ := w.Run(t, args...); strings.Contains(out, password) {
			t.Errorf("mayfly %v shows the password", args)
		}
	}
	w.Good(t) // the next job's work is in the same memory
	left := memory(t, a.Pid(), password)
	t.Logf("the agent's memory has the password %d times while the job runs, and %d times after the next one", held, left)
	if strings.Contains(runtime.Version(), "runtimesecret") && left > 0 { // agenttest builds the agent as this test is built
		t.Errorf("the build that erases has the password %d times", left)
	}
	a.Signal(t, syscall.SIGQUIT)
	a.Wait(t, time.Minute)
	if !strings.Contains(a.Log(), "goroutine ") {
		t.Error("the agent did not say where it stood")
	}
	nowhere(t, w, a, password, "after a crash")
}

// valueIn is what a variable has in a program that a box runs, and which process
// that is.
func valueIn(w *agenttest.World, variable, program string) (string, int) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return "", 0
	}
	for _, dir := range dirs {
		group, err := os.ReadFile(filepath.Join(dir, "cgroup"))
		if err != nil || !strings.Contains(string(group), w.Cgroup) {
			continue
		}
		environ, err := os.ReadFile(filepath.Join(dir, "environ"))
		name, nerr := os.ReadFile(filepath.Join(dir, "comm"))
		pid, perr := strconv.Atoi(filepath.Base(dir))
		if err != nil || nerr != nil || perr != nil || strings.TrimSpace(string(name)) != program {
			continue
		}
		for kv := range bytes.SplitSeq(environ, []byte{0}) {
			if v, ok := bytes.CutPrefix(kv, []byte(variable)); ok && len(v) > 8 {
				return string(v), pid
			}
		}
	}
	return "", 0
}

// forms are how a secret may be written down.
func forms(secret string) [][]byte {
	return [][]byte{
		[]byte(secret), []byte(base64.StdEncoding.EncodeToString([]byte(secret)))[:len(secret)], []byte(hex.EncodeToString([]byte(secret))),
	}
}

func has(b []byte, secret string) bool {
	for _, f := range forms(secret) {
		if bytes.Contains(b, f) {
			return true
		}
	}
	return false
}

// nowhere looks for a secret in what all processes but those of boxes were
// started with, in what the agent says, and in files.
func nowhere(t *testing.T, w *agenttest.World, a *agenttest.Agent, secret, when string) {
	t.Helper()
	dirs, err := filepath.Glob("/proc/[0-9]*")
	agenttest.Must(t, err)
	seen := 0
	for _, dir := range dirs {
		group, err := os.ReadFile(filepath.Join(dir, "cgroup"))
		args, aerr := os.ReadFile(filepath.Join(dir, "cmdline"))
		environ, eerr := os.ReadFile(filepath.Join(dir, "environ"))
		if err != nil || aerr != nil || eerr != nil {
			continue // it has gone
		}
		seen++
		if has(args, secret) || has(environ, secret) && !strings.Contains(string(group), w.Cgroup) {
			t.Errorf("%s: process %s, %q, was started with the secret", when, filepath.Base(dir), bytes.ReplaceAll(args, []byte{0}, []byte{' '}))
		}
	}
	if has([]byte(a.Log()), secret) {
		t.Errorf("%s: the agent said it", when)
	}
	files := 0
	for _, root := range []string{w.Dir, os.TempDir(), "/run", "/dev/shm"} {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return nil // it has gone, or has no content
			}
			if info, err := d.Info(); err != nil || info.Size() > 64<<20 {
				return nil
			}
			b, err := os.ReadFile(path)
			if files++; err == nil && has(b, secret) {
				t.Errorf("%s: the secret is in %s", when, path)
			}
			return nil
		})
		agenttest.Must(t, err)
	}
	if seen < 2 || files < 10 {
		t.Fatalf("%s: looked at %d processes and %d files only", when, seen, files)
	}
}

// memory counts how often a secret is in what a process can write to.
func memory(t *testing.T, pid int, secret string) int {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	agenttest.Must(t, err)
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	agenttest.Must(t, err)
	defer func() { _ = mem.Close() }()
	n, read := 0, 0
	for line := range strings.Lines(string(maps)) {
		f := strings.Fields(line)
		from, to, ok := strings.Cut(f[0], "-")
		start, serr := strconv.ParseInt(from, 16, 64)
		end, eerr := strconv.ParseInt(to, 16, 64)
		if !ok || serr != nil || eerr != nil || !strings.HasPrefix(f[1], "rw") {
			continue
		}
		const chunk = 4 << 20
		for at := start; at < end; at += chunk {
			b := make([]byte, min(chunk+int64(len(secret))-1, end-at))
			k, _ := mem.ReadAt(b, at)
			read += k
			n += bytes.Count(b[:k], []byte(secret))
		}
	}
	if read < 1<<20 {
		t.Fatalf("read %d bytes of the agent's memory only", read)
	}
	return n
}

// TestAnotherHost: what an agent owed that will not come back is taken back by
// another one, which has a copy of its state and nothing else.
func TestAnotherHost(t *testing.T) {
	t.Parallel()
	db := postgrestest.Start(t)
	w := agenttest.New(t, agenttest.Config{Database: db, Policy: secretPolicy})
	a := w.Start(t)
	begins(t, w, w.Workflow(t, "long", "      - run: test -n \"$PGPASSWORD\"; echo begun; sleep 3600\n"))
	a.Kill()
	copied := filepath.Join(t.TempDir(), "state")
	if out, err := exec.CommandContext(t.Context(), "cp", "-a", w.State, copied).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v: %s", err, out)
	}
	roles := func(w *agenttest.World) []string {
		names, err := agenttest.Query(t.Context(), w, "select rolname from pg_roles where rolname !~ '^pg_' and rolname <> 'postgres'")
		agenttest.Must(t, err)
		return names
	}
	if len(roles(w)) != 1 {
		t.Fatalf("roles of the killed agent: %v", roles(w))
	}
	other := agenttest.New(t, agenttest.Config{Database: db, Policy: secretPolicy, State: copied, Spool: w.Spool})
	if out, code := other.Run(t, "recover"); code != 0 || !strings.Contains(out, "1 jobs of an earlier life released") {
		t.Errorf("recover: status %d: %s", code, out)
	}
	if left := roles(w); len(left) > 0 {
		t.Errorf("roles left: %v", left)
	}
	out, _ := other.Run(t, "audit", "show", "--action", "lease.revoke")
	if !strings.Contains(out, "refusal: ") {
		t.Errorf("no receipt of it: %s", out)
	}
	if out, code := w.Run(t, "recover"); code != 0 { // the first one comes back after all
		t.Errorf("recover at the first host: status %d: %s", code, out)
	}
}
