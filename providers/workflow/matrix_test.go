package workflow

import (
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/providers"
)

func TestMatrixOfOneJob(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		strategy string
		want     any
		shown    string // strategy as fail-fast job-index job-total max-parallel
	}{
		"none":       {"", nil, "true 0 1 1"},
		"no matrix":  {"{fail-fast: false}", nil, "false 0 1 1"},
		"one value":  {"{matrix: {Os: [linux], n: [3], f: [1.5], is: [false], no: [null]}}", map[string]any{"Os": "linux", "n": 3.0, "f": 1.5, "is": false, "no": nil}, "true 0 1 1"},
		"nested":     {"{matrix: {o: [{A: [1, x]}]}, max-parallel: 4}", map[string]any{"o": map[string]any{"A": []any{1.0, "x"}}}, "true 0 1 4"},
		"include":    {"{matrix: {include: [{a: 1, b: two}]}}", map[string]any{"a": 1.0, "b": "two"}, "true 0 1 1"},
		"added":      {"{matrix: {a: [1], include: [{b: 2}, {a: 1, c: 3}]}}", map[string]any{"a": 1.0, "b": 2.0, "c": 3.0}, "true 0 1 1"},
		"excluded":   {"{matrix: {a: [1, 2], b: [x], exclude: [{a: 2}]}}", map[string]any{"a": 1.0, "b": "x"}, "true 0 1 1"},
		"expression": {`{matrix: "${{ fromJSON('{\"a\": [{\"b\": 1}]}') }}", fail-fast: "${{ 1 == 2 }}"}`, map[string]any{"a": map[string]any{"b": 1.0}}, "false 0 1 1"},
		"in a value": {`{matrix: {a: ["${{ github.actor }}", ], b: "${{ fromJSON('[true]') }}"}}`, map[string]any{"a": "mona", "b": true}, "true 0 1 1"},
	} {
		w := load(t, "on: push\njobs:\n  a:\n    runs-on: x\n    "+strings.Replace(c.strategy, "{", "strategy: {", 1)+"\n    steps: [{run: x}]\n")
		job, err := w.Job("a", facts())
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got := job.Contexts["matrix"]; !reflect.DeepEqual(got, c.want) && (got != nil || c.want != nil) {
			t.Errorf("%s: matrix is %#v, want %#v", name, got, c.want)
		}
		got, err := Interpolate("${{ strategy.fail-fast }} ${{ strategy.job-index }} ${{ strategy.job-total }} ${{ strategy.max-parallel }}", Scope{Contexts: job.Contexts})
		if err != nil || got != c.shown {
			t.Errorf("%s: strategy is %q, %v; want %q", name, got, err, c.shown)
		}
	}
}

func TestMatrixRefused(t *testing.T) {
	t.Parallel()
	many := strings.Repeat("1,", 300)
	for matrix, want := range map[string]string{
		"{a: [1, 2]}":                         "has to be expanded by the service",
		"{a: [1], include: [{a: 2}]}":         "has to be expanded by the service",
		"{include: [{a: 2}, {a: 2}]}":         "has to be expanded by the service",
		"{a: [1], exclude: [{a: 1}]}":         "no combination",
		"{a: [" + many + "]}":                 `"a" has more than 256`,
		`{a: "${{ github.actor }}"}`:          `"a" is not a list`,
		`"${{ github.actor }}"`:               "not a mapping",
		`{include: "${{ fromJSON('[1]') }}"}`: "include: an item is not a mapping",
		`{a: "${{ fromJSON('[') }}"}`:         "not JSON",
		"{a: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], b: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]}": "more than 256 combinations",
	} {
		w := load(t, "on: push\njobs:\n  a:\n    runs-on: x\n    strategy:\n      matrix: "+matrix+"\n    steps: [{run: x}]\n")
		_, err := w.Job("a", facts())
		if !errors.Is(err, providers.ErrBadJob) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "ci.yml:6:") {
			t.Errorf("matrix %s: %v, want ErrBadJob in line 6 with %q", matrix, err, want)
		}
	}
}

func TestNeeds(t *testing.T) {
	t.Parallel()
	w := load(t, "on: push\njobs:\n  a: {needs: [B, c], runs-on: \"${{ needs.b.outputs.Label }}\", steps: [{run: x}]}\n  b: {runs-on: x, steps: [{run: x}]}\n  c: {runs-on: x, steps: [{run: x}]}\n")
	f := facts()
	f.Needs = map[string]Need{"b": {Result: "Success", Outputs: map[string]string{"Label": "big"}}}
	if _, err := w.Job("a", f); !errors.Is(err, providers.ErrBadJob) || !strings.Contains(err.Error(), `ci.yml:3:18: needs: the service does not say how "c" ended`) {
		t.Errorf("a need that nobody knows of: %v, want it refused by name", err)
	}
	f.Needs["c"] = Need{Result: "skipped"}
	job, err := w.Job("a", f)
	if err != nil {
		t.Fatal(err)
	}
	got, err := Interpolate("${{ needs.b.result }} ${{ needs.c.result }} ${{ needs.b.outputs.label }} ${{ join(needs.*.result) }}", Scope{Contexts: job.Contexts})
	if err != nil || got != "success skipped big success,skipped" || job.Labels[0] != "big" {
		t.Errorf("got %q, labels %q, %v", got, job.Labels, err)
	}
}

// The table is what GitHub does with a job whose needs ended so.
func TestJobCondition(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		needs, expr string
		want        bool
	}{
		{"", "", true},
		{"", "failure()", false},
		{"success", "", true},
		{"success success", "success()", true},
		{"success failure", "", false},
		{"success failure", "github.x == ''", false},
		{"success failure", "success()", false},
		{"success failure", "failure()", true},
		{"success failure", "cancelled()", false},
		{"success failure", "always()", true},
		{"success failure", "!cancelled()", true},
		{"success failure", "failure() && needs.n0.result == 'success'", true},
		{"success failure", "always() && needs.n1.result == 'success'", false},
		{"skipped", "", false},
		{"skipped", "failure()", false},
		{"skipped", "cancelled()", false},
		{"skipped success", "always()", true},
		{"skipped", "!failure() && !cancelled()", true},
		{"cancelled", "", false},
		{"cancelled", "cancelled()", true},
		{"cancelled", "failure()", false},
		{"cancelled failure", "failure()", true},
		{"strange", "failure()", true},
	} {
		needs := map[string]any{}
		for i, result := range strings.Fields(c.needs) {
			needs["n"+string(rune('0'+i))] = map[string]any{"result": result}
		}
		got, err := JobCondition(c.expr, map[string]any{"needs": needs})
		if err != nil || got != c.want {
			t.Errorf("needs %q, if %q: %v, %v; want %v", c.needs, c.expr, got, err, c.want)
		}
	}
}
