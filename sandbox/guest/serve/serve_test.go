package serve

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox/guest/wire"
)

// startTrue starts /bin/true whatever it is told: a fuzzer may not choose.
func startTrue(_ wire.Command, files [3]int) (int, error) {
	return syscall.ForkExec("/bin/true", []string{"true"}, &syscall.ProcAttr{
		Files: []uintptr{uintptr(files[2]), uintptr(files[1]), uintptr(files[2])},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
}

// startSleep starts something that lasts.
func startSleep(_ wire.Command, files [3]int) (int, error) {
	return syscall.ForkExec("/bin/sleep", []string{"sleep", "1000"}, &syscall.ProcAttr{
		Files: []uintptr{uintptr(files[2]), uintptr(files[1]), uintptr(files[2])},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
}

// talk serves an agent that says all of data and hangs up after n frames, or
// with n = 0 listens to the end. It returns the result of serve.
func talk(t *testing.T, root string, start startFunc, data []byte, n int) (frames []wire.Type, err error) {
	t.Helper()
	ours, theirs := net.Pipe()
	g := newGuest(theirs, root, start)
	result := make(chan error, 1)
	go func() { result <- g.serve() }()
	go func() { _, _ = ours.Write(data) }()
	r := wire.NewReader(ours, wire.FromGuest)
	for len(frames) < n {
		typ, _, err := r.Next()
		if err != nil {
			break
		}
		frames = append(frames, typ)
	}
	if n > 0 {
		_ = ours.Close()
	} else {
		_, _ = io.Copy(io.Discard, ours)
	}
	select {
	case err = <-result:
	case <-time.After(time.Minute):
		t.Fatal("serve has not returned after a minute")
	}
	return frames, err
}

func TestAgentThatBreaksTheProtocol(t *testing.T) {
	t.Parallel()
	start := wire.AppendStart(nil, wire.Command{Dir: "/", Args: []string{"x"}})
	piped := wire.AppendStart(nil, wire.Command{Dir: "/", Args: []string{"x"}, Input: wire.Pipe})
	terminal := wire.AppendStart(nil, wire.Command{Dir: "/", Args: []string{"x"}, Input: wire.Terminal})
	put := wire.AppendFrame(nil, wire.PutOpen, "/x")
	get := wire.AppendGet(nil, "/x", 1)
	for name, c := range map[string]struct {
		in   [][]byte
		want error
	}{
		"second start":      {[][]byte{start, start}, ErrProtocol},
		"broken start":      {[][]byte{wire.AppendFrame(nil, wire.Start, "x")}, ErrProtocol},
		"short stop":        {[][]byte{wire.AppendFrame(nil, wire.Stop, "x")}, ErrProtocol},
		"short grant":       {[][]byte{wire.AppendFrame(nil, wire.Grant, "x")}, ErrProtocol},
		"short get":         {[][]byte{wire.AppendFrame(nil, wire.GetOpen, "x")}, ErrProtocol},
		"grant of too much": {[][]byte{start, wire.AppendUint32(nil, wire.Grant, 1<<31)}, ErrProtocol},
		"input of nothing":  {[][]byte{start, wire.AppendFrame(nil, wire.Input, "x")}, ErrProtocol},
		"resize of a pipe":  {[][]byte{piped, wire.AppendResize(nil, wire.Size{})}, ErrProtocol},
		"broken resize":     {[][]byte{terminal, wire.AppendFrame(nil, wire.Resize, "123")}, ErrProtocol},
		"more than granted": {[][]byte{terminal, bytes.Repeat(wire.AppendFrame(nil, wire.Input, string(make([]byte, wire.MaxData))), 100)}, ErrProtocol},
		"two transfers":     {[][]byte{put, put}, ErrProtocol},
		"put and get":       {[][]byte{put, get}, ErrProtocol},
		"own frames":        {[][]byte{wire.AppendExit(nil, 0, 0)}, wire.ErrFrame},
		"text":              {[][]byte{[]byte("GET / HTTP/1.1\r\n")}, wire.ErrFrame},
	} {
		if _, err := talk(t, t.TempDir(), startSleep, bytes.Join(c.in, nil), 0); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", name, err, c.want)
		}
	}
	cut := tape{bytes.NewReader(start[:10])}
	if err := newGuest(cut, "/", startTrue).serve(); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("cut in a frame: got %v, want an unexpected end", err)
	}
	if err := newGuest(tape{bytes.NewReader(start)}, "/", startSleep).serve(); err != nil {
		t.Errorf("end between frames, a step running: got %v, want nil", err)
	}
}

func TestFramesThatCrossTheEndAreDropped(t *testing.T) {
	t.Parallel()
	in := bytes.Join([][]byte{
		wire.AppendUint32(nil, wire.Stop, 1), wire.AppendUint32(nil, wire.Grant, 100),
		wire.AppendHeader(nil, wire.Cancel, 0), wire.AppendFrame(nil, wire.PutData, "x"), wire.AppendHeader(nil, wire.PutEnd, 0),
		wire.AppendFrame(nil, wire.Input, "x"), wire.AppendHeader(nil, wire.InputEnd, 0), wire.AppendResize(nil, wire.Size{}),
		wire.AppendStart(nil, wire.Command{Dir: "/", Args: []string{"x"}}),
	}, nil)
	frames, err := talk(t, t.TempDir(), startTrue, in, 2)
	if err != nil || len(frames) != 2 || frames[1] != wire.Exit {
		t.Errorf("got %v and %v, want a hello and an exit", frames, err)
	}
}

func TestExpires(t *testing.T) {
	t.Parallel()
	ours, theirs := net.Pipe()
	go func() { _, _ = io.Copy(io.Discard, ours) }()
	if err := Serve(theirs, Options{Expires: time.Now().Add(20 * time.Millisecond)}); !errors.Is(err, ErrExpired) {
		t.Errorf("got %v, want ErrExpired", err)
	}
	ours, theirs = net.Pipe()
	go func() { _, _ = io.Copy(io.Discard, ours) }()
	if err := Serve(theirs, Options{Expires: time.Unix(1, 0)}); !errors.Is(err, ErrExpired) {
		t.Errorf("long ago: got %v, want ErrExpired", err)
	}
}

func TestOldestTailIsGivenUp(t *testing.T) {
	t.Parallel()
	l := &tails{}
	var first *pipe
	for i := range maxTails + 1 {
		p, w, err := newPipe()
		if err != nil {
			t.Fatal(err)
		}
		defer closeFD(w)
		if i == 0 {
			first = p
		}
		l.add(p)
	}
	if _, err := first.file.Read(make([]byte, 1)); !errors.Is(err, os.ErrClosed) {
		t.Errorf("oldest pipe: got %v, want closed", err)
	}
	l.close()
	p, w, err := newPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer closeFD(w)
	l.add(p)
	if _, err := p.file.Read(make([]byte, 1)); !errors.Is(err, os.ErrClosed) {
		t.Errorf("pipe of a step that starts at the end: got %v, want closed", err)
	}
}

func TestParseStat(t *testing.T) {
	t.Parallel()
	rest := " S 10 11 12 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 4242 100 200\n"
	want := process{pid: 7, parent: 10, group: 11, session: 12, started: 4242}
	for _, name := range []string{"sh", "a b", ") S 1 1 1", "((", "\n"} {
		if got, ok := parseStat([]byte("7 (" + name + ")" + rest)); !ok || got != want {
			t.Errorf("name %q: got %+v and %v, want %+v", name, got, ok, want)
		}
	}
	for _, line := range []string{"", "7", "7 (sh", ") 7 (", "7 (sh) S 10", "x (sh)" + rest, "7 (sh)" + " S x 11 12 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 4242"} {
		if got, ok := parseStat([]byte(line)); ok {
			t.Errorf("line %q: got %+v, want a refusal", line, got)
		}
	}
}

// A tape is an agent that says something and hangs up.
type tape struct{ io.Reader }

func (tape) Write(b []byte) (int, error) { return len(b), nil }
func (tape) Close() error                { return nil }

// FuzzServe feeds a guest whatever an agent might say. It returns, and changes
// nothing outside of its root.
func FuzzServe(f *testing.F) {
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	for _, h := range []tar.Header{
		{Name: "a/b", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "a/l", Typeflag: tar.TypeSymlink, Linkname: "../x"},
		{Name: "../canary", Typeflag: tar.TypeReg},
		{Name: "a/h", Typeflag: tar.TypeLink, Linkname: "a/b"},
	} {
		if err := w.WriteHeader(&h); err != nil {
			f.Fatal(err)
		}
	}
	put := bytes.Join([][]byte{wire.AppendFrame(nil, wire.PutOpen, "/d"), wire.AppendFrame(nil, wire.PutData, archive.String()), wire.AppendHeader(nil, wire.PutEnd, 0)}, nil)
	f.Add(put)
	f.Add(append(wire.AppendGet(nil, "/../canary", 100), wire.AppendHeader(nil, wire.Cancel, 0)...))
	f.Add(wire.AppendUint32(wire.AppendStart(nil, wire.Command{Dir: "/", Args: []string{"x"}}), wire.Stop, 0))
	f.Add(wire.AppendUint32(wire.AppendStart(nil, wire.Command{}), wire.Grant, 1))
	for _, c := range []wire.Command{{Dir: "/", Args: []string{"x"}, Input: wire.Pipe, Alone: true}, {Dir: "/", Args: []string{"x"}, Input: wire.Terminal}} {
		typed := wire.AppendResize(wire.AppendFrame(wire.AppendStart(nil, c), wire.Input, "ls\r\x03"), wire.Size{Rows: 1, Cols: 1})
		f.Add(wire.AppendHeader(typed, wire.InputEnd, 0))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 1<<20 {
			return
		}
		base := t.TempDir()
		root := filepath.Join(base, "root")
		if err := os.Mkdir(root, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(base, "canary"), []byte("alive"), 0o600); err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = newGuest(tape{bytes.NewReader(data)}, root, startTrue).serve()
		}()
		select {
		case <-done:
		case <-time.After(time.Minute):
			t.Fatal("serve has not returned after a minute")
		}
		if got, _ := os.ReadFile(filepath.Join(base, "canary")); string(got) != "alive" {
			t.Error("the canary outside of the root was written to")
		}
		if entries, _ := os.ReadDir(base); len(entries) != 2 {
			t.Errorf("beside the root: got %v, want the canary alone", entries)
		}
	})
}
