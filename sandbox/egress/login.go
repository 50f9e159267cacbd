package egress

import (
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// The protocols that are no HTTP and end at the gateway, which logs in with a
// credential that the job does not hold. Their rules have an Inject.
const (
	// SSH is ended under the host key of the job (see Host), and begins anew with
	// the key of the lease. What a channel may do the rule's Session says.
	SSH Protocol = "ssh"
	// Postgres is PostgreSQL 3.0. Its TLS, if the job wants any, ends as that of
	// HTTPS does; towards the destination there is always TLS, verified for the
	// name, and SCRAM-SHA-256.
	Postgres Protocol = "postgres"
)

// The credentials of these protocols.
const (
	// SSHKey is a private key as PEM, perhaps with an OpenSSH certificate for it in
	// the line behind. User is who logs in, and the job must ask for the same.
	SSHKey Place = "ssh-key"
	// Password is that of User at the database Name. The job shows the placeholder.
	Password Place = "password"
)

// A Host is a Gateway that carries SSH. Others refuse such rules.
type Host interface {
	// HostKey returns the public key, as a line of authorized_keys without its
	// newline, that every SSH destination of an open gateway with a box of its own
	// shows to the job. It is this name's alone, and gone with Close.
	HostKey(name string) ([]byte, error)
}

// A Session says what an SSH connection is for. Ports, agents and X11 are never
// forwarded, and no variable is passed.
type Session struct {
	// HostKeys are the destination's, one of which it must prove: "ssh-ed25519
	// AAAA…", as in authorized_keys. One at least.
	HostKeys []string
	// Commands are patterns of what may be executed: see MatchCommand. "*" alone is
	// anything.
	Commands []string `json:",omitempty"`
	// Shell lets a login shell through, and a terminal for it and for commands.
	Shell bool `json:",omitempty"`
	SFTP  bool `json:",omitempty"` // lets the subsystem sftp through: all files of the user
}

// Check says why the session cannot be enforced as written.
func (s Session) Check() error {
	var all []error
	if len(s.HostKeys) == 0 {
		all = append(all, errors.New("host keys: one at least is needed; who answers is not known otherwise"))
	}
	for _, k := range s.HostKeys {
		all = append(all, CheckHostKey(k))
	}
	if len(s.Commands) == 0 && !s.Shell && !s.SFTP {
		all = append(all, errors.New("commands, shell or sftp: a connection that may do nothing is of no use; * is any command"))
	}
	for _, p := range s.Commands {
		all = append(all, CheckCommand(p))
	}
	return errors.Join(all...)
}

// CheckCommand says why a pattern is none that MatchCommand understands.
func CheckCommand(pattern string) error {
	if _, ok := words(pattern, true); !ok && pattern != "*" {
		return fmt.Errorf("command %q: plain words, or such in single quotes, with one blank between are needed; * in a word is any run of plain characters, and * alone any command", pattern)
	}
	return nil
}

// CheckHostKey looks at the form of a key (RFC 4253 section 6.6); a gateway looks
// at the rest.
func CheckHostKey(line string) error {
	kind, rest, _ := strings.Cut(line, " ")
	text, _, _ := strings.Cut(rest, " ")
	known := []string{"ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521", "ssh-rsa"}
	blob, err := base64.StdEncoding.DecodeString(text)
	if !slices.Contains(known, kind) || err != nil || len(blob) < 4+len(kind) ||
		binary.BigEndian.Uint32(blob) != uint32(len(kind)) || string(blob[4:4+len(kind)]) != kind {
		return fmt.Errorf("host key %q: the kind and the key are needed, as ssh-keyscan prints them behind the name (kinds: %s)", line, strings.Join(known, ", "))
	}
	return nil
}

// MatchCommand says whether a command is one of a pattern. Both are words, plain
// or in single quotes, as git quotes them; what a shell takes for more than a word
// is matched by "*" alone. In a word of the pattern "*" is a run of one or more
// letters, digits, and ".", "_", "-", "+", ",", "@", ":", "%", but no leading "-",
// and no path with "." or ".." in it.
func MatchCommand(pattern, command string) bool {
	if pattern == "*" {
		return true
	}
	want, ok := words(pattern, true)
	got, plain := words(command, false)
	if !ok || !plain || len(want) != len(got) {
		return false
	}
	for i, w := range want {
		if !matchWord(w, got[i]) {
			return false
		}
	}
	return true
}

func matchWord(want, got string) bool {
	if !strings.Contains(want, "*") {
		return want == got
	}
	if strings.HasPrefix(got, "-") && !strings.HasPrefix(want, "-") {
		return false // it would be an option
	}
	for segment := range strings.SplitSeq(got, "/") {
		if segment == "." || segment == ".." {
			return false
		}
	}
	wants, gots := strings.Split(want, "/"), strings.Split(got, "/")
	return slices.EqualFunc(wants, gots, matchSegment)
}

// matchSegment compares what is between slashes.
func matchSegment(want, got string) bool {
	parts := strings.Split(want, "*")
	if len(parts) == 1 {
		return want == got
	}
	rest, ok := strings.CutPrefix(got, parts[0])
	if !ok {
		return false
	}
	last := parts[len(parts)-1]
	for _, p := range parts[1 : len(parts)-1] {
		// The first fit leaves most for those that follow; one character is the star's.
		at := -1
		if len(rest) > 0 {
			at = strings.Index(rest[1:], p)
		}
		if at < 0 || strings.ContainsFunc(rest[:at+1], func(c rune) bool { return !wild(c) }) {
			return false
		}
		rest = rest[at+1+len(p):]
	}
	run, ok := strings.CutSuffix(rest, last)
	return ok && run != "" && !strings.ContainsFunc(run, func(c rune) bool { return !wild(c) })
}

// wild reports what "*" stands for.
func wild(c rune) bool { return tokenChar(c) || strings.ContainsRune(".+,@:%", c) }

// words takes a command apart, if every shell would take it apart in the same
// way and replace nothing in it.
func words(s string, pattern bool) ([]string, bool) {
	var all []string
	for s != "" {
		word, rest, ok := firstWord(s, pattern)
		if !ok || len(all) == 0 && strings.Contains(word, "=") {
			return nil, false
		}
		all = append(all, word)
		if rest == "" {
			return all, true
		}
		if s, ok = strings.CutPrefix(rest, " "); !ok || s == "" {
			return nil, false
		}
	}
	return nil, false
}

func firstWord(s string, pattern bool) (word, rest string, ok bool) {
	if quoted, is := strings.CutPrefix(s, "'"); is {
		word, rest, ok = strings.Cut(quoted, "'")
		return word, rest, ok && word != "" && !strings.ContainsFunc(word, func(c rune) bool { return c != ' ' && unprintable(c) })
	}
	end := strings.IndexFunc(s, func(c rune) bool { return !wild(c) && c != '/' && c != '=' && (c != '*' || !pattern) })
	if end < 0 {
		end = len(s)
	}
	return s[:end], s[end:], end > 0
}

// CommandShape is a command without what may be secret in it: its first word, if
// that is plain, and "*" for the rest.
func CommandShape(command string) string {
	word, rest, ok := firstWord(command, false)
	switch {
	case !ok || len(word) > 100 || strings.Contains(word, "=") || rest != "" && rest[0] != ' ':
		return "*"
	case rest == "":
		return word
	}
	return word + " *"
}

// checkLogin says why the credential of a login cannot be used as it is written.
func (in Injection) checkLogin() error {
	var all []error
	if in.Lease == "" {
		all = append(all, errors.New("a credential without a lease"))
	}
	issued := !in.Value.IsZero() || in.Placeholder != ""
	for what, text := range map[string]string{"user": in.User, "database": in.Name} {
		if strings.ContainsFunc(text, unprintable) || len(text) > 63 {
			all = append(all, fmt.Errorf("%s: under 64 bytes of printable ASCII without blanks are needed", what))
		}
		if needed := what == "user" || in.As == Password; issued && needed && text == "" {
			all = append(all, fmt.Errorf("%s: is empty", what))
		}
	}
	if in.As == SSHKey && in.Name != "" || in.Strip || in.Pass {
		all = append(all, errors.New("a login has no database with ssh, and no other credentials to strip or to pass"))
	}
	if in.As == Password && issued {
		all = append(all, checkCredential(in.Value, in.Placeholder))
	}
	return errors.Join(all...)
}
