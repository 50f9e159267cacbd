package agenttest

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"
)

// A Clock is what an agent and its boxes take for the time of day. The machine's
// own is everybody's, and no namespace has one of its own.
type Clock struct {
	file string
}

// The standard library's clock, made to jump. The tests of the whole want the
// program as it is, so this is an overlay of one build and no seam in it.
const (
	jumpTime = `package time

import "sync/atomic"

// Jump is how many seconds Now is ahead.
var Jump atomic.Int64
`
	jumpMain = `package main

import (
	"os"
	"strconv"
	"time"
)

func init() {
	look := func() {
		b, _ := os.ReadFile(%FILE%)
		if n, err := strconv.ParseInt(string(b), 10, 64); err == nil {
			time.Jump.Store(n)
		}
	}
	look()
	go func() {
		for range time.Tick(5 * time.Millisecond) {
			look()
		}
	}()
}
`
	nowBegins = "sec, nsec, mono := runtimeNow()"
	// The guest proper cannot look at the file. What its first stage can tell it
	// is when its box expires, in the time that it has.
	guestExpires = "strconv.FormatUint(s.Expires, 10)"
)

// NewClock builds the agent of the world once more, with a clock that jumps.
// Agents of w that are started from now on have it.
func NewClock(tb testing.TB, w *World) *Clock {
	tb.Helper()
	dir := tb.TempDir()
	c := &Clock{file: "/tmp/clock-of-" + w.Cgroup} // where the user that a box's root is can read it
	c.Jump(tb, 0)
	root := strings.TrimSpace(command(tb, "go", "env", "GOROOT"))
	module := strings.TrimSpace(command(tb, "go", "list", "-m", "-f", "{{.Dir}}"))
	jumping := strings.Replace(jumpMain, "%FILE%", strconv.Quote(c.file), 1)
	overlay := map[string]string{}
	lay := func(path, content string) {
		file := filepath.Join(dir, strconv.Itoa(len(overlay))+".go")
		Must(tb, os.WriteFile(file, []byte(content), 0o600))
		overlay[path] = file
	}
	change := func(path, old, by string) {
		b, err := os.ReadFile(path)
		Must(tb, err)
		if !strings.Contains(string(b), old) {
			tb.Fatalf("%s has no %q any more: mend this overlay", path, old)
		}
		lay(path, strings.ReplaceAll(string(b), old, by))
	}
	change(filepath.Join(root, "src/time/time.go"), nowBegins, nowBegins+"\n\tsec += Jump.Load()")
	change(filepath.Join(module, "sandbox/native/boxinit/boxinit.go"), guestExpires, "strconv.FormatInt(int64(s.Expires)-jump(), 10)")
	lay(filepath.Join(module, "sandbox/native/boxinit/jump.go"), "package boxinit\n\nimport \"time\"\n\nfunc jump() int64 { return time.Jump.Load() }\n")
	lay(filepath.Join(root, "src/time/jump.go"), jumpTime)
	lay(filepath.Join(module, "cmd/mayfly/jump.go"), jumping)
	lay(filepath.Join(module, "cmd/mayfly-guest/jump.go"), jumping)
	embedded := "sandbox/guest/bin/mayfly-guest-" + runtime.GOARCH
	overlay[filepath.Join(module, embedded)] = filepath.Join(dir, "guest")
	b, err := json.Marshal(map[string]any{"Replace": overlay})
	Must(tb, err)
	Must(tb, os.WriteFile(filepath.Join(dir, "overlay.json"), b, 0o600))
	w.Program = filepath.Join(dir, "mayfly")
	for _, p := range [][]string{{"guest", "./cmd/mayfly-guest"}, {"mayfly", "./cmd/mayfly"}} {
		command(tb, "go", "build", "-C", module, "-trimpath", "-buildvcs=false", "-overlay", filepath.Join(dir, "overlay.json"),
			"-o", filepath.Join(dir, p[0]), p[1])
	}
	return c
}

// Jump sets the clock d ahead of the machine's. An agent that runs sees it
// within a few milliseconds.
func (c *Clock) Jump(tb testing.TB, d time.Duration) {
	tb.Helper()
	fresh := c.file + ".new"
	Must(tb, os.WriteFile(fresh, []byte(strconv.FormatInt(int64(d/time.Second), 10)), 0o644))
	Must(tb, os.Rename(fresh, c.file))
}

func command(tb testing.TB, name string, args ...string) string {
	tb.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		tb.Fatalf("%s %v: %v: %s", name, args, err, stderr.String())
	}
	return string(out)
}
