package agenttest

import (
	"encoding/json"
	"errors"
	"fmt"
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
type Clock struct{}

// clockFile is how far the clock is ahead, in seconds. Every user can read it:
// the root of a box is one of its own.
const clockFile = "/tmp/clock"

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
		b, _ := os.ReadFile("` + clockFile + `")
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
	jumpBox = `package boxinit

import "time"

func jump() int64 { return time.Jump.Load() }
`
	nowBegins = "sec, nsec, mono := runtimeNow()"
	// The guest proper cannot look at the file. What its first stage can tell it
	// is when its box expires, in the time that it has.
	guestExpires = "strconv.FormatUint(s.Expires, 10)"
)

// JumpingClock is for Main: it makes NewClock possible.
func JumpingClock(dir string) error {
	root, err := printed("go", "env", "GOROOT")
	if err != nil {
		return err
	}
	module, err := printed("go", "list", "-m", "-f", "{{.Dir}}")
	if err != nil {
		return err
	}
	work, err := os.MkdirTemp(dir, "overlay-")
	if err != nil {
		return err
	}
	o := overlay{work, map[string]string{}}
	guest := filepath.Join(work, "guest")
	o.files[filepath.Join(module, "sandbox/guest/bin/mayfly-guest-"+runtime.GOARCH)] = guest
	err = errors.Join(
		o.lay(filepath.Join(root, "src/time/jump.go"), jumpTime),
		o.lay(filepath.Join(module, "cmd/mayfly/jump.go"), jumpMain),
		o.lay(filepath.Join(module, "cmd/mayfly-guest/jump.go"), jumpMain),
		o.lay(filepath.Join(module, "sandbox/native/boxinit/jump.go"), jumpBox),
		o.change(filepath.Join(root, "src/time/time.go"), nowBegins, nowBegins+"\n\tsec += Jump.Load()"),
		o.change(filepath.Join(module, "sandbox/native/boxinit/boxinit.go"), guestExpires, "strconv.FormatInt(int64(s.Expires)-jump(), 10)"),
	)
	b, jerr := json.Marshal(map[string]any{"Replace": o.files})
	list := filepath.Join(work, "overlay.json")
	if err := errors.Join(err, jerr, os.WriteFile(list, b, 0o600)); err != nil {
		return err
	}
	if err := o.build(module, list, guest, "./cmd/mayfly-guest"); err != nil {
		return err
	}
	return o.build(module, list, filepath.Join(dir, "mayfly-jumping"), "./cmd/mayfly")
}

// An overlay is what one build sees instead of files, or beside them.
type overlay struct {
	dir   string
	files map[string]string
}

func (o overlay) lay(path, content string) error {
	file := filepath.Join(o.dir, strconv.Itoa(len(o.files))+".go")
	o.files[path] = file
	return os.WriteFile(file, []byte(content), 0o600)
}

func (o overlay) change(path, old, by string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if !strings.Contains(string(b), old) {
		return fmt.Errorf("%s has no %q any more: mend this overlay", path, old)
	}
	return o.lay(path, strings.ReplaceAll(string(b), old, by))
}

func (o overlay) build(module, list, to, what string) error {
	_, err := printed("go", "build", "-C", module, "-trimpath", "-buildvcs=false", "-overlay", list, "-o", to, what)
	return err
}

func printed(name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %v: %w: %s", name, args, err, stderr.String())
	}
	return strings.TrimSpace(string(out)), nil
}

// NewClock gives agents of w that are started from now on a clock that jumps.
// One test of a package may have it.
func NewClock(tb testing.TB, w *World) *Clock {
	tb.Helper()
	w.Program = "/tmp/mayfly-jumping"
	c := &Clock{}
	c.Jump(tb, 0)
	return c
}

// Jump sets the clock d ahead of the machine's. An agent that runs sees it
// within a few milliseconds.
func (c *Clock) Jump(tb testing.TB, d time.Duration) {
	tb.Helper()
	Must(tb, os.WriteFile(clockFile+".new", []byte(strconv.FormatInt(int64(d/time.Second), 10)), 0o644))
	Must(tb, os.Rename(clockFile+".new", clockFile))
}
