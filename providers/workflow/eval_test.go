package workflow

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
)

func scope() Scope {
	return Scope{Contexts: map[string]any{
		"github": map[string]any{"ref": "refs/heads/main", "run": 7, "event": map[string]any{
			"labels": []any{map[string]any{"name": "bug", "n": 1.0}, map[string]any{"name": "Docs"}, map[string]any{"n": 3.0}},
			"grid":   []any{[]any{1.0, 2.0}, []any{3.0}},
		}},
		"env":     map[string]string{"HTTP_PROXY": "upper", "http_proxy": "lower", "Mixed": "m"},
		"inputs":  map[string]any{"flag": true, "no": false, "nothing": nil, "list": []string{"a", "b"}},
		"secrets": map[string]creds.Secret{"TOKEN": creds.NewSecret("s3cr3t")},
	}}
}

// The expected values follow the tables and examples of "Evaluate expressions
// in workflows and actions" at docs.github.com.
func TestInterpolate(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"no expression }} here":                               "no expression }} here",
		"a ${{ github.ref }} b${{github.run}}":                "a refs/heads/main b7",
		"${{ 'it''s }} ${{' }}":                               "it's }} ${{",
		"${{ null }}|${{ true }}|${{ -9.2 }}|${{ 0xff }}":     "|true|-9.2|255",
		"${{ -2.99e-2 }}|${{ 711 }}|${{ 0 }}":                 "-0.0299|711|0",
		"${{ 1e15 }}|${{ 123456789012345 }}|${{ 0.1 }}":       "1E+15|123456789012345|0.1",
		"${{ inputs }}|${{ inputs.list }}":                    "Object|Array",
		"${{ github.absent.deeper['x'].y }}|${{ matrix }}":    "|",
		"${{ env.HTTP_PROXY }}|${{ env.http_proxy }}":         "upper|lower",
		"${{ env.MIXED }}|${{ ENV['mixed'] }}":                "m|m",
		"${{ github.event.labels[1].name }}":                  "Docs",
		"${{ github.event.labels['1'].name }}":                "Docs",
		"${{ github.event.labels[9].name }}|":                 "|",
		"${{ join(github.event.labels.*.name) }}":             "bug,Docs",
		"${{ join(github.event.labels.*.n, '+') }}":           "1+3",
		"${{ join(github.event.grid.*[0]) }}":                 "1,3",
		"${{ join(github.event.grid.*.*) }}":                  "1,2,3",
		"${{ join(github.event.grid[*]['*']) }}|":             "|",
		"${{ join('text', '-') }}|${{ join(inputs) }}":        "text|",
		"${{ toJSON(inputs) }}":                               "{\n  \"flag\": true,\n  \"list\": [\n    \"a\",\n    \"b\"\n  ],\n  \"no\": false,\n  \"nothing\": null\n}",
		"${{ toJSON('<\"é>') }}|${{ toJSON(fromJSON('[]'))}}": `"<\"é>"|[]`,
		"${{ fromJSON('{\"a\":[1,{\"b\":\"x\"}]}').a[1].b }}": "x",
		"${{ fromJSON('true') && 'yes' }}":                    "yes",
		"${{ format('{{{0}}} {1} {0}', 'a', 1.50) }}":         "{a} 1.5 a",
		"${{ inputs.flag && 'on' || 'off' }}":                 "on",
		"${{ inputs.no && 'on' || 'off' }}":                   "off",
		"${{ secrets.TOKEN }}|${{ secrets.token }}":           "s3cr3t|s3cr3t",
		"${{ case(false, 1, 1 == 1, 'two', 3) }}":             "two",
		"${{ NaN }}|${{ Infinity }}":                          "NaN|Infinity",
	} {
		if got, err := Interpolate(in, scope()); err != nil || got != want {
			t.Errorf("Interpolate(%q) = %q, %v; want %q", in, got, err, want)
		}
	}
}

func TestOperators(t *testing.T) {
	t.Parallel()
	for expr, want := range map[string]bool{
		// falsy and truthy
		"!false && !0 && !'' && !null && !NaN": true,
		"!!'false' && !!'0' && !!inputs":       true,
		// loose equality: null and '' are 0, true is 1, text is parsed
		"null == 0 && null == '' && false == '' && true == 1": true,
		"'1' == 1 && ' 0x1f ' == 31 && '1e2' == 100":          true,
		"'abc' == 0 || 'abc' == NaN || NaN == NaN":            true == false,
		"'1_0' == 10 || 'inf' == Infinity || '0x1p4' == 16":   false,
		"'Infinity' == Infinity":                              true,
		"'ABC' == 'abc' && 'ß' != 'SS' && 'ı' != 'I'":         true,
		"'É' == 'é'": true,
		// objects and arrays equal only themselves
		"inputs == inputs && inputs != env && inputs.list == inputs.list": true,
		"inputs == null || inputs == 'Object' || inputs == 1":             false,
		// order
		"1 < 2 && 2 <= 2 && 3 > 2 && 'a' < 'B' && '10' > 9":  true,
		"'abc' < 1 || 'abc' > 1 || 'abc' >= 1 || NaN <= NaN": false,
		"null >= null && true > false":                       true,
		"'a' < 'ab' && 'ab' > 'a'":                           true,
		// precedence, and all from the left
		"1 < 2 == true":            true,
		"true == 1 < 2":            true,
		"true == 2 > 1":            true,
		"3 > 2 > 1":                false,
		"1 == 1 == 1":              true,
		"5 == 5 == 5":              false,
		"true || false && false":   true,
		"!false == true":           true,
		"false == (true == false)": true,
		// functions
		"contains('Hello', 'ELL') && !contains('a', 'b')":            true,
		"contains(inputs.list, 'A') && !contains(inputs.list, 'ab')": true,
		"contains(fromJSON('[1,\"2\"]'), 2) && contains(12, 2)":      true,
		"contains(inputs, 'flag')":                                   false,
		"startsWith('HeLLo', 'hell') && ENDSWITH('hello', 'LO')":     true,
		"startsWith(inputs, 'O')":                                    false,
		"contains(github.event.labels.*.name, 'docs')":               true,
	} {
		if got, err := Condition(expr, scope()); err != nil || got != want {
			t.Errorf("Condition(%q) = %v, %v; want %v", expr, got, err, want)
		}
	}
}

func TestConditionJoinsSuccess(t *testing.T) {
	t.Parallel()
	all := []providers.Conclusion{"", providers.Success, providers.Failure, providers.Cancelled, providers.TimedOut}
	for expr, want := range map[string]string{
		"":                           "11000",
		"true":                       "11000",
		"${{ true }}":                "11000",
		"  ${{ 1 == 1 }} ":           "11000",
		"success()":                  "11000",
		"failure()":                  "00101",
		"${{ FAILURE() }}":           "00101",
		"cancelled()":                "00010",
		"always()":                   "11111",
		"!cancelled()":               "11101",
		"!success()":                 "00111",
		"always() && false":          "00000",
		"failure() || 1 == 2":        "00101",
		"contains('success()', 'x')": "00000",
		"'failure()' != ''":          "11000", // the name in a string is no call
	} {
		got := ""
		for _, status := range all {
			s := scope()
			s.Status = status
			ok, err := Condition(expr, s)
			if err != nil {
				t.Errorf("Condition(%q) with status %q: %v", expr, status, err)
			}
			got += map[bool]string{true: "1", false: "0"}[ok]
		}
		if got != want {
			t.Errorf("Condition(%q) over %q = %s, want %s", expr, all, got, want)
		}
	}
}

func TestExpressionErrors(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"${{ github.ref":                 "unexpected EOF",
		"${{ }}":                         "ends where a value",
		"${{ a b }}":                     `unknown name "a"`,
		"${{ github github }}":           `unexpected "github"`,
		"${{ (1 }}":                      `expected ")"`,
		"${{ 1 == }}":                    "ends where a value",
		"${{ github. }}":                 "behind the dot",
		"${{ github[1 }}":                `expected "]"`,
		"${{ TRUE }}":                    `unknown name "TRUE"`,
		`${{ "text" }}`:                  "single quotes",
		"${{ nope(1) }}":                 `unknown function "nope"`,
		"${{ hashFiles('go.sum') }}":     "hashFiles: it works in steps only",
		"${{ contains('a') }}":           "wrong number of arguments",
		"${{ success('job') }}":          "wrong number of arguments",
		"${{ join(1,,2) }}":              "expected a value",
		"${{ format('{0}') }}":           "no argument {0}",
		"${{ format('{', 1) }}":          "neither doubled",
		"${{ format('}', 1) }}":          "neither doubled",
		"${{ format('{x}', 1) }}":        "neither doubled",
		"${{ fromJSON('{\"a\":') }}":     "not JSON",
		"${{ fromJSON(secrets.TOKEN) }}": "not JSON",
		"${{ 99999e999 }}":               "not a number that can be represented",
		"${{ case(1, 2, 3) }}":           "pairs",
		"${{ inputs.chan }}":             "chan int",
		"${{ " + strings.Repeat("(", 60) + "1" + strings.Repeat(")", 60) + " }}":       "nested deeper than 50",
		"${{ 1" + strings.Repeat(" || 1", maxExpression/5) + " }}":                     "no end within 21000 bytes",
		"${{ " + strings.Repeat("toJSON(", 60) + "1" + strings.Repeat(")", 60) + " }}": "nested deeper than 50",
	} {
		s := scope()
		s.Contexts["inputs"] = map[string]any{"chan": make(chan int)}
		got, err := Interpolate(in, s)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Interpolate(%.60q) = %q, %v; want an error with %q", in, got, err, want)
		} else if strings.Contains(err.Error(), "s3cr3t") {
			t.Errorf("Interpolate(%q): the error shows a secret: %v", in, err)
		}
	}
}

// text around an expression makes a string of it, which is true: refused.
func TestConditionRefusesTextAround(t *testing.T) {
	t.Parallel()
	for _, expr := range []string{"${{ false }} && true", "${{ false }}${{ false }}", "1 }} x", "x ${{ false }}"} {
		if ok, err := Condition(expr, scope()); err == nil {
			t.Errorf("Condition(%q) = %v, nil; want an error", expr, ok)
		}
	}
}

func TestEvaluationIsBounded(t *testing.T) {
	t.Parallel()
	big := strings.Repeat("x", 1<<20)
	wide := make([]any, 200_000)
	for i := range wide {
		wide[i] = wide[:50]
	}
	loop := map[string]any{}
	loop["self"] = loop
	s := Scope{Contexts: map[string]any{"env": map[string]string{"big": big}, "inputs": wide, "vars": loop}}
	for _, in := range []string{
		strings.Repeat("${{ env.big }}", 11),
		"${{ format('" + strings.Repeat("{0}", 11) + "', env.big) }}",
		"${{ format('" + strings.Repeat("{0}", 11) + "', env.big) == '' }}", // made, though not printed
		"${{ toJSON(vars) }}",
		"${{ inputs.*.*.* }}",
		strings.Repeat("${{ contains(inputs, 'absent') }}", 100),
		"${{ join(fromJSON(format('[{0}1]', '" + strings.Repeat("1,", 5000) + "')), env.big) }}",
	} {
		start := time.Now()
		out, err := Interpolate(in, s)
		if !errors.Is(err, ErrTooLarge) {
			t.Errorf("Interpolate(%.40q) = %d bytes, %v; want ErrTooLarge", in, len(out), err)
		}
		if d := time.Since(start); d > time.Minute {
			t.Errorf("Interpolate(%.40q) took %v", in, d)
		}
	}
}

func TestBoolAndMinutes(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"": "false <nil>", "true": "true <nil>", "${{ inputs.flag }}": "true <nil>", "${{ inputs.list }}": "false error",
	} {
		got, err := Bool(in, scope())
		if s := fmt.Sprintf("%v %v", got, errWord(err)); s != want {
			t.Errorf("Bool(%q) = %s, want %s", in, s, want)
		}
	}
	for in, want := range map[string]time.Duration{"": 0, "0.5": 30 * time.Second, "${{ github.run }}": 7 * time.Minute} {
		if got, err := Minutes(in, scope()); err != nil || got != want {
			t.Errorf("Minutes(%q) = %v, %v; want %v", in, got, err, want)
		}
	}
	for _, in := range []string{"0", "-1", "x", "${{ NaN }}", "${{ Infinity }}", "1e300"} {
		if got, err := Minutes(in, scope()); err == nil {
			t.Errorf("Minutes(%q) = %v, want an error", in, got)
		}
	}
}

func errWord(err error) any {
	if err != nil {
		return "error"
	}
	return err
}

func FuzzEval(f *testing.F) {
	for _, seed := range []string{
		"${{ github.event.labels.*.name }}", "${{ format('{0}{{', toJSON(github)) }}", "${{ !(1 < 2) == 'a' }}",
		"${{ fromJSON('[1]')[0] }}", "${{ env[*]['x'] }}", "${{", "}}", "${{ '\xff' }}", "${{ 0x }}", "${{ -", "\ufeff${{\ufeff1}}",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, in string) {
		s := scope()
		out, err := Interpolate(in, s)
		if len(out) > maxWork {
			t.Errorf("output of %d bytes, the bound is %d", len(out), maxWork)
		}
		if err == nil && !strings.Contains(in, "${{") && out != in {
			t.Errorf("text without an expression changed: %q became %q", in, out)
		}
		if err != nil && strings.Contains(err.Error(), "s3cr3t") && !strings.Contains(in, "s3cr3t") {
			t.Errorf("error shows a secret: %v", err)
		}
		_, _ = Condition(in, s)
	})
}
