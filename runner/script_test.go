package runner

import (
	"slices"
	"strings"
	"testing"
	"time"
)

// The table is GitHub's, "jobs.<job_id>.steps[*].shell".
func TestShells(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]string{
		"":                               "bash -e /run/mayfly/step|sh -e /run/mayfly/step",
		"bash":                           "bash --noprofile --norc -eo pipefail /run/mayfly/step",
		"sh":                             "sh -e /run/mayfly/step",
		"python":                         "python3 /run/mayfly/step|python /run/mayfly/step",
		"pwsh":                           "pwsh -command . '/run/mayfly/step.ps1'",
		"perl {0}":                       "perl /run/mayfly/step",
		"bash --login  -eo pipefail {0}": "bash --login -eo pipefail /run/mayfly/step",
		`env -S "a b" sh -c ". {0}" ""`:  "env -S a b sh -c . /run/mayfly/step ",
	} {
		s, err := shellOf(name)
		var got []string
		for _, args := range s.commands {
			got = append(got, strings.Join(args, " "))
		}
		if err != nil || strings.Join(got, "|") != want {
			t.Errorf("shell %q: got %q, %v; want %q", name, got, err, want)
		}
	}
	for _, name := range []string{"cmd", "powershell", "perl", "zsh -e", `"" {0}`} {
		if s, err := shellOf(name); err == nil {
			t.Errorf("shell %q: got %v, want an error", name, s.commands)
		}
	}
	if got, want := splitArgs(`a "b c"d "" e`), []string{"a", "b cd", "", "e"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// What a box says of a program that it does not have is held back only if it is
// all that is said.
func TestWary(t *testing.T) {
	t.Parallel()
	const text = "mayfly: bash: command not found\n"
	for _, c := range []struct {
		said []string
		held bool
		want string
	}{
		{nil, false, ""},
		{[]string{text}, true, ""},
		{[]string{text, "more"}, false, text + "more"},
		{[]string{"before", text}, false, "before" + text},
		{[]string{text, text}, false, text + text},
		{[]string{text[:5], text[5:]}, false, text},
	} {
		got := ""
		w := &wary{text: text, next: func(_ time.Time, b []byte) error { got += string(b); return nil }}
		for _, s := range c.said {
			if err := w.write(time.Now(), []byte(s)); err != nil {
				t.Fatal(err)
			}
		}
		if w.held != c.held || got != c.want {
			t.Errorf("%q: held %v and passed %q on, want %v and %q", c.said, w.held, got, c.held, c.want)
		}
		if err := w.release(); err != nil || got != strings.Join(c.said, "") {
			t.Errorf("%q: %q after it was released, %v", c.said, got, err)
		}
	}
}
