package workflow

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
)

const small = "on: push\njobs: {a: {runs-on: x, steps: [{run: x}]}}\n"

// bomb stands for 10^9 nodes in the part that the parser copies out.
func bomb() string {
	var b strings.Builder
	b.WriteString("on: push\njobs:\n  a:\n    runs-on: x\n    steps: [{run: x}]\n    strategy:\n      matrix:\n        l0: [x]\n")
	b.WriteString("        m0: [&a0 [1,1,1,1,1,1,1,1,1,1]]\n")
	for i := 1; i < 10; i++ {
		fmt.Fprintf(&b, "        m%d: [&a%d [%s]]\n", i, i, strings.TrimSuffix(strings.Repeat(fmt.Sprintf("*a%d,", i-1), 10), ","))
	}
	b.WriteString("        last: [*a9]\n")
	return b.String()
}

func TestLoadRefuses(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ src, want string }{
		"10 MB":        {strings.Repeat("# x\n", 10<<18), "ci.yml: the file has more than 1048576 bytes (1 MiB)"},
		"one too many": {small + strings.Repeat("#", MaxSource+1-len(small)), "1 MiB"},
		"empty":        {"", "ci.yml"},
		"no jobs":      {"on: push\n", "ci.yml:1:1: \"jobs\" section is missing"},
		"unknown key":  {"on: push\njobs:\n  a:\n    runs-on: x\n    stepps: []\n    steps: [{run: x}]\n", `ci.yml:5:5: unexpected key "stepps"`},
		"not YAML":     {"on: [push\n", "ci.yml"},
		"no step":      {"on: push\njobs: {a: {runs-on: x, steps: [{name: n}]}}", "ci.yml:2:32: step must run script"},
		"zero timeout": {strings.Replace(small, "runs-on", "timeout-minutes: 0, runs-on", 1), "greater than zero"},
		"alias bomb":   {bomb(), "aliases of the file stand for more than"},
		"deep":         {strings.Repeat("[", 100_000), "max depth"},
		"many errors":  {"on: push\njobs:\n" + strings.Repeat("  x y: {}\n", 1000), "more"},
		"recursion":    {"on: push\njobs: &j {a: {runs-on: x, steps: [{run: x}], b: *j}}", "recursive alias"},
		"nan":          {strings.Replace(small, "runs-on", "timeout-minutes: !!float nan, runs-on", 1), "the YAML parser gave up"},
		"binary":       {"\x00\xff\xfe", "ci.yml"},
	} {
		start := time.Now()
		_, err := Load([]byte(c.src), "ci.yml")
		if !errors.Is(err, providers.ErrBadJob) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: Load = %v, want ErrBadJob with %q", name, err, c.want)
			continue
		}
		if n := strings.Count(err.Error(), "\n"); n > maxProblems {
			t.Errorf("%s: the error has %d lines, want at most %d", name, n, maxProblems+1)
		}
		if d := time.Since(start); d > time.Minute {
			t.Errorf("%s: took %v", name, d)
		}
	}
}

func TestLoadAcceptsTheLimits(t *testing.T) {
	t.Parallel()
	full := small + strings.Repeat("#", MaxSource-len(small))
	aliases := "on: push\nenv: &e {A: b}\njobs: {a: {runs-on: x, env: *e, steps: [{run: x}]}}\n"
	for name, src := range map[string]string{"1 MiB": full, "an honest alias": aliases} {
		if w, err := Load([]byte(src), "ci.yml"); err != nil {
			t.Errorf("%s: %v, want no error", name, err)
		} else if w.Name() != "ci.yml" {
			t.Errorf("%s: Name() = %q, want the file's name", name, w.Name())
		}
	}
}

func FuzzLoad(f *testing.F) {
	f.Add([]byte(whole))
	f.Add([]byte(small))
	f.Add([]byte(bomb()))
	f.Add([]byte("on: {workflow_dispatch: {inputs: {a: {type: choice, options: [x]}}}}\njobs: {a: {uses: x}}"))
	f.Add([]byte("on: push\njobs: {a: {runs-on: {labels: [x]}, services: '${{ x }}', steps: [{uses: 'docker://x', with: {args: x}}]}}"))
	f.Fuzz(func(t *testing.T, src []byte) {
		w, err := Load(src, "ci.yml")
		if err != nil {
			if !errors.Is(err, providers.ErrBadJob) {
				t.Errorf("Load = %v, want ErrBadJob", err)
			}
			return
		}
		for _, id := range w.Jobs() {
			job, err := w.Job(id, facts())
			if err != nil && !errors.Is(err, providers.ErrBadJob) {
				t.Errorf("Job = %v, want ErrBadJob", err)
			}
			if err == nil && len(job.Steps) == 0 {
				t.Errorf("job %q has no steps and no error", id)
			}
		}
	})
}
