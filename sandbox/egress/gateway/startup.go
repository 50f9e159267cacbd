package gateway

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
)

// How a PostgreSQL connection begins (the manual's "Message Formats"): packets
// without a type, of which the first four bytes are the length, their own
// included, and the next four say what follows.
const (
	codeCancel = 80877102
	codeTLS    = 80877103
	codeGSS    = 80877104
	codeThree  = 3 << 16 // and the minor version

	startupMax  = 10_000 // as the server's own
	passwordMax = 1_000
	cancelMax   = 256 // bytes of a secret
)

// errStartup is of a job that does not speak PostgreSQL.
var errStartup = errors.New("not the beginning of a PostgreSQL connection")

// readPacket reads a packet, and nothing of what follows: TLS may.
func readPacket(r io.Reader) (code uint32, body []byte, err error) {
	var head [8]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, fmt.Errorf("%w: %w", errStartup, err)
	}
	size := binary.BigEndian.Uint32(head[:4])
	if size < 8 || size > startupMax {
		return 0, nil, errStartup
	}
	body = make([]byte, size-8)
	if _, err := io.ReadFull(r, body); err != nil {
		return 0, nil, fmt.Errorf("%w: %w", errStartup, err)
	}
	return binary.BigEndian.Uint32(head[4:]), body, nil
}

// A startup is what a job wants of a session.
type startup struct {
	user, database string
	settings       map[string]string // of the session, without the above
	older          bool              // asks for more than version 3.0
	unknown        []string          // options of the protocol
}

// parseStartup reads the body of a startup packet: names and values, each ended
// by NUL, and a NUL. Of a name that comes twice servers may take either.
func parseStartup(code uint32, body []byte) (startup, error) {
	s := startup{settings: map[string]string{}, older: code > codeThree}
	if code>>16 != codeThree>>16 {
		return s, errStartup
	}
	for {
		var name, value string
		var ok bool
		if name, body, ok = cutNUL(body); !ok {
			return s, errStartup
		}
		if name == "" {
			break
		}
		if value, body, ok = cutNUL(body); !ok {
			return s, errStartup
		}
		if _, twice := s.settings[name]; twice {
			return s, errStartup
		}
		if strings.HasPrefix(name, "_pq_.") {
			s.unknown = append(s.unknown, name)
		}
		s.settings[name] = value
	}
	if len(body) > 0 {
		return s, errStartup
	}
	for _, name := range s.unknown {
		delete(s.settings, name)
	}
	s.user, s.database = s.settings["user"], s.settings["database"]
	if s.database == "" {
		s.database = s.user
	}
	delete(s.settings, "user")
	delete(s.settings, "database")
	return s, nil
}

func cutNUL(b []byte) (text string, rest []byte, ok bool) {
	before, rest, ok := bytes.Cut(b, []byte{0})
	return string(before), rest, ok
}

// readPassword reads a PasswordMessage.
func readPassword(r io.Reader) (string, error) {
	var head [5]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return "", fmt.Errorf("no password came: %w", err)
	}
	size := binary.BigEndian.Uint32(head[1:])
	if head[0] != 'p' || size < 5 || size > passwordMax {
		return "", errors.New("not a password message")
	}
	body := make([]byte, size-4)
	if _, err := io.ReadFull(r, body); err != nil {
		return "", fmt.Errorf("no password came: %w", err)
	}
	password, rest, ok := cutNUL(body)
	if !ok || len(rest) > 0 {
		return "", errors.New("not a password message")
	}
	return password, nil
}
