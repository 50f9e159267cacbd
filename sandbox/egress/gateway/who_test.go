package gateway_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/egress/gateway"
	"github.com/mayfly-ci/mayfly/sandbox/netns/netnstest"
)

// sink listens outside and keeps what connects until the test ends.
func sink(t *testing.T) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(conn, conn)
				conn.Close()
			}()
		}
	}()
	return netip.MustParseAddrPort(l.Addr().String()).Port()
}

// TestWho: lines name the process that connected, among several that did, and
// the one that asked for a name.
func TestWho(t *testing.T) {
	port := sink(t)
	b := newBox(t, gateway.Config{}, egress.Rule{Name: "sink.example", Port: port, Protocol: egress.TCP})
	addr, err := b.lookup("sink.example")
	if err != nil {
		t.Fatal(err)
	}
	own, err := b.net.Dial("tcp", netip.AddrPortFrom(addr, port).String())
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	program, pids := hostileProgram(t), map[string]bool{}
	for range 3 {
		script := fmt.Sprintf("exec 3<>/dev/tcp/%s/%d; echo hello >&3; read -r line <&3; echo $$", addr, port)
		out, err := b.net.Run(context.Background(), exec.Command(program, "-c", script))
		if err != nil {
			t.Fatalf("client: %v: %s", err, out)
		}
		pids[strings.TrimSpace(out)] = true
	}
	lines := b.await("lines of four connections", func(all []egress.Line) bool { return count(all, egress.Allowed) == 4 })
	mine, theirs := 0, 0
	for _, l := range lines {
		if l.Verdict != egress.Allowed {
			continue
		}
		switch p := l.Process; {
		case p.PID == os.Getpid():
			mine++
		case pids[fmt.Sprint(p.PID)] && strings.Contains(p.Executable, `bash\n\x1b[31m`):
			theirs++
			if len(p.Executable) > 210 || strings.ContainsFunc(p.Executable, func(c rune) bool { return c < ' ' || c > '~' }) {
				t.Errorf("executable %q of %d bytes, want printable ASCII, bounded", p.Executable, len(p.Executable))
			}
		default:
			t.Errorf("process %+v, want this one or one of %v", p, pids)
		}
	}
	if mine != 1 || theirs != 3 {
		t.Errorf("%d lines of this process and %d of the others, want 1 and 3", mine, theirs)
	}
	if _, err := b.lookup("refused.example"); err == nil {
		t.Error("refused.example resolves")
	}
	b.await("line of who asked", has(func(l egress.Line) bool {
		return l.Name == "refused.example" && l.Process.PID == os.Getpid() && l.Process.Unknown == ""
	}))
}

func count(all []egress.Line, v egress.Verdict) int {
	n := 0
	for _, l := range all {
		if l.Verdict == v {
			n++
		}
	}
	return n
}

// hostileProgram is a shell under a name that a terminal should not see.
func hostileProgram(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("/bin/bash")
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "bash\n\x1b[31m"+strings.Repeat("x", 220))
	if err := os.WriteFile(name, b, 0o700); err != nil {
		t.Fatal(err)
	}
	return name
}

// TestWhoUnknown: a line says why it does not know, and what the rules allow
// passes all the same.
func TestWhoUnknown(t *testing.T) {
	t.Parallel()
	port := sink(t)
	for _, tt := range []struct {
		name string
		init int
		want string
	}{
		{"a runtime that shows no processes", 0, "does not show its processes"},
		{"a process that has nothing of the box", 1 << 22, "no process of the box has that socket"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			g, err := gateway.New(gateway.Config{})
			if err != nil {
				t.Fatal(err)
			}
			b := &box{tb: t, net: netnstest.New(t), gw: g}
			rule := egress.Rule{Name: "sink.example", Port: port, Protocol: egress.TCP, Resolve: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}}
			if err := g.Open(t.Context(), "job", egress.Opening{Rules: egress.Rules{Allow: []egress.Rule{rule}}, Ledger: b.ledger}); err != nil {
				t.Fatal(err)
			}
			s := b.net.Sockets()
			s.Init = tt.init
			if err := g.Attach(t.Context(), "job", s); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(b.close)
			conn, err := b.connect("sink.example", port)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := conn.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
				t.Fatalf("echo: %v", err)
			}
			b.await("line that says why", has(func(l egress.Line) bool {
				return l.Verdict == egress.Allowed && l.Process.PID == 0 && strings.Contains(l.Process.Unknown, tt.want)
			}))
		})
	}
}

// BenchmarkWho is what the search costs a connection, with a box of one process.
func BenchmarkWho(b *testing.B) {
	for _, init := range []int{0, os.Getpid()} {
		b.Run(fmt.Sprintf("known=%v", init != 0), func(b *testing.B) { benchmarkWho(b, init) })
	}
}

func benchmarkWho(b *testing.B, init int) {
	g, err := gateway.New(gateway.Config{})
	if err != nil {
		b.Fatal(err)
	}
	bx := &box{tb: b, net: netnstest.New(b), gw: g}
	if err := g.Open(b.Context(), "job", egress.Opening{Ledger: bx.ledger}); err != nil {
		b.Fatal(err)
	}
	s := bx.net.Sockets()
	s.Init = init
	if err := g.Attach(b.Context(), "job", s); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(bx.close)
	for b.Loop() {
		conn, err := bx.net.Dial("tcp", "198.18.9.9:443")
		if err != nil {
			continue // it was reset already
		}
		_, _ = conn.Read(make([]byte, 1)) // a reset, behind the line
		conn.Close()
	}
}
