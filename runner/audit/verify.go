package audit

import (
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// A Summary is what Verify found in a record that holds together.
type Summary struct {
	Files   int       `json:"files"`
	Events  uint64    `json:"events"`
	Repairs int       `json:"repairs"` // times a torn line was closed
	First   time.Time `json:"first"`   // time of the first event, zero if there is none
	Last    time.Time `json:"last"`
	Head    Head      `json:"head"` // keep it elsewhere, to see later that nothing was cut off
	// Torn counts the bytes behind the last line. They are a line that is
	// being written now, or what a crash left; the next writer closes it.
	Torn int `json:"torn,omitempty"`

	lines int // good lines of the file that is being read
}

// Verify reads a whole record and checks that nothing in it was changed. The
// error wraps ErrTampered and says the file and line of the first bad line and
// why it is bad. It needs no lock and writes nothing.
//
// A chain that was cut off at its end looks like a shorter one. Every head in
// expect, kept from an earlier Verify, must be in the record. A record whose
// first months were put away is good only if the head before them is expected.
func Verify(dir string, expect ...Head) (Summary, error) {
	var s Summary
	missing := slices.DeleteFunc(slices.Clone(expect), func(h Head) bool { return h == Head{} })
	c := &chain{from: func(h Head) bool { return slices.Contains(expect, h) }}
	err := c.walk(dir, &s, func() bool {
		missing = slices.DeleteFunc(missing, func(h Head) bool { return h == c.head || h == c.before })
		return true
	})
	if err != nil || len(missing) == 0 {
		return s, err
	}
	why := "ends before it: lines were cut off"
	if missing[0].Seq <= s.Head.Seq {
		why = "has another line there: it was written anew, or begins behind it"
	}
	return s, fmt.Errorf("%s: %w: head %s is expected, and the record, which ends at %s, %s", dir, ErrTampered, missing[0], s.Head, why)
}

// A Filter chooses events. The zero Filter takes all.
type Filter struct {
	Job    string // name of the job
	Action string // exact, or a prefix that ends in ".": "lease."
	Since  time.Time
	Until  time.Time // exclusive
}

func (f Filter) takes(e Event) bool {
	return (f.Job == "" || f.Job == e.Job) &&
		(f.Action == "" || f.Action == e.Action || strings.HasSuffix(f.Action, ".") && strings.HasPrefix(e.Action, f.Action)) &&
		(f.Since.IsZero() || !e.Time.Before(f.Since)) &&
		(f.Until.IsZero() || e.Time.Before(f.Until))
}

// Read gives the events of a record in order, checking the chain as it goes.
// It gives one error, the last, where the record is unreadable or was changed:
// nothing behind that place can be believed. Months that were put away at the
// beginning are not missed; Verify is for that.
func Read(dir string, f Filter) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		c, more := &chain{from: func(Head) bool { return true }}, true
		err := c.walk(dir, new(Summary), func() bool {
			if f.takes(c.last) {
				more = yield(c.last, nil)
			}
			return more
		})
		if err != nil {
			yield(Event{}, err)
		}
	}
}

var errStop = errors.New("stopped by the reader")

// walk takes every line of the record and calls each for every event, until it
// returns false.
func (c *chain) walk(dir string, s *Summary, each func() bool) error {
	names, err := months(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if s.Torn > 0 {
			return &bad{filepath.Join(dir, names[s.Files-1]), s.lines + 1, errTorn}
		}
		s.Files++
		if err := c.walkFile(dir, name, s, each); errors.Is(err, errStop) {
			return nil
		} else if err != nil {
			return err
		}
	}
	return nil
}

func (c *chain) walkFile(dir, name string, s *Summary, each func() bool) (err error) {
	f, err := openFile(dir, name, os.O_RDONLY)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	s.lines = 0
	rest, err := lines(f, func(n int, line []byte) error {
		ok, err := c.take(f.Name(), n, line)
		if err != nil || !ok {
			return err
		}
		s.count(c)
		s.lines = n
		if !each() {
			return errStop
		}
		return nil
	})
	s.Torn = int(c.junk) + len(rest)
	return err
}

func (s *Summary) count(c *chain) {
	if s.Events == 0 {
		s.First = c.last.Time
	}
	if c.last.Action == actionRepaired {
		s.Repairs++
	}
	s.Events++
	s.Last, s.Head = c.last.Time, c.head
}
