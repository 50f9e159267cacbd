// Package sandboxtest holds the conformance suite for sandbox.Runtime, and a
// fake runtime for tests of the agent.
//
// The fake executes nothing: no runtime without a sandbox exists, not even for
// tests. Its boxes are directories that outlive a killed process, and its
// "processes" understand six words (see [Fake]).
package sandboxtest

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
)

// A Fake is a runtime whose boxes are directories below Dir.
//
// A process is a script that somebody Put at sandbox.Run+"/step", or what stands
// behind "/bin/sh -c". Each line is one of
//
//	print TEXT     print TEXT and a newline
//	env NAME       print the variable
//	append F TEXT  add TEXT and a newline to the file F below sandbox.Run
//	block          wait until the context ends
//	exit N         end with status N
//	mounted T      print what directory of the host is mounted at T
//
// A process with a Stdin reads its lines from there, one in each slice, and
// prints the size of its terminal first if it has one; /bin/true does nothing.
type Fake struct {
	Dir   string
	Trace func(point string) // called between effects; nil is none
	// Fail, if set, is asked before each call ("pull", "create", "destroy",
	// "list", "run", "probe", and "alone" for a process that is to be) and its
	// error returned.
	Fail func(call, name string) error

	mu sync.Mutex
}

func (f *Fake) here(point string) {
	if f.Trace != nil {
		f.Trace(point)
	}
}

func (f *Fake) fail(call, name string) error {
	if f.Fail == nil {
		return nil
	}
	return f.Fail(call, name)
}

// Pull knows every image: its digest is that of its name.
func (f *Fake) Pull(ctx context.Context, p sandbox.Pull) (sandbox.Image, error) {
	if err := errors.Join(ctx.Err(), f.fail("pull", p.Image)); err != nil || p.Image == "" {
		return sandbox.Image{}, err
	}
	f.here("fake.image.asked")
	digest := fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(p.Image)))
	f.here("fake.image.pulled")
	return sandbox.Image{Ref: digest, Digest: digest, Size: 7, Env: []string{"PATH=/image/bin", "OF_IMAGE=yes", "OF_JOB=image", "HOME=/image"}}, nil
}

// Create makes the directory of the box.
func (f *Fake) Create(ctx context.Context, name string, s sandbox.Spec) (sandbox.Sandbox, error) {
	if err := errors.Join(ctx.Err(), f.fail("create", name)); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	dir := filepath.Join(f.Dir, name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		if errors.Is(err, fs.ErrExist) {
			err = sandbox.ErrExists
		}
		return nil, fmt.Errorf("fake box %s: %w", name, err)
	}
	f.here("fake.box.made")
	b, err := json.Marshal(sandbox.Info{Name: name, Labels: s.Labels, Expires: s.Expires})
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, "info.json"), b, 0o600); err != nil {
		return nil, err
	}
	f.here("fake.box.labelled")
	return &fakeBox{fake: f, name: name, mounts: s.Mounts, files: map[string][]byte{}}, nil
}

// Destroy removes the directory of the box.
func (f *Fake) Destroy(ctx context.Context, name string) error {
	if err := errors.Join(ctx.Err(), f.fail("destroy", name)); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	err := os.Remove(filepath.Join(f.Dir, name, "info.json"))
	f.here("fake.box.emptied")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Remove(filepath.Join(f.Dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// List reads the directories.
func (f *Fake) List(ctx context.Context) ([]sandbox.Info, error) {
	if err := errors.Join(ctx.Err(), f.fail("list", "")); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	entries, err := os.ReadDir(f.Dir)
	if err != nil {
		return nil, err
	}
	var infos []sandbox.Info
	for _, e := range entries {
		info := sandbox.Info{Name: e.Name()}
		b, err := os.ReadFile(filepath.Join(f.Dir, e.Name(), "info.json"))
		if err == nil {
			err = json.Unmarshal(b, &info)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		infos = append(infos, info)
	}
	return infos, nil
}

// Check says that nothing is enforced, since nothing is executed.
func (f *Fake) Check(context.Context) ([]sandbox.Claim, error) {
	return []sandbox.Claim{{Name: "fake", Detail: "executes nothing"}}, nil
}

type fakeBox struct {
	fake   *Fake
	name   string
	mounts []sandbox.Mount

	mu    sync.Mutex
	files map[string][]byte
}

func (b *fakeBox) Attach(ctx context.Context) (sandbox.Sockets, error) {
	return sandbox.Sockets{}, ctx.Err()
}

// Mount has the box say what is mounted, as Create does.
func (b *fakeBox) Mount(ctx context.Context, mounts []sandbox.Mount) error {
	if err := errors.Join(ctx.Err(), b.fake.fail("mount", b.name)); err != nil || len(mounts) == 0 {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.mounts = mounts
	return nil
}

// Probe finds everything refused, and no name known.
func (b *fakeBox) Probe(ctx context.Context, attempts []sandbox.Attempt) ([]sandbox.Outcome, error) {
	if err := errors.Join(ctx.Err(), b.fake.fail("probe", b.name)); err != nil {
		return nil, err
	}
	outcomes := make([]sandbox.Outcome, len(attempts))
	for i, a := range attempts {
		switch {
		case a.Address.Port() == 53 && len(a.Text) > 3:
			outcomes[i].Reply = bytes.Clone(a.Text)
			outcomes[i].Reply[2] |= 0x80 // an answer
			outcomes[i].Reply[3] |= 3    // NXDOMAIN
		case a.Address.IsValid():
			outcomes[i].Err = syscall.ECONNREFUSED
		default:
			outcomes[i].Err = syscall.EPERM
		}
	}
	return outcomes, nil
}

func (b *fakeBox) Put(ctx context.Context, dir string, r io.Reader) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return ctx.Err()
		}
		if err != nil {
			return err
		}
		content, err := io.ReadAll(tr)
		if err != nil {
			return err
		}
		b.files[path.Join(dir, h.Name)] = content
	}
}

func (b *fakeBox) Get(ctx context.Context, name string, limit int64) ([]byte, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	content, ok := b.files[name]
	if !ok {
		return nil, fs.ErrNotExist
	}
	if int64(len(content)) > limit {
		return nil, fmt.Errorf("%s: %d bytes, at most %d", name, len(content), limit)
	}
	return bytes.Clone(content), ctx.Err()
}

func (b *fakeBox) Run(ctx context.Context, p sandbox.Process) (sandbox.Exit, error) {
	call := "run"
	if p.Alone {
		call = "alone"
	}
	if err := b.fake.fail(call, b.name); err != nil {
		return sandbox.Exit{}, err
	}
	if len(p.Args) > 0 && p.Args[0] == "/bin/true" {
		return sandbox.Exit{}, nil
	}
	if p.TTY != nil {
		if err := p.Stdout(time.Now(), fmt.Appendln(nil, p.TTY.Size.Rows, p.TTY.Size.Cols)); err != nil {
			return sandbox.Exit{}, err
		}
	}
	for line := range lines(ctx, b.script(p.Args), p.Stdin) {
		b.fake.here("fake.box.line")
		exit, ended, err := b.line(ctx, p, line)
		if ended || err != nil {
			return exit, err
		}
	}
	if ctx.Err() != nil {
		return sandbox.Exit{Code: 130, Signal: 2}, context.Cause(ctx)
	}
	return sandbox.Exit{}, nil
}

func (b *fakeBox) script(args []string) string {
	if len(args) == 3 && args[0] == "/bin/sh" && args[1] == "-c" {
		return args[2]
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return string(b.files[sandbox.Run+"/step"])
}

// lines are those of the script, or of the input if there is one, until ctx ends.
func lines(ctx context.Context, script string, in <-chan []byte) iter.Seq[string] {
	if in == nil {
		return strings.Lines(script)
	}
	return func(yield func(string) bool) {
		for {
			select {
			case line, more := <-in:
				if !more || !yield(string(line)) {
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}
}

// line does what one line says.
func (b *fakeBox) line(ctx context.Context, p sandbox.Process, line string) (exit sandbox.Exit, ended bool, err error) {
	word, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
	switch word {
	case "print", "env":
		if word == "env" {
			rest = lookup(p.Env, rest)
		}
		err = p.Stdout(time.Now(), []byte(rest+"\n"))
	case "append":
		file, text, _ := strings.Cut(rest, " ")
		b.mu.Lock()
		b.files[sandbox.Run+"/"+file] = append(b.files[sandbox.Run+"/"+file], text+"\n"...)
		b.mu.Unlock()
	case "mounted":
		for _, m := range b.mounts {
			if m.Target == rest {
				err = p.Stdout(time.Now(), []byte(m.Source+"\n"))
			}
		}
	case "block":
		<-ctx.Done()
	case "exit":
		exit.Code, err = strconv.Atoi(rest)
		return exit, true, err
	}
	if err == nil && ctx.Err() != nil {
		return sandbox.Exit{Code: 130, Signal: 2}, true, context.Cause(ctx)
	}
	return exit, false, err
}

func lookup(env []string, name string) string {
	for _, kv := range env {
		if v, ok := strings.CutPrefix(kv, name+"="); ok {
			return v
		}
	}
	return ""
}
