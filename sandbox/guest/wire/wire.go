// Package wire is the framed protocol between the agent and the guest, the
// program that is process 1 of every box. Both ends import it and nothing else
// knows it.
//
// A frame is a type byte, the length of the payload as a big-endian uint32, and
// the payload. There is one stream, and on it three conversations that do not
// wait for each other: the process (Start, Input, Stop, Stdout, Stderr, Exit),
// the transfer (Put or Get) and the probe. Each holds at most one thing at a time
// and frames of a conversation keep their order, so frames carry no numbers.
// There may be a second process beside the first: Select says, in each direction,
// which of the two the frames of processes that follow are about.
//
//	guest                                agent
//	  Hello ────────────────────────────▶
//	  ◀──────────────────────────── Start
//	  Stdout, Stderr… ──────────────────▶   at most Window unread bytes,
//	  ◀─────────────────────────── Grant…   more when the agent grants them
//	  ◀───── Input, InputEnd, Resize…       if Start asks for input; at most
//	  InputGrant… ──────────────────────▶   Window unread bytes of it
//	  ◀───────────────────────────── Stop   at any time
//	  Exit ─────────────────────────────▶   after the last output
//
//	  ◀─────── PutOpen, PutData…, PutEnd    at most Window unread bytes
//	  Grant… ───────────────────────────▶
//	  Result ───────────────────────────▶   early, if it goes wrong
//
//	  ◀────────────────────────── GetOpen
//	  FileData…, Result ────────────────▶
//	  ◀─────────────────────────── Cancel   ends the transfer under way, if any
//
//	  ◀──────────────────────────── Probe   what to try with sockets
//	  Probed ───────────────────────────▶   what became of it
//
// Because of the grants neither end ever has to stop reading: a step whose
// output nobody takes blocks, and a Stop still reaches it.
package wire

import (
	"encoding/binary"
	"errors"
	"strings"
)

// Version is the revision of the protocol. Both ends come from one build, so
// they either agree or something is wrong with the installation.
const Version = 4

// Address is the abstract socket address, in the network namespace of a box, of
// a guest whose runtime can hand it no descriptor.
const Address = "@mayfly-guest"

// A Type says what a frame is. The two directions share no type but Grant and
// Select, so an end that is fed its own output refuses it.
type Type byte

// Frames from the agent to the guest.
const (
	Start    Type = 1 + iota // run a process: AppendStart
	Stop                     // interrupt, terminate, kill: uint32 milliseconds between them
	PutOpen                  // unpack a tar stream: the directory
	PutData                  // the next bytes of it
	PutEnd                   // no more bytes
	GetOpen                  // send a file: AppendGet
	Cancel                   // give up the transfer; empty
	Input                    // the next bytes of the process's input
	InputEnd                 // no more of them; nothing to a terminal; empty
	Resize                   // of the terminal: AppendResize
	Probe                    // try sockets: AppendProbe
)

// Frames of both directions.
const (
	Grant  Type = 32 + iota // lets the other end send more bytes: uint32, headers included
	Select                  // what follows of processes is about this one: AppendSelect
)

// Processes is how many may run at a time: the first, and one beside it. A
// stream begins with the first selected, in both directions.
const Processes = 2

// Frames from the guest to the agent.
const (
	Hello      Type = 64 + iota // first frame of all: AppendHello
	Stdout                      // int64 Unix nanoseconds, then output
	Stderr                      // the same
	Exit                        // status byte, signal byte
	FileData                    // the next bytes of the file asked for
	Result                      // end of a transfer: Code byte, then a message
	InputGrant                  // lets the agent send more input: uint32, headers included
	Probed                      // what became of a Probe: AppendProbed
)

const (
	// HeaderSize is the type byte and the length.
	HeaderSize = 1 + 4

	// StampSize is the time at the front of a Stdout or Stderr payload.
	StampSize = 8

	// MaxData is the most bytes of output or file in one frame: what a pipe
	// holds on Linux, so that one read empties it.
	MaxData = 64 << 10

	// MaxStart is the most a Start may hold. Linux takes at most 6 MiB of
	// arguments and environment together (execve(2)), so more could not run.
	MaxStart = 6 << 20

	// MaxPath is the longest path that Linux takes (PATH_MAX).
	MaxPath = 4096

	// MaxMessage bounds the text of a Result: one line for a person.
	MaxMessage = 1 << 10

	// Window is how many bytes, headers included, may be on their way or
	// unread in one direction of one conversation: four full frames, so that
	// both ends can work at the same time. It is what a hostile peer can make
	// the other end keep in memory.
	Window = 4 * (HeaderSize + StampSize + MaxData)

	// GrantAt is how much is read before it is granted again: small enough
	// that the sender need not wait, large enough that short lines do not
	// each cost a frame in the other direction.
	GrantAt = Window / 4
)

// ErrFrame reports bytes that are no frame of this protocol.
var ErrFrame = errors.New("bad frame")

// A Side says which end of the stream sends.
type Side byte

// The two ends.
const (
	FromAgent Side = 1
	FromGuest Side = 2
)

// limit returns the longest payload that t may have when s sends it, or -1.
func limit(s Side, t Type) int {
	if s == FromAgent {
		switch t {
		case Start:
			return MaxStart
		case Stop, Grant:
			return 4
		case Select:
			return 1
		case PutOpen:
			return MaxPath
		case PutData, Input:
			return MaxData
		case PutEnd, Cancel, InputEnd:
			return 0
		case Resize:
			return sizeBytes
		case GetOpen:
			return 8 + MaxPath
		case Probe:
			return maxProbe
		}
		return -1
	}
	switch t {
	case Hello:
		return helloSize
	case Grant, InputGrant:
		return 4
	case Select:
		return 1
	case Stdout, Stderr:
		return StampSize + MaxData
	case Exit:
		return 2
	case FileData:
		return MaxData
	case Result:
		return 1 + MaxMessage
	case Probed:
		return maxProbed
	}
	return -1
}

// A Code says how a transfer ended.
type Code byte

// How a transfer can end. Any other code is a broken protocol.
const (
	OK       Code = iota
	NotExist      // no such file
	Refused       // the request breaks a rule of the contract; the message says which
	Failed        // the system said no; the message is its words
	Canceled      // as the agent asked
)

// A Source says what the standard input of a process is.
type Source byte

// Sources of input. Any other is a broken protocol.
const (
	Nothing  Source = iota // /dev/null
	Pipe                   // what Input carries, to its InputEnd
	Terminal               // a new terminal, which is the process's output too
)

// A Size is that of a terminal, in characters.
type Size struct{ Rows, Cols uint16 }

// A Command is the payload of a Start.
type Command struct {
	Input Source
	Size  Size // of a Terminal; zero for the others
	Alone bool // kill every other process of the box first
	User  string
	Dir   string
	Args  []string
	Env   []string
}

const (
	sizeBytes = 4
	// StartHead is what stands in front of the strings of a Start: the source,
	// the size, and 1 for a command that is to be alone.
	StartHead = 1 + sizeBytes + 1
)

// AppendHeader appends the header of a frame with n bytes of payload.
func AppendHeader(b []byte, t Type, n int) []byte {
	return binary.BigEndian.AppendUint32(append(b, byte(t)), uint32(n))
}

// PutHeader writes the header of a frame with n bytes of payload to the front of b.
func PutHeader(b []byte, t Type, n int) {
	b[0] = byte(t)
	binary.BigEndian.PutUint32(b[1:], uint32(n))
}

// AppendFrame appends a whole frame.
func AppendFrame(b []byte, t Type, payload string) []byte {
	return append(AppendHeader(b, t, len(payload)), payload...)
}

// AppendUint32 appends a frame that holds one number: Stop, Grant or InputGrant.
func AppendUint32(b []byte, t Type, n uint32) []byte {
	return binary.BigEndian.AppendUint32(AppendHeader(b, t, 4), n)
}

// ParseUint32 reads the payload of a Stop, Grant or InputGrant.
func ParseUint32(p []byte) (uint32, error) {
	if len(p) != 4 {
		return 0, ErrFrame
	}
	return binary.BigEndian.Uint32(p), nil
}

// AppendSelect appends a frame after which frames are about that process: 0 is
// the first, 1 the one beside it.
func AppendSelect(b []byte, process int) []byte {
	return append(AppendHeader(b, Select, 1), byte(process))
}

// ParseSelect reads the payload of a Select.
func ParseSelect(p []byte) (process int, err error) {
	if len(p) != 1 || p[0] >= Processes {
		return 0, ErrFrame
	}
	return int(p[0]), nil
}

const (
	magic     = "mayfly-guest"
	helloSize = len(magic) + 2
)

// AppendHello appends the frame by which a guest says that it is ready.
func AppendHello(b []byte) []byte {
	b = append(AppendHeader(b, Hello, helloSize), magic...)
	return binary.BigEndian.AppendUint16(b, Version)
}

// ParseHello returns the version that the guest speaks.
func ParseHello(p []byte) (version int, err error) {
	if len(p) != helloSize || string(p[:len(magic)]) != magic {
		return 0, ErrFrame
	}
	return int(binary.BigEndian.Uint16(p[len(magic):])), nil
}

// AppendResize appends a Resize frame.
func AppendResize(b []byte, s Size) []byte {
	return appendSize(AppendHeader(b, Resize, sizeBytes), s)
}

// ParseResize reads the payload of a Resize.
func ParseResize(p []byte) (Size, error) {
	if len(p) != sizeBytes {
		return Size{}, ErrFrame
	}
	return Size{binary.BigEndian.Uint16(p), binary.BigEndian.Uint16(p[2:])}, nil
}

func appendSize(b []byte, s Size) []byte {
	return binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(b, s.Rows), s.Cols)
}

// AppendStart appends a Start frame. Its payload is the head and the strings,
// each behind its length as a uint32, with the number of arguments before the
// arguments.
func AppendStart(b []byte, c Command) []byte {
	at := len(b)
	b = append(AppendHeader(b, Start, 0), byte(c.Input))
	b = append(appendSize(b, c.Size), flag(c.Alone))
	b = appendString(appendString(b, c.User), c.Dir)
	b = binary.BigEndian.AppendUint32(b, uint32(len(c.Args)))
	for _, s := range c.Args {
		b = appendString(b, s)
	}
	for _, s := range c.Env {
		b = appendString(b, s)
	}
	PutHeader(b[at:], Start, len(b)-at-HeaderSize)
	return b
}

func flag(b bool) byte {
	if b {
		return 1
	}
	return 0
}

func appendString(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...) // checked against MaxStart by the caller
}

// ParseStart reads the payload of a Start.
func ParseStart(p []byte) (Command, error) {
	if len(p) < StartHead || Source(p[0]) > Terminal || p[StartHead-1] > 1 {
		return Command{}, ErrFrame
	}
	size, err := ParseResize(p[1 : 1+sizeBytes])
	c := Command{Input: Source(p[0]), Size: size, Alone: p[StartHead-1] == 1}
	if err != nil || (c.Input != Terminal && size != Size{}) {
		return Command{}, ErrFrame
	}
	p = p[StartHead:]
	var ok bool
	if c.User, p, ok = cutString(p); !ok {
		return Command{}, ErrFrame
	}
	if c.Dir, p, ok = cutString(p); !ok || len(p) < 4 {
		return Command{}, ErrFrame
	}
	n := binary.BigEndian.Uint32(p)
	p = p[4:]
	for ; n > 0; n-- {
		var s string
		if s, p, ok = cutString(p); !ok {
			return Command{}, ErrFrame
		}
		c.Args = append(c.Args, s)
	}
	for len(p) > 0 {
		var s string
		if s, p, ok = cutString(p); !ok {
			return Command{}, ErrFrame
		}
		c.Env = append(c.Env, s)
	}
	return c, nil
}

func cutString(p []byte) (s string, rest []byte, ok bool) {
	if len(p) < 4 {
		return "", nil, false
	}
	n := binary.BigEndian.Uint32(p)
	p = p[4:]
	if uint64(n) > uint64(len(p)) {
		return "", nil, false
	}
	return string(p[:n]), p[n:], true
}

// AppendGet appends a GetOpen frame: uint64 most bytes wanted, then the path.
func AppendGet(b []byte, path string, most uint64) []byte {
	b = AppendHeader(b, GetOpen, 8+len(path))
	return append(binary.BigEndian.AppendUint64(b, most), path...)
}

// ParseGet reads the payload of a GetOpen.
func ParseGet(p []byte) (path string, most uint64, err error) {
	if len(p) < 8 {
		return "", 0, ErrFrame
	}
	return string(p[8:]), binary.BigEndian.Uint64(p), nil
}

// AppendExit appends an Exit frame: the exit status, or 0 and the signal that
// killed the process.
func AppendExit(b []byte, status, signal byte) []byte {
	return append(AppendHeader(b, Exit, 2), status, signal)
}

// maxSignal is SIGRTMAX on Linux.
const maxSignal = 64

// ParseExit reads the payload of an Exit. A status together with a signal, or a
// signal that does not exist, is no exit of any process.
func ParseExit(p []byte) (status, signal byte, err error) {
	if len(p) != 2 || p[1] > maxSignal || (p[0] != 0 && p[1] != 0) {
		return 0, 0, ErrFrame
	}
	return p[0], p[1], nil
}

// AppendResult appends a Result frame. A message longer than MaxMessage is cut.
func AppendResult(b []byte, c Code, message string) []byte {
	if len(message) > MaxMessage {
		message = strings.ToValidUTF8(message[:MaxMessage], "")
	}
	b = append(AppendHeader(b, Result, 1+len(message)), byte(c))
	return append(b, message...)
}

// ParseResult reads the payload of a Result.
func ParseResult(p []byte) (c Code, message string, err error) {
	if len(p) < 1 || Code(p[0]) > Canceled {
		return 0, "", ErrFrame
	}
	return Code(p[0]), string(p[1:]), nil
}

// ParseStamp splits the payload of a Stdout or Stderr into the time, in Unix
// nanoseconds, and the output, which is a part of p.
func ParseStamp(p []byte) (nanos int64, output []byte, err error) {
	if len(p) < StampSize {
		return 0, nil, ErrFrame
	}
	return int64(binary.BigEndian.Uint64(p)), p[StampSize:], nil
}

// PutStamp writes the time to the front of b.
func PutStamp(b []byte, nanos int64) {
	binary.BigEndian.PutUint64(b, uint64(nanos))
}
