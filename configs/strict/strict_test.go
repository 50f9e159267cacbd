package strict

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"
)

type inner struct {
	Self Node `yaml:",self"`
	A    int  `yaml:"a"`
}

type sample struct {
	Text     string            `yaml:"text,required"`
	Number   int               `yaml:"number"`
	Small    uint8             `yaml:"small"`
	Yes      bool              `yaml:"yes"`
	Wait     time.Duration     `yaml:"wait"`
	Addr     netip.Addr        `yaml:"addr"`
	List     []string          `yaml:"list"`
	Map      map[string]string `yaml:"map"`
	Inner    inner             `yaml:"inner"`
	Pointer  *int              `yaml:"pointer"`
	Part     Node              `yaml:"part"`
	Strange  chan int          `yaml:"strange"`
	Untagged string
}

func TestDecode(t *testing.T) {
	t.Parallel()
	n, err := Parse([]byte(`
text: "5432"
number: -7
small: 255
yes: true
wait: 1h30m
addr: 10.0.0.1
list: [a, b]
map: {k: v}
inner:
  a: 1
pointer: 3
part: [1, {x: y}]
`), "f.yaml")
	if err != nil {
		t.Fatal(err)
	}
	got := sample{Untagged: "as it was"}
	if err := n.Decode(&got); err != nil {
		t.Fatal(err)
	}
	if got.Pointer == nil || *got.Pointer != 3 || got.Inner.Self.Pos() != (Pos{"f.yaml", 11, 3}) {
		t.Errorf("Decode: got pointer %v, inner at %v", got.Pointer, got.Inner.Self.Pos())
	}
	if part, err := got.Part.JSON(); err != nil || string(part) != `[1,{"x":"y"}]` {
		t.Errorf("JSON: got %s, %v", part, err)
	}
	got.Pointer, got.Part, got.Inner.Self = nil, Node{}, Node{}
	want := sample{
		Text: "5432", Number: -7, Small: 255, Yes: true, Wait: 90 * time.Minute, Addr: netip.MustParseAddr("10.0.0.1"),
		List: []string{"a", "b"}, Map: map[string]string{"k": "v"}, Inner: inner{A: 1}, Untagged: "as it was",
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("Decode: got %+v, want %+v", got, want)
	}
}

func TestErrors(t *testing.T) {
	t.Parallel()
	deep := strings.Repeat("[", 70) + strings.Repeat("]", 70)
	for _, c := range []struct{ src, want string }{
		{"", "f.yaml:1: file is empty"},
		{"# nothing", "f.yaml:1: file is empty"},
		{"null", "f.yaml:1:1: file is empty"},
		{"a: \xff", "f.yaml:1: text is not UTF-8"},
		{"a: b\n\nc: \xff", "f.yaml:3: text is not UTF-8"},
		{"text: [", "f.yaml:1: did not find expected node content"},
		{"a: b\n  c: d", "f.yaml:2:3: mapping values are not allowed"},
		{"a: *nowhere", "f.yaml:1: unknown anchor"},
		{"a: x\n---\nb: x", "f.yaml:2:1: second document"},
		{"text: x\ntext: y", `f.yaml:2:1: key "text" is already set in line 1`},
		{"inner: {a: 1, a: 2}", `f.yaml:1:15: key "a" is already set`},
		{"text: &x y", "f.yaml:1:7: anchors and aliases are not allowed"},
		{"text: !!str y", "f.yaml:1:7: tags are not allowed"},
		{"map: {<<: {a: b}}", "f.yaml:1:7: merge keys are not allowed"},
		{"map: {1: a}", "f.yaml:1:7: key is not text"},
		{"map: {? [a] : b}", "key is not text"},
		{"list: " + deep, "nested deeper than 64 levels"},
		{"text: " + strings.Repeat("x", MaxSize), "f.yaml:1: file is larger than 1048576 bytes"},
		{"- a", "f.yaml:1:1: want a mapping, got a list"},
		{"number: 1", `f.yaml:1:1: key "text" is missing`},
		{"text: x\nnumbr: 1", `f.yaml:2:1: unknown key "numbr" (known: text, number, `},
		{"text: x\nUntagged: y", `f.yaml:2:1: unknown key "Untagged"`},
		{"text: 5432", "f.yaml:1:7: want text, got the number 5432: put it in quotes"},
		{"text: yes\nyes: yes", "f.yaml:2:6: want true or false, got text"},
		{"text:", "f.yaml:1:6: value is empty: want text"},
		{"text: x\nnumber: 0x10", "f.yaml:2:9: want a whole number in decimal, got the number 0x10"},
		{"text: x\nnumber: 1_000", "f.yaml:2:9: want a whole number"},
		{"text: x\nnumber: 010", "f.yaml:2:9: want a whole number in decimal, got the number 010"},
		{"text: x\nsmall: 007", "f.yaml:2:8: want a whole number in decimal"},
		{"text: x\nnumber: 1.5", "f.yaml:2:9: want a whole number"},
		{"text: x\nnumber: 99999999999999999999", "f.yaml:2:9: want a whole number in decimal"},
		{"text: x\nsmall: 256", "f.yaml:2:8: want a whole number in decimal, not negative and in range, got the number 256"},
		{"text: x\nsmall: -1", "f.yaml:2:8: want a whole number in decimal, not negative"},
		{"text: x\nwait: 10", `f.yaml:2:7: "10" is not a duration`},
		{"text: x\naddr: 10.0.0", "f.yaml:2:7: ParseAddr"},
		{"text: x\nlist: a", "f.yaml:2:7: want a list, got text"},
		{"text: x\nlist: [a, {}]", "f.yaml:2:11: want text, got a mapping"},
		{"text: x\nmap: []", "f.yaml:2:6: want a mapping, got a list"},
		{"text: x\nstrange: 1", "f.yaml:2:10: a value of type chan int cannot be read"},
	} {
		n, err := Parse([]byte(c.src), "f.yaml")
		if err == nil {
			err = n.Decode(new(sample))
		}
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%.40q: got %v, want %s", c.src, err, c.want)
		}
	}
}

// Many problems are one error in the order of the file, and bounded.
func TestManyProblems(t *testing.T) {
	t.Parallel()
	src := "text: 1\n"
	for i := range 300 {
		src += fmt.Sprintf("k%d: 1\n", i)
	}
	n, err := Parse([]byte(src), "f.yaml")
	if err != nil {
		t.Fatal(err)
	}
	err = n.Decode(new(sample))
	lines := strings.Split(err.Error(), "\n")
	if len(lines) != maxProblems+1 || !strings.HasPrefix(lines[0], "f.yaml:1:7:") || lines[maxProblems] != "and 201 more problems" {
		t.Errorf("got %d lines, first %q, last %q", len(lines), lines[0], lines[len(lines)-1])
	}
	var e *Error
	if !errors.As(err, &e) || e.Pos.Line != 1 {
		t.Errorf("errors.As: got %+v, want the *Error of line 1", e)
	}
	if err := n.Decode(sample{}); err == nil {
		t.Error("Decode into a value: got no error")
	}
}

func TestNode(t *testing.T) {
	t.Parallel()
	_, err := Parse([]byte("a: 1\nb: [x, y]\ntype: t\nnull: null\n"), "f.yaml")
	if err == nil {
		t.Error("Parse: took a key that is not text")
	}
	n, err := Parse([]byte("a: 1\nb: [x, y]\ntype: t\nnone: null\n"), "f.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if !n.Get("zz").IsZero() || n.At("zz") != n || n.At("a").Pos().Line != 1 || n.Get("a").Text() != "1" {
		t.Error("Get and At: an absent key is absent, and its place is the mapping's")
	}
	if j, err := n.Without("type").JSON(); err != nil || string(j) != `{"a":1,"b":["x","y"],"none":null}` {
		t.Errorf("Without: got %s, %v", j, err)
	}
	if len(n.Get("b").Items()) != 2 || len(n.Get("a").Items()) != 1 || len(n.Get("none").Items()) != 0 {
		t.Error("Items: want a list, or the value as the only item, or nothing")
	}
	for _, src := range []string{"010", "0x10", "1_000", "-007"} {
		if n, err := Parse([]byte(src), "f.yaml"); err != nil {
			t.Error(err)
		} else if j, err := n.JSON(); err == nil {
			t.Errorf("JSON of %s: got %s, want an error: it has two readings", src, j)
		}
	}
	var zero Node
	var s struct {
		A int `yaml:"a"`
	}
	if j, err := zero.JSON(); err != nil || j != nil || zero.Decode(&s) != nil || !zero.IsMapping() {
		t.Errorf("zero Node: got %s, %v, want an empty mapping", j, err)
	}
}

// Whatever the bytes are: a value, or errors with their places, and what is a
// value has a JSON form that is JSON.
func FuzzParse(f *testing.F) {
	for _, s := range []string{"a: 1", "[a, {b: c}]", "a: &x [*x]", "? a\n: b", "a: |\n  b\n", "%YAML 1.2\n---\na: b", "a: .inf", "a: 1e400", "a: 2001-01-01"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, src []byte) {
		n, err := Parse(src, "f.yaml")
		if err == nil {
			var j json.RawMessage
			if j, err = n.JSON(); err == nil && !json.Valid(j) {
				t.Fatalf("JSON: got %s", j)
			}
		}
		if err == nil {
			err = n.Decode(new(sample))
		}
		if err == nil {
			return
		}
		for line := range strings.SplitSeq(err.Error(), "\n") {
			if !strings.HasPrefix(line, "f.yaml:") && !strings.HasPrefix(line, "and ") {
				t.Fatalf("error without a place: %q", line)
			}
		}
	})
}
