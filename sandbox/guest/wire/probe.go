package wire

import "encoding/binary"

const (
	// MaxAttempts bounds a probe.
	MaxAttempts = 16
	// MaxText is the most that is sent, and the most that is kept of an answer:
	// a DNS message over UDP (RFC 1035, section 4.2.1).
	MaxText = 512

	attemptHead = 3*2 + 2 // socket, port
	maxProbe    = 4 + MaxAttempts*(attemptHead+4+16+4+MaxText)
	maxProbed   = MaxAttempts * (2 + 4 + MaxText)
)

// An Attempt is a socket to be made and, if To is not empty, connected. Then Text
// is sent. An answer is waited for if Text is not empty and the socket is for
// datagrams.
type Attempt struct {
	Domain, Type, Protocol uint16 // socket(2)
	Port                   uint16
	To                     string // an address in 4 or 16 bytes
	Text                   string
}

// An Outcome is what became of an attempt.
type Outcome struct {
	Errno uint16 // of the call that failed; 0 is none
	Reply string // the answer to a datagram
}

// AppendProbe appends a Probe frame of at most MaxAttempts attempts, which may
// take so many milliseconds together.
func AppendProbe(b []byte, wait uint32, attempts []Attempt) []byte {
	at := len(b)
	b = binary.BigEndian.AppendUint32(AppendHeader(b, Probe, 0), wait)
	for _, a := range attempts {
		for _, n := range []uint16{a.Domain, a.Type, a.Protocol, a.Port} {
			b = binary.BigEndian.AppendUint16(b, n)
		}
		b = appendString(appendString(b, a.To), a.Text)
	}
	PutHeader(b[at:], Probe, len(b)-at-HeaderSize)
	return b
}

// ParseProbe reads the payload of a Probe.
func ParseProbe(p []byte) (wait uint32, attempts []Attempt, err error) {
	if len(p) < 4 {
		return 0, nil, ErrFrame
	}
	wait, p = binary.BigEndian.Uint32(p), p[4:]
	for len(p) > 0 {
		if len(p) < attemptHead || len(attempts) == MaxAttempts {
			return 0, nil, ErrFrame
		}
		a := Attempt{
			Domain: binary.BigEndian.Uint16(p), Type: binary.BigEndian.Uint16(p[2:]),
			Protocol: binary.BigEndian.Uint16(p[4:]), Port: binary.BigEndian.Uint16(p[6:]),
		}
		var ok bool
		if a.To, p, ok = cutString(p[attemptHead:]); ok {
			a.Text, p, ok = cutString(p)
		}
		if n := len(a.To); !ok || n != 0 && n != 4 && n != 16 || len(a.Text) > MaxText {
			return 0, nil, ErrFrame
		}
		attempts = append(attempts, a)
	}
	return wait, attempts, nil
}

// AppendProbed appends a Probed frame. A reply longer than MaxText is cut.
func AppendProbed(b []byte, outcomes []Outcome) []byte {
	at := len(b)
	b = AppendHeader(b, Probed, 0)
	for _, o := range outcomes {
		b = appendString(binary.BigEndian.AppendUint16(b, o.Errno), o.Reply[:min(len(o.Reply), MaxText)])
	}
	PutHeader(b[at:], Probed, len(b)-at-HeaderSize)
	return b
}

// ParseProbed reads the payload of a Probed.
func ParseProbed(p []byte) (outcomes []Outcome, err error) {
	for len(p) > 0 {
		if len(p) < 2 || len(outcomes) == MaxAttempts {
			return nil, ErrFrame
		}
		o := Outcome{Errno: binary.BigEndian.Uint16(p)}
		var ok bool
		if o.Reply, p, ok = cutString(p[2:]); !ok || len(o.Reply) > MaxText {
			return nil, ErrFrame
		}
		outcomes = append(outcomes, o)
	}
	return outcomes, nil
}
