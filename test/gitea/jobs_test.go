package gitea_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/test/agenttest"
)

// jobs runs one job after the other on one agent.
func jobs(t *testing.T, in *installation) {
	a := in.world.Start(t)
	for _, test := range []struct {
		name string
		run  func(*testing.T, *installation)
	}{
		{"log", wholeLog},
		{"needs", outputsThroughNeeds},
		{"failure", failure},
		{"cancel", cancelled},
		{"matrix", matrix},
		{"itself", itself},
		{"canary", canary},
		{"restart", restart},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, in) })
	}
	a.Stop(t)
	owesNothing(t, in.world)
}

// owesNothing wants no debts and an unbroken record.
func owesNothing(t *testing.T, w *agenttest.World) {
	t.Helper()
	if out, code := w.Run(t, "jobs"); code != 0 || !strings.Contains(out, "nothing is owed") {
		t.Errorf("mayfly jobs: %s (status %d), want nothing owed", out, code)
	}
	if out, code := w.Run(t, "audit", "verify"); code != 0 {
		t.Errorf("mayfly audit verify: %s (status %d)", out, code)
	}
}

// printScript prints what is easily lost on the way: spaces, empty lines, what a
// terminal would take, a line longer than any buffer, and no newline at the end.
const printScript = `import sys
for i in range(300):
    print("line", i, "x" * (i % 97))
print("\ttab  two spaces, and at the end  ")
print("")
print("")
print("grüße, 世界 \U0001f98b")
print("\x1b[31mred\x1b[0m \x07 \x01 {} %s %d &amp; <b>")
print("2026-11-24T00:00:00.0000000Z a time of its own")
print("y" * 60000)
sys.stdout.write("no newline")
`

func printWanted() string {
	var b strings.Builder
	for i := range 300 {
		fmt.Fprintln(&b, "line", i, strings.Repeat("x", i%97))
	}
	b.WriteString("\ttab  two spaces, and at the end  \n\n\ngrüße, 世界 \U0001f98b\n")
	b.WriteString("\x1b[31mred\x1b[0m \x07 \x01 {} %s %d &amp; <b>\n2026-11-24T00:00:00.0000000Z a time of its own\n")
	b.WriteString(strings.Repeat("y", 60000) + "\nno newline\n")
	return b.String()
}

// wholeLog: what a job prints is what the server shows, byte for byte but for
// the secrets.
func wholeLog(t *testing.T, in *installation) {
	r := must(in.server.NewRepository(in.ctx, "log"))(t)
	agenttest.Must(t, r.SetSecret(in.ctx, "TOKEN_OF_TEST", "correct-horse-battery"))
	agenttest.Must(t, r.SetVariable(in.ctx, "V", "a value"))
	sha := in.push(t, r, `on: push
jobs:
  print:
    runs-on: mayfly
    env: {S: '${{ secrets.TOKEN_OF_TEST }}', V: '${{ vars.V }}'}
    steps:
      - run: |
`+indent(printScript, "          ")+`        shell: python
      - run: echo "variable $V, secret $S, base64 $(printf %s "$S" | base64)"
      - run: echo "job token ${{ secrets.GITEA_TOKEN }} and ${{ github.token }}"
`)
	jobs := must(r.Wait(in.ctx, must(r.Pushed(in.ctx, sha))(t)))(t)
	got := in.printed(t, r, jobs[0])
	if c := conclusions(jobs); c != "print success" {
		t.Fatalf("%s, want success: %s", c, got)
	}
	want := printWanted() + "variable a value, secret ***, base64 ***\njob token *** and ***\n"
	if got != want {
		t.Errorf("the server's log is not what the job printed: %s", difference(got, want))
	}
	for _, s := range jobs[0].Steps {
		if s.Conclusion != "success" {
			t.Errorf("step %+v, want success", s)
		}
	}
}

func indent(text, by string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		b.WriteString(by + line)
	}
	return b.String()
}

// difference is the first line that differs.
func difference(got, want string) string {
	g, w := strings.SplitAfter(got, "\n"), strings.SplitAfter(want, "\n")
	for i := range max(len(g), len(w)) {
		var gl, wl string
		if i < len(g) {
			gl = g[i]
		}
		if i < len(w) {
			wl = w[i]
		}
		if gl != wl {
			return fmt.Sprintf("line %d: got %.200q, want %.200q", i+1, gl, wl)
		}
	}
	return "no difference"
}

// outputsThroughNeeds: the second job has what the first one said.
func outputsThroughNeeds(t *testing.T, in *installation) {
	r, jobs := in.pushed(t, "needs", `on: push
jobs:
  first:
    runs-on: mayfly
    outputs: {word: '${{ steps.say.outputs.word }}', lines: '${{ steps.say.outputs.lines }}'}
    steps:
      - id: say
        run: |
          echo "word=hello = there" >> "$GITHUB_OUTPUT"
          printf 'lines<<E\none\ntwo\nE\n' >> "$GITHUB_OUTPUT"
  second:
    needs: first
    runs-on: mayfly
    steps:
      - run: printf '%s\n' "$WORD" "$LINES" "$RESULT"
        env: {WORD: '${{ needs.first.outputs.word }}', LINES: '${{ needs.first.outputs.lines }}', RESULT: '${{ needs.first.result }}'}
`)
	if c := conclusions(jobs); c != "first success, second success" {
		t.Fatalf("%s, want both a success", c)
	}
	if got, want := in.printed(t, r, jobs[1]), "hello = there\none\ntwo\nsuccess\n"; got != want {
		t.Errorf("the second job printed %q, want %q", got, want)
	}
}

// failure: red, with the step that failed and its exit status.
func failure(t *testing.T, in *installation) {
	r, jobs := in.pushed(t, "failure", `on: push
jobs:
  bad:
    runs-on: mayfly
    steps:
      - run: echo before
      - run: echo failing; exit 7
      - run: echo never
      - run: echo after a failure
        if: failure()
`)
	if c := conclusions(jobs); c != "bad failure" {
		t.Fatalf("%s, want a failure", c)
	}
	var steps []string
	for _, s := range jobs[0].Steps {
		steps = append(steps, s.Conclusion)
	}
	if want := []string{"success", "failure", "skipped", "success"}; !slices.Equal(steps, want) {
		t.Errorf("steps %q, want %q", steps, want)
	}
	log := in.printed(t, r, jobs[0])
	for _, want := range []string{"before\n", "failing\n", "exit status 7\n", "after a failure\n"} {
		if !strings.Contains(log, want) {
			t.Errorf("the log lacks %q:\n%s", want, log)
		}
	}
	if strings.Contains(log, "\nnever\n") {
		t.Errorf("a step ran after one that failed:\n%s", log)
	}
}

// cancelled: the command stops, what always runs does so, and the server hears it.
func cancelled(t *testing.T, in *installation) {
	r, sha := in.repository(t, "cancel", `on: push
jobs:
  endless:
    runs-on: mayfly
    steps:
      - run: echo begun; `+in.gates.pass("/cancel")+`; sleep 1000; echo survived
      - run: echo next
      - run: echo cleaned
        if: always()
`)
	run := must(r.Pushed(in.ctx, sha))(t)
	in.gates.open("/cancel")
	in.gates.reached(t, "/cancel")
	asked := time.Now()
	agenttest.Must(t, r.Cancel(in.ctx, run))
	jobs := must(r.Wait(in.ctx, run))(t)
	t.Logf("cancelled → reported, with what always runs: %v", time.Since(asked).Round(time.Millisecond))
	if c := conclusions(jobs); c != "endless cancelled" {
		t.Errorf("%s, want it cancelled", c)
	}
	log := in.printed(t, r, jobs[0])
	if !strings.HasPrefix(log, "begun\n") || !strings.Contains(log, "cleaned\n") {
		t.Errorf("want what was printed before, and what always runs:\n%s", log)
	}
	if strings.Contains(log, "\nsurvived\n") || strings.Contains(log, "\nnext\n") {
		t.Errorf("something ran on after the cancellation:\n%s", log)
	}
}

// matrix: twenty jobs over four slots, each its own.
func matrix(t *testing.T, in *installation) {
	r, jobs := in.pushed(t, "matrix", `on: push
jobs:
  m:
    strategy:
      matrix: {a: [1, 2, 3, 4, 5], b: [w, x, y, z]}
    runs-on: mayfly
    steps:
      - run: echo "${{ matrix.a }}${{ matrix.b }}"
`)
	var got, want []string
	for _, j := range jobs {
		if j.Conclusion != "success" || j.Runner != in.name {
			t.Errorf("job %+v, want a success of the agent", j)
			continue
		}
		got = append(got, strings.TrimSpace(in.printed(t, r, j)))
	}
	for a := range 5 {
		for _, b := range []string{"w", "x", "y", "z"} {
			want = append(want, fmt.Sprint(a+1, b))
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("the jobs printed %q, want %q", got, want)
	}
}

// restart: the server is away for a while in the middle of a job, which goes on.
func restart(t *testing.T, in *installation) {
	r, sha := in.repository(t, "restart", `on: push
jobs:
  long:
    runs-on: mayfly
    steps:
      - run: echo one; `+in.gates.pass("/one")+`
      - run: echo two; `+in.gates.pass("/two")+`
      - run: echo three
`)
	run := must(r.Pushed(in.ctx, sha))(t)
	in.gates.reached(t, "/one")
	agenttest.Must(t, in.server.Kill())
	in.gates.open("/one")
	in.gates.reached(t, "/two") // the job goes on without the server
	agenttest.Must(t, in.server.Start(in.ctx))
	in.gates.open("/two")
	jobs := must(r.Wait(in.ctx, run))(t)
	log := in.printed(t, r, jobs[0])
	if c := conclusions(jobs); c != "long success" || log != "one\ntwo\nthree\n" {
		t.Errorf("%s, want a success; its log:\n%s", c, log)
	}
	// And the agent takes jobs of the server that came back.
	if _, jobs := in.pushed(t, "later", good); conclusions(jobs) != "good success" {
		t.Errorf("the next job: %s", conclusions(jobs))
	}
}
