package sandboxtest

import (
	"bytes"

	"github.com/mayfly-ci/mayfly/sandbox"
)

func inputMutants() []mutant {
	return []mutant{
		{"input reaches the process and ends", func(w *world) {
			w.run = processes(func(p *sandbox.Process) { p.Stdin = nil })
		}},
		{"input reaches the process and ends", func(w *world) {
			w.run = processes(func(p *sandbox.Process) { p.Stdin = typed(p.Stdin, func(b []byte) []byte { return b[:1] }) })
		}},
		{"a terminal is the process's own", func(w *world) {
			w.run = processes(func(p *sandbox.Process) { p.TTY = nil })
		}},
		{"a terminal has the size that it was given last", func(w *world) {
			w.run = processes(func(p *sandbox.Process) { p.TTY = &sandbox.TTY{Size: p.TTY.Size} })
		}},
		{"a key interrupts", func(w *world) {
			w.run = processes(func(p *sandbox.Process) {
				p.Stdin = typed(p.Stdin, func(b []byte) []byte { return bytes.ReplaceAll(b, []byte{3}, nil) })
			})
		}},
		{"a process runs beside another", func(w *world) {
			w.run = processes(func(p *sandbox.Process) { p.Beside = false })
		}},
		{"a process runs beside another", func(w *world) {
			w.run = processes(func(p *sandbox.Process) { p.Beside = true })
		}},
		{"a process is the user that it shall be", func(w *world) {
			w.run = processes(func(p *sandbox.Process) { p.User = "" })
		}},
		{"a process that is alone has no company", func(w *world) {
			w.run = processes(func(p *sandbox.Process) { p.Alone = false })
		}},
	}
}

// typed changes what reaches a process.
func typed(from <-chan []byte, f func([]byte) []byte) <-chan []byte {
	if from == nil {
		return nil
	}
	to := make(chan []byte, cap(from))
	go func() {
		for b := range from {
			to <- f(b)
		}
		close(to)
	}()
	return to
}
