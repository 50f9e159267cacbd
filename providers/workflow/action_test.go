package workflow

import (
	"reflect"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/providers"
)

const greet = `name: Greet
author: somebody
description: greets
branding: {icon: x, color: y}
inputs:
  who: {description: whom, required: true}
  how: {default: "${{ github.actor }}", deprecationMessage: say it}
  many: {default: 3}
  bare:
outputs:
  text: {description: what, value: "${{ steps.say.outputs.text }}"}
runs:
  using: composite
  steps:
    - id: say
      name: Say ${{ inputs.who }}
      if: ${{ always() }}
      run: echo ${{ inputs.who }}
      shell: bash
      working-directory: ${{ github.action_path }}
      env: {A: "${{ inputs.how }}"}
      continue-on-error: true
    - uses: ./other
      with: {a: "${{ steps.say.outputs.text }}"}
      env: ${{ env }}
`

func TestLoadAction(t *testing.T) {
	t.Parallel()
	a, err := LoadAction([]byte(greet), "./greet/action.yml")
	if err != nil {
		t.Fatal(err)
	}
	want := &Action{
		Inputs: []Input{
			{Name: "who", Required: true},
			{Name: "how", Default: "${{ github.actor }}", Deprecated: "say it"},
			{Name: "many", Default: "3"},
			{Name: "bare"},
		},
		Outputs: map[string]string{"text": "${{ steps.say.outputs.text }}"},
		Steps: []providers.Step{
			{
				ID: "say", Name: "Say ${{ inputs.who }}", If: "${{ always() }}", Run: "echo ${{ inputs.who }}", Shell: "bash",
				Dir: "${{ github.action_path }}", Env: providers.Env{Vars: map[string]string{"A": "${{ inputs.how }}"}}, ContinueOnError: "true", Position: "./greet/action.yml:15:7",
			},
			{
				ID: "__2", Uses: "./other", With: map[string]string{"a": "${{ steps.say.outputs.text }}"}, Env: providers.Env{Vars: map[string]string{}, Expr: "${{ env }}"},
				Position: "./greet/action.yml:23:7",
			},
		},
	}
	if !reflect.DeepEqual(a, want) {
		t.Errorf("got\n%+v\nwant\n%+v", a, want)
	}
}

func TestLoadActionRefuses(t *testing.T) {
	t.Parallel()
	const head = "runs:\n  using: composite\n  steps:\n"
	for src, want := range map[string]string{
		"":                                     "a.yml: an action: it is not a mapping",
		"[1]":                                  "a.yml:1:1: an action: it is not a mapping",
		"a: [":                                 "a.yml: yaml",
		"name: x":                              `"runs" is missing`,
		"runs: {using: node20, main: x.js}":    `a.yml:1:15: "using: node20" is not supported yet: JavaScript actions are not run`,
		"runs: {using: docker, image: x}":      `a.yml:1:15: "using: docker" is not supported yet`,
		"runs: {steps: []}":                    `"using" is not composite`,
		"runs: []":                             `"using" is not composite`,
		"runs: {using: composite, steps: {}}":  "steps: it is not a list",
		"runs: {using: composite, pre: x}":     `runs: unknown key "pre"`,
		"what: x\n" + head + "    []":          `a.yml:1:1: an action: unknown key "what"`,
		"name: a\nname: b\n" + head + "    []": `a.yml:2:1: an action: "name" stands there twice`,
		"inputs: {a: {x: y}}\n" + head + "    []":                        `input a: unknown key "x"`,
		"inputs: {a: b}\n" + head + "    []":                             "input a: it is not a mapping",
		"outputs: {a: {}}\n" + head + "    []":                           `output "a": "value" is missing`,
		head + "    - {run: x}":                                          `a.yml:4:7: step: "shell" is missing`,
		head + "    - {shell: sh}":                                       `either "run" or "uses"`,
		head + "    - {run: x, shell: sh, uses: ./x}":                    `either "run" or "uses"`,
		head + "    - {uses: ./x, shell: sh}":                            `"with" goes with "uses"`,
		head + "    - {run: x, shell: sh, with: {}}":                     `"with" goes with "uses"`,
		head + "    - {uses: actions/setup-go@v5}":                       `a.yml:4:14: "uses: actions/setup-go@v5" is not supported yet: actions of other repositories`,
		head + "    - {uses: \"docker://alpine\"}":                       `"uses: docker://alpine" is not supported yet`,
		head + "    - {uses: ./../up}":                                   "leads out of the workspace",
		head + "    - {run: x, shell: sh, timeout-minutes: 1}":           `step: unknown key "timeout-minutes"`,
		head + "    - {run: x, shell: sh, id: 1a}":                       `id: "1a" is not`,
		head + "    - {run: \"${{ secrets.T }}\", shell: sh}":            "a.yml:4:13: the context secrets cannot be seen in an action",
		head + "    - {run: x, shell: sh, if: \"vars.x\"}":               "if: the context vars cannot be seen",
		head + "    - {run: x, shell: sh, env: {\"a=b\": c}}":            "cannot be the name of a variable",
		head + "    - {run: [x], shell: sh}":                             "run: it is not a plain value",
		head + "    - &a {run: x, shell: sh}\n    - *a":                  "",
		head + "    - &a {run: x, shell: sh, id: i}\n    - *a":           `"i" is the id of two steps`,
		"a: &a [*a]\nruns: x":                                            "a.yml",
		head + "    - {run: \"" + strings.Repeat("x", MaxSource) + "\"}": "more than 1048576 bytes",
	} {
		_, err := LoadAction([]byte(src), "a.yml")
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%.80q: %.300v, want %q", src, err, want)
		}
	}
}

func TestLocalAction(t *testing.T) {
	t.Parallel()
	for uses, want := range map[string]string{"./": ".", ".": ".", "./a/b": "a/b", "./.github/actions/x": ".github/actions/x", "./a/../b": "b"} {
		if got, err := LocalAction(uses); err != nil || got != want {
			t.Errorf("LocalAction(%q) = %q, %v; want %q", uses, got, err, want)
		}
	}
	for _, uses := range []string{"", "a", "/etc", "a/b@v1", "docker://x", "./..", "..", "../x", "./a/../../b", "./${{ x }}", "https://example.com/a@v1", "./a\x00"} {
		if got, err := LocalAction(uses); err == nil {
			t.Errorf("LocalAction(%q) = %q, want an error", uses, got)
		}
	}
}

// What comes out of a box may be anything.
func FuzzLoadAction(f *testing.F) {
	f.Add([]byte(greet))
	f.Add([]byte("runs: {using: composite, steps: [{run: x, shell: sh, if: always()}]}"))
	f.Add([]byte("a: &a [*a]\n? {}\n: x"))
	f.Fuzz(func(t *testing.T, src []byte) {
		a, err := LoadAction(src, "a.yml")
		if (a == nil) == (err == nil) {
			t.Errorf("%q: %v, %v, want an action or an error", src, a, err)
		}
		if err == nil {
			for _, s := range a.Steps {
				if s.Uses != "" && s.Run != "" || s.ID == "" || s.Position == "" {
					t.Errorf("%q gives the step %+v", src, s)
				}
			}
		}
	})
}
