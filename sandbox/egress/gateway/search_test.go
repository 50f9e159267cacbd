package gateway

import (
	"fmt"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// TestSearch: a socket is found at whoever has it, and what a search may read is
// bounded.
func TestSearch(t *testing.T) {
	t.Parallel()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])
	link, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fds[1]))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		left, want int
	}{{1 << 20, os.Getpid()}, {1, 0}, {0, 0}} {
		s := search{link: link, left: tt.left}
		if got := s.below(os.Getpid()); got != tt.want || got == 0 && s.left > 0 {
			t.Errorf("with %d looks: got process %d and %d left, want %d", tt.left, got, s.left, tt.want)
		}
	}
	s := search{link: "socket:[1]", left: 1 << 20}
	if got := s.below(os.Getpid()); got != 0 {
		t.Errorf("a socket of nobody: got process %d", got)
	}
}

// TestInodeOf: whatever stands in an answer, it is read or refused.
func TestInodeOf(t *testing.T) {
	t.Parallel()
	for _, b := range [][]byte{nil, make([]byte, 16), make([]byte, 87), make([]byte, 19)} {
		if n, err := inodeOf(b); err == nil && n != 0 {
			t.Errorf("%d bytes: got %d", len(b), n)
		}
	}
	if n, err := inodeOf(make([]byte, 88)); n != 0 || err != nil {
		t.Errorf("a whole answer: got %d, %v", n, err)
	}
}

// BenchmarkWhoOf is one answer, of a process that answered last.
func BenchmarkWhoOf(b *testing.B) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	conn, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	ns, err := os.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()))
	if err != nil {
		b.Fatal(err)
	}
	defer ns.Close()
	w := newWho(os.Getpid(), ns)
	defer w.close()
	for b.Loop() {
		p := w.of(unix.IPPROTO_TCP, addrPort(conn.LocalAddr()), addrPort(conn.RemoteAddr()))
		if p.PID != os.Getpid() {
			b.Fatal(p)
		}
	}
}
