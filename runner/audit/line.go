package audit

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// maxLine bounds a line, in bytes. An event is a sentence; what is longer was
// made by a job, and a reader must not have to hold it.
const maxLine = 256 << 10

// Actions of the record itself.
const (
	actionContinue = "audit.continue" // Object: the file that follows
	actionRepaired = "audit.repaired" // Detail: bytes, sha256 of what was passed over
)

// A Head is a place in the chain: the last line that somebody knows. Kept
// where the agent cannot write, it proves that nothing before it was changed
// or cut off. The zero Head is the place before the first line.
type Head struct {
	Seq  uint64 `json:"seq"`
	Hash string `json:"hash"` // 64 hexadecimal digits, "" at the beginning
}

// String returns "seq:hash", which ParseHead reads.
func (h Head) String() string { return strconv.FormatUint(h.Seq, 10) + ":" + h.prev() }

// ParseHead reads what Head.String and "mayfly audit verify" print.
func ParseHead(s string) (Head, error) {
	seq, hash, _ := strings.Cut(s, ":")
	n, err := strconv.ParseUint(seq, 10, 64)
	if err != nil || !isHash(hash) {
		return Head{}, fmt.Errorf("head %q: want seq:hash as \"audit verify\" prints it", s)
	}
	if n == 0 {
		return Head{}, nil
	}
	return Head{n, hash}, nil
}

// prev is what the next line says it follows.
func (h Head) prev() string {
	if h.Hash == "" {
		return strings.Repeat("0", 2*sha256.Size)
	}
	return h.Hash
}

func isHash(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == sha256.Size && strings.ToLower(s) == s
}

// A record is a line without its hash. The order of the fields is the order on
// disk, and so part of the format.
type record struct {
	Seq  uint64 `json:"seq"`
	Prev string `json:"prev"`
	Event
}

const hashField = `,"hash":"`

// hashTail is the length of the end of every line: ,"hash":"…"}.
const hashTail = len(hashField) + 2*sha256.Size + len(`"}`)

// encode returns the line of e behind h, newline included, and the new head.
func encode(h Head, e Event) ([]byte, Head, error) {
	e.Time = e.Time.UTC() // without this one instant has many spellings
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(record{h.Seq + 1, h.prev(), e}); err != nil {
		return nil, Head{}, fmt.Errorf("event %s: %w", e.Action, err)
	}
	body := bytes.TrimSuffix(b.Bytes(), []byte("\n"))
	next := Head{h.Seq + 1, hashOf(body)}
	line := append(body[:len(body)-1], hashField+next.Hash+"\"}\n"...)
	if len(line) > maxLine {
		return nil, Head{}, fmt.Errorf("event %s: %d bytes, at most %d fit a line", e.Action, len(line), maxLine)
	}
	return line, next, nil
}

// Why a line is not the next one of the chain.
var (
	errTorn   = errors.New("not a line of the record: edited, or torn and never closed")
	errEdited = errors.New("edited: the line does not have the hash that it states")
)

// decode reads one line, without its newline, and checks it against its own
// hash. It returns errTorn if this never was a whole line.
func decode(line []byte) (record, Head, error) {
	cut := len(line) - hashTail
	if cut < 1 || !bytes.HasPrefix(line[cut:], []byte(hashField)) || !bytes.HasSuffix(line, []byte(`"}`)) {
		return record{}, Head{}, errTorn
	}
	stated := string(line[cut+len(hashField) : len(line)-2])
	body := append(bytes.Clone(line[:cut]), '}')
	var r record
	if !isHash(stated) || json.Unmarshal(body, &r) != nil {
		return record{}, Head{}, errTorn
	}
	if hashOf(body) != stated {
		return r, Head{}, errEdited
	}
	// One event has one spelling: no second "action" hides behind the first.
	prev := Head{r.Seq - 1, r.Prev}
	again, head, err := encode(prev, r.Event)
	if err != nil || r.Seq == 0 || !bytes.Equal(bytes.TrimSuffix(again, []byte("\n")), line) {
		return r, Head{}, errors.New("not in the form that Mayfly writes")
	}
	return r, head, nil
}

func hashOf(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
