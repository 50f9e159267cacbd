//go:build failpoint

// Package mutants tests the tests of a job's life: each patch of
// runner/testdata/mutants breaks one promise, and a test must notice.
package mutants

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

const root = "../.."

// A check is one of the commands that must notice a mutant, the cheap one first.
type check struct {
	name  string
	env   string
	args  []string
	limit time.Duration
}

// The last check is the crash test over the fake worlds, without a second crash.
func checks() []check {
	return []check{
		{"build", "", []string{"build", "-tags=failpoint", "./runner/..."}, 2 * time.Minute},
		{"fast", "", []string{"test", "-vet=off", "-timeout=120s", "./runner", "./runner/internal/journal"}, 3 * time.Minute},
		{"crash", "MAYFLY_CRASH=single", []string{"test", "-vet=off", "-tags=failpoint", "-timeout=240s", "-run=^TestCrash(Fake|Kept|Warm)$", "./runner"}, 5 * time.Minute},
	}
}

// run runs the check over the files of overlay and says what it printed.
func (c check) run(t *testing.T, overlay string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), c.limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", slices.Concat(c.args[:1], []string{"-overlay=" + overlay}, c.args[1:])...)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), c.env)
	out, err := cmd.CombinedOutput()
	return string(out), errors.Join(err, ctx.Err())
}

// TestMutants fails for each mutant that no test notices, and for each that
// cannot be judged: a patch that does not apply any more, or does not build.
func TestMutants(t *testing.T) {
	t.Parallel()
	// If the tests fail without a mutant, they prove nothing.
	overlay := writeOverlay(t, nil)
	for _, c := range checks() {
		if out, err := c.run(t, overlay); err != nil {
			t.Fatalf("%s without a mutant: %v\n%s", c.name, err, out)
		}
	}
	patches, err := filepath.Glob(filepath.Join(root, "runner/testdata/mutants/*.patch"))
	if err != nil || len(patches) == 0 {
		t.Fatalf("got %d patches, %v; want some", len(patches), err)
	}
	for _, patch := range patches {
		name := strings.TrimSuffix(filepath.Base(patch), ".patch")
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			judge(t, patch)
		})
	}
}

func judge(t *testing.T, patch string) {
	t.Helper()
	overlay := writeOverlay(t, mutate(t, patch))
	for i, c := range checks() {
		out, err := c.run(t, overlay)
		if err == nil {
			continue
		}
		if i == 0 {
			t.Fatalf("the mutant does not build: %v\n%s", err, out)
		}
		t.Logf("%s: caught by %s", filepath.Base(patch), culprits(c.name, out))
		return
	}
	b, err := os.ReadFile(patch)
	t.Errorf("survived: no test fails (%v)\n%s", err, b)
}

// culprits names the tests that failed.
func culprits(check, out string) string {
	found := regexp.MustCompile(`(?m)^--- FAIL: (\w+)`).FindAllStringSubmatch(out, -1)
	if len(found) == 0 {
		found = regexp.MustCompile(`(?m)^(panic: .*)$`).FindAllStringSubmatch(out, 1)
	}
	var names []string
	for _, f := range found {
		names = append(names, f[1])
	}
	return check + ": " + strings.Join(names, ", ")
}

// mutate applies the patch to copies of the files that it names, and returns
// the copies by the path in the repository.
func mutate(t *testing.T, patch string) map[string]string {
	t.Helper()
	dir := t.TempDir()
	b, err := os.ReadFile(patch)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^\+\+\+ b/(\S+)$`).FindAllStringSubmatch(string(b), -1) {
		from, to := filepath.Join(root, m[1]), filepath.Join(dir, m[1])
		content, err := os.ReadFile(from)
		if err := errors.Join(err, os.MkdirAll(filepath.Dir(to), 0o700), os.WriteFile(to, content, 0o600)); err != nil {
			t.Fatal(err)
		}
		files[from] = to
	}
	for _, args := range [][]string{{"apply", "--check", "-"}, {"apply", "-"}} {
		cmd := exec.CommandContext(t.Context(), "git", args...)
		cmd.Dir, cmd.Stdin = dir, strings.NewReader(string(b))
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("the patch does not apply: bring it up to date: %v\n%s", err, out)
		}
	}
	for from, to := range files {
		before, err := os.ReadFile(from)
		after, aerr := os.ReadFile(to)
		if err := errors.Join(err, aerr); err != nil || string(before) == string(after) {
			t.Fatalf("%s: the patch changes nothing (%v)", from, err)
		}
	}
	return files
}

// writeOverlay tells go build to read other files in the place of some (see "go
// help build", -overlay), so that a mutant needs no tree of its own.
func writeOverlay(t *testing.T, files map[string]string) string {
	t.Helper()
	replace := map[string]string{}
	for from, to := range files {
		path, err := filepath.Abs(from)
		if err != nil {
			t.Fatal(err)
		}
		replace[path] = to
	}
	b, err := json.Marshal(map[string]any{"Replace": replace})
	file := filepath.Join(t.TempDir(), "overlay.json")
	if err := errors.Join(err, os.WriteFile(file, b, 0o600)); err != nil {
		t.Fatal(fmt.Errorf("overlay: %w", err))
	}
	return file
}
