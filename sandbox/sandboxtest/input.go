package sandboxtest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
)

func inputClauses() []clause {
	return []clause{
		{"input reaches the process and ends", "", checkInput},
		{"a terminal is the process's own", "", checkTerminal},
		{"a terminal has the size that it was given last", "", checkResize},
		{"a key interrupts", "", checkKey},
		{"a process that is alone has no company", "", checkAlone},
	}
}

func checkInput(ctx context.Context, h Harness) error {
	want := strings.Repeat("0123456789abcdef\n", 100_000)
	return h.within(ctx, func(b *box) error {
		in := make(chan []byte, 2)
		in <- []byte(want[:1])
		in <- []byte(want[1:])
		close(in)
		p := shell("cat; exit 3")
		p.Stdin = in
		r := b.run(ctx, p)
		if r.err != nil || r.exit.Code != 3 || r.out != want {
			return fmt.Errorf("got %v, want code 3 and the %d bytes that were sent", r, len(want))
		}
		unread := make(chan []byte, 1)
		unread <- []byte(want)
		p = shell("exit 4")
		p.Stdin = unread
		if r := b.run(ctx, p); r.err != nil || r.exit.Code != 4 {
			return fmt.Errorf("input that is not read: got %v, want code 4", r)
		}
		return nil
	})
}

// A person types when the terminal shows something.
type person struct {
	waits string // for this
	types string
	sizes *sandbox.Size // before that
}

// converse runs a script at a terminal of 24 by 80 with people at it.
func (b *box) converse(ctx context.Context, script string, people ...person) (result, error) {
	keys, sizes := make(chan []byte, len(people)), make(chan sandbox.Size, len(people))
	p := shell(script)
	p.Stdin, p.TTY = keys, &sandbox.TTY{Size: sandbox.Size{Rows: 24, Cols: 80}, Resize: sizes}
	p.Grace = time.Second
	ctx, cancel := context.WithTimeout(ctx, clauseTimeout/4)
	defer cancel()
	var shown strings.Builder
	p.Stdout = func(_ time.Time, out []byte) error {
		shown.Write(out)
		for len(people) > 0 && strings.Contains(shown.String(), people[0].waits) {
			if people[0].sizes != nil {
				sizes <- *people[0].sizes
			}
			keys <- []byte(people[0].types)
			people = people[1:]
		}
		return nil
	}
	var r result
	r.exit, r.err = b.Run(ctx, p)
	r.out = shown.String()
	if len(people) > 0 {
		return r, fmt.Errorf("got %v, want it to show %q", r, people[0].waits)
	}
	return r, nil
}

func checkTerminal(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		r, err := b.converse(ctx, `test -t 0 && test -t 1 && test -t 2 && : </dev/tty || exit 9
			stty size; read -r line; echo "<$line>"; cat; exit 3`,
			person{waits: "24 80\r\n", types: "hello\r"}, person{waits: "<hello>\r\n", types: "\x04"})
		if err != nil || r.err != nil || r.exit.Code != 3 {
			return fmt.Errorf("got %v, want code 3: %w", r, err)
		}
		return wrap("the next process", b.script(ctx, "test -t 0 || test -t 1 || test -t 2 || echo none").printed("none\n"))
	})
}

func checkResize(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		// The size and the key come in either order: it asks until it is told.
		r, err := b.converse(ctx, `echo ready; read -r line; i=0
			while [ "$(stty size)" != "50 132" ] && [ $i -lt 100 ]; do i=$((i+1)); sleep 0.05; done; stty size`,
			person{waits: "ready", types: "\r", sizes: &sandbox.Size{Rows: 50, Cols: 132}})
		if err != nil || r.err != nil || !strings.Contains(r.out, "50 132\r\n") {
			return fmt.Errorf("got %v, want 50 by 132: %w", r, err)
		}
		return nil
	})
}

func checkKey(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		r, err := b.converse(ctx, `trap 'exit 7' INT; echo ready; while :; do sleep 0.05; done`,
			person{waits: "ready", types: "\x03"})
		if err != nil || r.err != nil || r.exit != (sandbox.Exit{Code: 7}) {
			return fmt.Errorf("got %v, want the trap of INT: %w", r, err)
		}
		return nil
	})
}

func checkAlone(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		mark := token()
		r := b.run(ctx, shell(`setsid sh -c 'trap "" HUP INT TERM; while :; do sleep 0.05; done' sh "$1" >/dev/null 2>&1 & echo x >file`, mark))
		if err := r.succeeded(); err != nil {
			return err
		}
		if err := b.script(ctx, "true").succeeded(); err != nil {
			return err
		}
		if b.running(ctx, mark) == 0 {
			return errors.New("a process in the background has not outlived its step: the next look would mean nothing")
		}
		p := shell("cat file")
		p.Alone = true
		if err := b.run(ctx, p).printed("x\n"); err != nil {
			return err
		}
		if n := b.running(ctx, mark); n > 0 {
			return fmt.Errorf("got %d processes beside one that is alone, want none", n)
		}
		return nil
	})
}
