package command

import "bytes"

const (
	mark  = "::"
	space = " \t\v\f"

	// maxIndent is how much white space may stand before a command, in bytes.
	maxIndent = 256

	// MaxLine is how long the line of a command may be, in bytes. A longer one
	// is not held back, and is no command.
	MaxLine = 1 << 20
)

// A Scanner cuts the lines that may be commands out of a stream. All other
// bytes go on at once and unchanged, but for the beginning of a line that may
// still become one. What it does depends on the bytes of the stream alone and
// never on how they were cut. It is not safe for concurrent use.
type Scanner struct {
	plain   func(b []byte) error
	command func(line, end []byte) (shown bool, err error)

	held    []byte // the beginning of a line that may be a command
	midline bool   // the line that is being read is none
	dropCR  bool   // the last byte was the \r of a line that was dropped
}

// NewScanner returns a Scanner. A line that begins like a command is given to
// command once it is whole, and what ends it beside it: "\n", "\r" or nothing.
// The Scanner forgets both; command passes them on, and says if it did, so that
// of "\r\n" nothing is left over. Neither function may keep its slices.
func NewScanner(plain func(b []byte) error, command func(line, end []byte) (shown bool, err error)) *Scanner {
	return &Scanner{plain: plain, command: command}
}

// Write takes bytes of the stream. An error is that of a function, and what was
// written is taken all the same, as far as it was before the error.
func (s *Scanner) Write(b []byte) error {
	for len(b) > 0 {
		n, err := s.step(b)
		if err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// Flush ends the stream: a line needs no end to be a command.
func (s *Scanner) Flush() error {
	line := s.held
	s.held, s.midline, s.dropCR = line[:0], false, false
	switch {
	case len(line) == 0:
		return nil
	case !candidate(line):
		return s.plain(line)
	}
	_, err := s.command(line, nil)
	return err
}

// step deals with the beginning of b, which is not empty, and returns how much
// of it.
func (s *Scanner) step(b []byte) (int, error) {
	if s.dropCR {
		if s.dropCR = false; b[0] == '\n' {
			return 1, nil
		}
	}
	if s.midline || len(s.held) == 0 {
		if n := s.passing(b); n > 0 {
			return n, s.plain(b[:n])
		}
	}
	return s.hold(b)
}

// passing returns how much of b is in lines that are no commands, and notes
// where it ends. It is at the beginning of a line unless midline is set.
func (s *Scanner) passing(b []byte) int {
	from := 0 // where a command can begin at the earliest
	if s.midline {
		if from = end(b); from < 0 {
			return len(b)
		}
	}
	for {
		i := bytes.Index(b[from:], []byte(mark))
		if i < 0 {
			break
		}
		i += from
		if start := indent(b, from, i); start >= 0 {
			s.midline = false
			return start
		}
		// Past the line: it has the mark somewhere in its middle.
		n := end(b[i:])
		if n < 0 {
			s.midline = true
			return len(b)
		}
		from = i + n
	}
	return s.tail(b, from)
}

// tail returns how much of b goes on if its last line may still become a
// command: there is no mark behind from.
func (s *Scanner) tail(b []byte, from int) int {
	last := len(b)
	if last > from && b[last-1] == mark[0] {
		last--
	}
	start := indent(b, from, last)
	s.midline = start < 0
	if s.midline {
		return len(b)
	}
	return start
}

// indent returns where the line begins in which only white space stands before
// i, and -1 if something else does, or too much of it.
func indent(b []byte, from, i int) int {
	start := i
	for start > from && isSpace(b[start-1]) && i-start <= maxIndent {
		start--
	}
	if i-start > maxIndent || start > from && !isEnd(b[start-1]) {
		return -1
	}
	return start
}

// end returns the offset behind the first end of a line, or -1.
func end(b []byte) int {
	n := bytes.IndexByte(b, '\n')
	if n < 0 {
		n = len(b)
	}
	if r := bytes.IndexByte(b[:n], '\r'); r >= 0 {
		n = r
	}
	if n == len(b) {
		return -1
	}
	return n + 1
}

func isSpace(c byte) bool { return c == ' ' || c == '\t' || c == '\v' || c == '\f' }

// isEnd knows that \r ends a line too, as in the runner of GitHub.
func isEnd(c byte) bool { return c == '\n' || c == '\r' }

// hold takes b to the line that is held back, up to the end of that line.
func (s *Scanner) hold(b []byte) (int, error) {
	n := end(b)
	whole := n >= 0
	if whole {
		n--
	} else {
		n = len(b)
	}
	n = min(n, MaxLine+1-len(s.held))
	line := append(s.held, b[:n]...)
	s.held = line[:0]
	switch {
	case !possible(line), len(line) > MaxLine:
		s.midline = true
		return n, s.plain(line)
	case !whole:
		s.held = line
		return n, nil
	case !candidate(line):
		return n + 1, s.plain(append(line, b[n]))
	}
	shown, err := s.command(line, b[n:n+1])
	s.dropCR = !shown && b[n] == '\r'
	return n + 1, err
}

// candidate says whether a line begins like a command, and possible whether it
// may still do so when more of it comes.
func candidate(line []byte) bool {
	text := bytes.TrimLeft(line, space)
	return len(line)-len(text) <= maxIndent && bytes.HasPrefix(text, []byte(mark))
}

func possible(line []byte) bool {
	text := bytes.TrimLeft(line, space)
	return len(line)-len(text) <= maxIndent && (len(text) < len(mark) && bytes.HasPrefix([]byte(mark), text) || bytes.HasPrefix(text, []byte(mark)))
}
