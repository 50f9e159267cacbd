package runner

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/mask"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner/internal/command"
	"github.com/mayfly-ci/mayfly/sandbox"
)

// masksMax and maskBytes bound what the steps of a job may add to the mask: it
// is compiled again for each of them, in the worst case.
const (
	masksMax  = 500
	maskBytes = 1 << 20
)

var errMasks = fmt.Errorf("add-mask: more than %d values or %d bytes of them: what follows could not be masked", masksMax, maskBytes)

// A heard is what the steps of a job have said so far.
type heard struct {
	masks    map[[sha256.Size]byte]bool // values of add-mask
	bytes    int                        // of them
	matchers bool                       // the job was told that they are ignored
}

// A listener hears the workflow commands in what one process prints, before the
// mask does.
type listener struct {
	stream *stream
	heard  *heard
	step   int
	debug  bool // debug messages are shown

	mu      sync.Mutex
	at      time.Time
	scans   []*command.Scanner // one for each output of the process
	token   string             // that ends stop-commands; "" while commands are heard
	outputs map[string]string
	size    int   // bytes of outputs
	refused error // why the step fails although its process did not
}

func (s *steps) listen(step *current) *listener {
	return &listener{stream: s.out, heard: &s.heard, step: step.index, debug: s.debug, outputs: map[string]string{}}
}

// output is one output of the process: a line of it does not mix with a line of
// another.
func (l *listener) output() sandbox.Output {
	plain := func(b []byte) error { return l.stream.write(l.at, l.step, b) }
	scan := command.NewScanner(plain, l.command)
	l.scans = append(l.scans, scan)
	return func(at time.Time, b []byte) error {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.at = at
		return scan.Write(b)
	}
}

// finish hears the last line, which may have no end.
func (l *listener) finish() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var err error
	for _, s := range l.scans {
		err = errors.Join(err, s.Flush())
	}
	return err
}

// command does what a line says and shows it as it stands, but for a value that
// must not be shown and for what was printed to be shown on demand only.
func (l *listener) command(line, end []byte) (shown bool, err error) {
	c, ok := command.Parse(line)
	if ok && l.token != "" {
		if c.Name == l.token {
			l.token = ""
		}
		ok = false
	}
	switch {
	case ok && c.Name == "add-mask":
		return true, l.addMask(c.Message, end)
	case ok && c.Name == "debug" && !l.debug:
		return false, nil
	}
	err = errors.Join(l.stream.write(l.at, l.step, line), l.stream.write(l.at, l.step, end))
	if err != nil || !ok {
		return true, err
	}
	return true, l.obey(c)
}

func (l *listener) obey(c command.Command) error {
	switch c.Name {
	case "error", "warning", "notice":
		return l.stream.annotate(l.annotation(c))
	case "set-output":
		l.setOutput(c)
	case "save-state":
		l.wants(c, "name") // for a later part of the same action, which none has
	case "stop-commands":
		l.stop(c.Message)
	case "set-env":
		l.refuse("set-env: it is not obeyed, because whoever gets a line into the log could use it; write NAME=VALUE to the file $GITHUB_ENV")
	case "add-path":
		l.refuse("add-path: it is not obeyed, because whoever gets a line into the log could use it; write the directory to the file $GITHUB_PATH")
	case "add-matcher", "remove-matcher":
		if !l.heard.matchers {
			l.heard.matchers = true
			l.stream.notice(l.step, c.Name+": problem matchers are not supported yet, and ignored")
		}
	}
	return nil
}

// known says whether a name means something, so that it cannot be the token of
// stop-commands: any line of it would end that.
func known(name string) bool {
	switch name {
	case "error", "warning", "notice", "debug", "group", "endgroup", "echo", "add-mask", "add-matcher", "remove-matcher",
		"set-output", "save-state", "set-env", "add-path", "stop-commands":
		return true
	}
	return false
}

// refuse lets the step fail at its end, and says why now.
func (l *listener) refuse(why string) {
	l.stream.notice(l.step, why)
	if l.refused == nil {
		name, _, _ := strings.Cut(why, ":")
		l.refused = fmt.Errorf("workflow command %s: refused", name)
	}
}

// wants returns a property, and refuses a command without it.
func (l *listener) wants(c command.Command, property string) (string, bool) {
	v := c.Properties[property]
	if v == "" {
		l.refuse(c.Name + ": the property " + property + " is missing")
	}
	return v, v != ""
}

func (l *listener) setOutput(c command.Command) {
	name, ok := l.wants(c, "name")
	if l.size += len(name) + len(c.Message); ok && l.size > commandFileMax {
		l.refuse("set-output: the outputs of a step have at most 1 MiB")
		return
	}
	if ok {
		l.outputs[name] = c.Message
	}
}

func (l *listener) stop(token string) {
	if token = strings.ToLower(token); token == "" || known(token) {
		l.refuse("stop-commands: the token is empty or the name of a command: anybody could guess it")
		return
	}
	l.token = token
}

// addMask masks a value from here on, in its own line too.
func (l *listener) addMask(value string, end []byte) error {
	id := sha256.Sum256([]byte(value))
	if value != "" && !l.heard.masks[id] {
		if l.heard.masks == nil {
			l.heard.masks = map[[sha256.Size]byte]bool{}
		}
		l.heard.masks[id] = true
		if l.heard.bytes += len(value); len(l.heard.masks) > masksMax || l.heard.bytes > maskBytes {
			return errMasks
		}
		secret := creds.NewSecret(value)
		if mask.New([]creds.Secret{secret}).Err() != nil {
			l.stream.notice(l.step, fmt.Sprintf("add-mask: a value under %d bytes is not masked: too much else would be", mask.MinLen))
		} else {
			l.stream.concealNext(secret)
		}
	}
	return l.stream.writeBefore(l.at, l.step, append([]byte("::add-mask::"+mask.Text), end...))
}

func (l *listener) annotation(c command.Command) providers.Annotation {
	number := func(property string) int {
		n, err := strconv.Atoi(c.Properties[property])
		if err != nil || n < 0 {
			return 0
		}
		return n
	}
	return providers.Annotation{
		Step: l.step, Level: providers.Level(c.Name), Title: c.Properties["title"], Message: c.Message,
		File: strings.TrimPrefix(c.Properties["file"], sandbox.Workspace+"/"),
		Line: number("line"), EndLine: number("endline"), Column: number("col"), EndColumn: number("endcolumn"),
	}
}
