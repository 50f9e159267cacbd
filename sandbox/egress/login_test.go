package egress_test

import (
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

func TestMatchCommand(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		pattern, command string
		want             bool
	}{
		{"git-upload-pack 'acme/app.git'", "git-upload-pack 'acme/app.git'", true},
		{"git-upload-pack 'acme/app.git'", "git-upload-pack acme/app.git", true},
		{"git-upload-pack 'acme/app.git'", "git-upload-pack '/acme/app.git'", false},
		{"git-upload-pack acme/*.git", "git-upload-pack 'acme/app.git'", true},
		{"git-upload-pack acme/*.git", "git-upload-pack 'acme/app.git.git'", true},
		{"git-upload-pack acme/*.git", "git-upload-pack 'acme/.git'", false},
		{"git-upload-pack acme/*.git", "git-upload-pack 'acme/a b.git'", false},
		{"git-upload-pack acme/*", "git-upload-pack 'acme/..'", false},
		{"git-upload-pack */*", "git-upload-pack 'acme/app/x'", false},
		{"git-upload-pack *", "git-upload-pack --upload-pack", false},
		{"x -*", "x -la", true},
		{"x a*b*c", "x a1b2b3c", true},
		{"x a*b*c", "x abc", false},
		{"x 'a b'", "x 'a b'", true},
		{"x 'a b'", "x a b", false},
		{"x *", "x 'a'b", false},
		{"x *", "x a\n", false},
		{"x *", "x a;id", false},
		{"x *", "x $a", false},
		{"x *", "x `id`", false},
		{"x *", "x ~", false},
		{"x *", "x a ", false},
		{"x *", "x  a", false},
		{"x *", "x 'a", false},
		{"x *", "x ''", false},
		{"x *", "x é", false},
		{"* *", "A=b c", false},
		{"*", "anything; at all", true},
		{"*", "", true},
		{"", "", false},
		{"x; y", "x; y", false},
	} {
		if got := egress.MatchCommand(c.pattern, c.command); got != c.want {
			t.Errorf("MatchCommand(%q, %q): got %v", c.pattern, c.command, got)
		}
	}
}

// FuzzCommand: what is matched is for a shell what it is for us.
func FuzzCommand(f *testing.F) {
	f.Add("git-upload-pack '*/*.git'", "git-upload-pack 'acme/app.git'")
	f.Add("x * y", "x a=b y")
	f.Add("*", "A=b c")
	f.Add("x 'a b' *", "x 'a b' c")
	f.Fuzz(func(t *testing.T, pattern, command string) {
		if shape := egress.CommandShape(command); strings.Contains(strings.TrimSuffix(shape, " *"), " ") && !strings.HasPrefix(command, "'") {
			t.Errorf("CommandShape(%q): got %q", command, shape)
		}
		if err := egress.CheckCommand(pattern); err != nil {
			if egress.MatchCommand(pattern, command) {
				t.Errorf("%q matches %q, and is refused: %v", pattern, command, err)
			}
			return
		}
		if pattern == "*" || !egress.MatchCommand(pattern, command) {
			return
		}
		if strings.ContainsFunc(command, func(c rune) bool { return c < ' ' || c > '~' }) {
			t.Fatalf("%q matches %q", pattern, command)
		}
		var outside strings.Builder // of quotes
		for i, part := range strings.Split(command, "'") {
			if i%2 == 0 {
				outside.WriteString(part)
			}
		}
		if strings.ContainsAny(outside.String(), "|&;<>()$`\\\"*?[]#~!{}") || strings.Count(command, "'")%2 != 0 {
			t.Fatalf("%q matches %q, in which a shell finds more", pattern, command)
		}
	})
}

// TestShell: a shell takes what is matched apart as the pattern was.
func TestShell(t *testing.T) {
	t.Parallel()
	for command, want := range map[string][]string{
		"printf '%s|' 'a b' c":              {"a b", "c"},
		"printf '%s|' '$(id)' a/b=c":        {"$(id)", "a/b=c"},
		"printf '%s|' '`id`' 'a\\' -x %,@:": {"`id`", "a\\", "-x", "%,@:"},
	} {
		if !egress.MatchCommand(command, command) {
			t.Errorf("%q does not match itself", command)
		}
		out, err := exec.Command("sh", "-c", command).Output()
		if got := strings.Split(strings.TrimSuffix(string(out), "|"), "|"); err != nil || !slices.Equal(got, want) {
			t.Errorf("sh -c %q: got %q %v, want %q", command, got, err, want)
		}
	}
}

func TestCheckHostKey(t *testing.T) {
	t.Parallel()
	const good = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl"
	for line, want := range map[string]bool{
		good: true, good + " comment": true, "ssh-rsa" + strings.TrimPrefix(good, "ssh-ed25519"): false, "": false, "ssh-ed25519": false,
		"ssh-ed25519 AAAA": false, "ssh-ed25519 !": false, "github.com " + good: false, "ssh-dss AAAAB3NzaC1kc3M=": false,
	} {
		if err := egress.CheckHostKey(line); (err == nil) != want {
			t.Errorf("CheckHostKey(%q): got %v", line, err)
		}
	}
}
