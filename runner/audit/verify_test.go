package audit_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/runner/audit"
)

func TestVerifyFindsTampering(t *testing.T) {
	t.Parallel()
	replace := func(line, old, new string) string { return strings.Replace(line, old, new, 1) }
	for _, c := range []struct {
		name   string
		change func(lines []string) []string
		where  string // file:line and why
	}{
		{"edited", func(l []string) []string { l[2] = replace(l[2], "job-0", "job-9"); return l }, ":3: …edited: the line does not have the hash"},
		{"hash edited", func(l []string) []string { l[2] = replace(l[2], `"hash":"`, `"hash":"0`); return l }, ":3: …not a line"},
		{"edited and hashed again", func(l []string) []string { l[2] = forge(t, l, 2, "evil"); return l }, ":4: …does not follow"},
		{"deleted", func(l []string) []string { return slices.Delete(l, 2, 3) }, ":3: …seq is 4, want 3: lines before it were deleted"},
		{"first deleted", func(l []string) []string { return l[1:] }, ":1: …seq is 2, want 1"},
		{"swapped", func(l []string) []string { l[2], l[3] = l[3], l[2]; return l }, ":3: …seq is 4, want 3"},
		{"repeated", func(l []string) []string { return slices.Insert(l, 3, l[2]) }, ":4: …seq is 3, want 4: the line was moved or repeated"},
		{"inserted", func(l []string) []string { return slices.Insert(l, 3, forge(t, l, 3, "evil")) }, ":5: …seq is 4, want 5"},
		{"garbage", func(l []string) []string { return slices.Insert(l, 3, "nonsense\n") }, ":4: …not a line of the record"},
		{"blank line", func(l []string) []string { return slices.Insert(l, 3, "\n") }, ":4: …not a line of the record"},
		{"second key", func(l []string) []string {
			l[2] = rehash(t, replace(l[2], `"action"`, `"action":"evil","action"`))
			return l
		}, ":3: …not in the form"},
		{"unknown key", func(l []string) []string { l[2] = rehash(t, replace(l[2], `"action"`, `"x":1,"action"`)); return l }, ":3: …not in the form"},
		{"spaces", func(l []string) []string { l[2] = " " + l[2]; return l }, ":3: …"},
		{"false repair", func(l []string) []string {
			e := audit.Event{Time: at(1), Action: "audit.repaired", Detail: map[string]string{"bytes": "5", "sha256": "00"}}
			return append(l[:3], "torn\n", string(audit.Forge(headOf(t, l[2]), e)))
		}, ":4: …states a repair of other bytes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			dir := record(t, 6)
			lines := strings.SplitAfter(strings.TrimSuffix(string(content(t, dir, month)), "\n"), "\n")
			lines[5] += "\n"
			write(t, dir, month, []byte(strings.Join(c.change(lines), "")))
			_, err := audit.Verify(dir)
			where, why, _ := strings.Cut(c.where, "…")
			if !errors.Is(err, audit.ErrTampered) || !strings.Contains(err.Error(), filepath.Join(dir, month)+where) || !strings.Contains(err.Error(), why) {
				t.Errorf("Verify: got %v, want ErrTampered at %s%s %s", err, month, where, why)
			}
			if _, err := read(dir); !errors.Is(err, audit.ErrTampered) && c.name != "first deleted" {
				t.Errorf("Read: got %v, want ErrTampered", err)
			}
		})
	}
}

// headOf reads the head of a line.
func headOf(t *testing.T, line string) audit.Head {
	t.Helper()
	var seq uint64
	if _, err := fmt.Sscanf(line, `{"seq":%d,`, &seq); err != nil {
		t.Fatal(err)
	}
	at := strings.Index(line, `"hash":"`) + len(`"hash":"`)
	return audit.Head{Seq: seq, Hash: line[at : at+64]}
}

// forge makes another line i that follows line i-1.
func forge(t *testing.T, lines []string, i int, object string) string {
	t.Helper()
	return string(audit.Forge(headOf(t, lines[i-1]), audit.Event{Time: at(1), Action: "test.event", Object: object}))
}

// rehash gives a line the hash that its text now has.
func rehash(t *testing.T, line string) string {
	t.Helper()
	i := strings.Index(line, `,"hash":"`)
	if i < 0 {
		t.Fatalf("no hash in %q", line)
	}
	return line[:i] + `,"hash":"` + audit.HashOf([]byte(line[:i]+"}")) + "\"}\n"
}

func TestVerifyWithKnownHeads(t *testing.T) {
	t.Parallel()
	dir := record(t, 6)
	early := verify(t, dir).Head
	add(t, open(t, dir), audit.Event{Time: at(2), Action: "test.event"})
	whole := content(t, dir, month)
	late := verify(t, dir, early).Head
	if parsed, err := audit.ParseHead(late.String()); err != nil || parsed != late {
		t.Errorf("ParseHead(%s): got %v, %v", late, parsed, err)
	}

	cut := bytes.LastIndexByte(whole[:len(whole)-1], '\n') + 1
	write(t, dir, month, whole[:cut])
	if s := verify(t, dir, early); s.Head != early {
		t.Errorf("Verify of a record that was cut: got head %v, want %v: it is a good shorter one", s.Head, early)
	}
	if _, err := audit.Verify(dir, late); !errors.Is(err, audit.ErrTampered) || !strings.Contains(err.Error(), "cut off") {
		t.Errorf("Verify, head %v expected: got %v, want ErrTampered: cut off", late, err)
	}
	if err := os.Remove(filepath.Join(dir, month)); err != nil {
		t.Fatal(err)
	}
	if _, err := audit.Verify(dir, early); !errors.Is(err, audit.ErrTampered) {
		t.Errorf("Verify of nothing, head %v expected: got %v, want ErrTampered", early, err)
	}

	f := open(t, dir) // written anew, and longer
	for range 9 {
		add(t, f, audit.Event{Time: at(2), Action: "test.event"})
	}
	if _, err := audit.Verify(dir, early); !errors.Is(err, audit.ErrTampered) || !strings.Contains(err.Error(), "anew") {
		t.Errorf("Verify of another chain: got %v, want ErrTampered: written anew", err)
	}
}

// Months may be put away; whoever does it keeps the head before the rest.
func TestVerifyWithoutTheFirstMonth(t *testing.T) {
	t.Parallel()
	dir := record(t, 3)
	f := open(t, dir)
	add(t, f, audit.Event{Time: at(31), Action: "test.event"})
	first := string(content(t, dir, month))
	before := headOf(t, first[strings.LastIndexByte(first[:len(first)-1], '\n')+1:])
	if err := os.Remove(filepath.Join(dir, month)); err != nil {
		t.Fatal(err)
	}
	if _, err := audit.Verify(dir); !errors.Is(err, audit.ErrTampered) {
		t.Errorf("Verify: got %v, want ErrTampered: seq begins at 5", err)
	}
	if s := verify(t, dir, before); s.Events != 1 || s.Head.Seq != 5 {
		t.Errorf("Verify: got %+v, want the one event behind %v", s, before)
	}
	if events, err := read(dir); err != nil || len(events) != 1 {
		t.Errorf("Read: got %v, %v, want what is there", events, err)
	}
	add(t, f, audit.Event{Time: at(31), Action: "test.event"})
	verify(t, dir, before)
}

// The writer sees what is done to the file behind its back.
func TestAppendFindsTampering(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		change func(dir, path string, whole []byte) error
	}{
		{"truncated", func(_, path string, whole []byte) error { return os.Truncate(path, int64(len(whole)/2)) }},
		{"removed", func(_, path string, _ []byte) error { return os.Remove(path) }},
		{"foreign line", func(_, path string, whole []byte) error {
			return os.WriteFile(path, append(whole, whole[:bytes.IndexByte(whole, '\n')+1]...), 0o600)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			dir := record(t, 4)
			f := open(t, dir)
			if err := c.change(dir, filepath.Join(dir, month), content(t, dir, month)); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				err := f.Append(t.Context(), audit.Event{Time: at(1), Action: "test.event"})
				if !errors.Is(err, audit.ErrTampered) {
					t.Fatalf("Append: got %v, want ErrTampered", err)
				}
			}
		})
	}
}

func TestReadFilters(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f := open(t, dir)
	for i, action := range []string{"lease.issue", "lease.revoke", "lease", "job.end"} {
		add(t, f, audit.Event{Time: at(1 + i), Job: fmt.Sprint(i % 2), Action: action, Object: fmt.Sprint(i)})
	}
	for _, c := range []struct {
		filter audit.Filter
		want   string
	}{
		{audit.Filter{}, "0123"},
		{audit.Filter{Job: "1"}, "13"},
		{audit.Filter{Action: "lease."}, "01"},
		{audit.Filter{Action: "lease"}, "2"},
		{audit.Filter{Since: at(2), Until: at(4)}, "12"},
	} {
		got := ""
		for e, err := range audit.Read(dir, c.filter) {
			if err != nil {
				t.Fatal(err)
			}
			got += e.Object
		}
		if got != c.want {
			t.Errorf("Read %+v: got %q, want %q", c.filter, got, c.want)
		}
	}
	for range audit.Read(dir, audit.Filter{}) {
		break // must not go on
	}
}
