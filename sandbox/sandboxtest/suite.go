package sandboxtest

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
)

// A Harness is a runtime and what the suite needs to judge it. All fields but
// Unenforced, Image and Kernel are required.
type Harness struct {
	Runtime sandbox.Runtime
	Owner   string // installation id that the runtime was made with

	// Again returns the runtime as a later life of the agent has it.
	Again func() (sandbox.Runtime, error)

	// Orphan makes a box in an agent that is then killed, as by kill -9.
	Orphan func(ctx context.Context, name string, s sandbox.Spec) error

	// Unenforced names the claims that do not hold on this machine. Check must
	// say exactly that, and clauses that need one of them are not judged.
	Unenforced []string

	// Image is what the boxes are made of, as Pull called its Ref; "" is the base.
	Image string

	// Probe is the program that BuildProbe returns.
	Probe []byte

	// Kernel is for boxes with a kernel of their own in user space: the processes
	// of the host that are the kernel of the box of that name, the first of them
	// the one that all others end with. The host does not see the box's processes
	// then, and not each thread of a box is one of the host; see kernel.go.
	Kernel func(name string) []int
}

// A clause is one sentence of the contract. Its check returns what breaks it.
type clause struct {
	name  string
	needs string // claim that must be enforced; "" is none
	check func(ctx context.Context, h Harness) error
}

// clauseTimeout bounds a clause, set for a machine that is ten times as busy
// as one should be.
const clauseTimeout = 2 * time.Minute

// Run checks that the runtime of factory keeps the contract, isolation claims
// included. The factory is called once for each clause. The boxes need /bin/sh
// and the small programs that go with it, and the host must see their processes
// in its /proc, or the kernel that Harness.Kernel names.
func Run(t *testing.T, factory func(t *testing.T) Harness) {
	t.Helper()
	for _, c := range clauses() {
		t.Run(strings.ReplaceAll(c.name, " ", "_"), func(t *testing.T) {
			t.Parallel()
			h := factory(t)
			if slices.Contains(h.Unenforced, c.needs) {
				t.Logf("not judged: the harness says that %q is not enforced here, which the clause about Check holds it to", c.needs)
				return
			}
			ctx, cancel := context.WithTimeout(t.Context(), clauseTimeout)
			defer cancel()
			if err := c.check(ctx, h); err != nil {
				t.Errorf("%s: %v", c.name, err)
			}
		})
	}
}

func clauses() []clause {
	return slices.Concat(lifeClauses(), runClauses(), stopClauses(), inputClauses(), besideClauses(), transferClauses(), limitClauses(), isolationClauses(), mountClauses())
}

// BuildProbe compiles test/isolation/probe, the program that the suite runs in
// boxes, with the go command. Its caller stands in a directory of the module.
func BuildProbe(ctx context.Context) (program []byte, err error) {
	dir, err := os.MkdirTemp("", "mayfly-probe-")
	if err != nil {
		return nil, fmt.Errorf("probe: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	p := filepath.Join(dir, "probe")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", p, "github.com/mayfly-ci/mayfly/test/isolation/probe")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the probe: %w: %s", err, out)
	}
	return os.ReadFile(p)
}

// newName returns a name that no box had before.
func newName() string { return "st-" + token() }

// token is a word that stands nowhere else.
func token() string { return strings.ToLower(rand.Text()) }

// A box is a sandbox of the suite.
type box struct {
	sandbox.Sandbox
	name    string
	harness Harness
	ready   bool // the probe is in it
}

func (h Harness) spec(l sandbox.Limits) sandbox.Spec {
	return sandbox.Spec{
		Labels: sandbox.Labels{Owner: h.Owner, Job: "job-1", Generation: 7},
		Image:  h.Image, Limits: l, Expires: time.Now().Add(10 * time.Minute),
	}
}

// with makes a box, hands it to do and destroys it, whatever do did.
func (h Harness) with(ctx context.Context, s sandbox.Spec, do func(b *box) error) (err error) {
	name := newName()
	defer func() { err = errors.Join(err, wrap("Destroy", h.destroy(ctx, name))) }()
	b, err := h.Runtime.Create(ctx, name, s)
	if err != nil {
		return fmt.Errorf("Create: %w", err)
	}
	return do(&box{Sandbox: b, name: name, harness: h})
}

func (h Harness) destroy(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), clauseTimeout)
	defer cancel()
	return h.Runtime.Destroy(ctx, name)
}

// within is with, over a box with default limits.
func (h Harness) within(ctx context.Context, do func(b *box) error) error {
	return h.with(ctx, h.spec(sandbox.Limits{}), do)
}

// A result is what became of a process.
type result struct {
	out, errs string
	exit      sandbox.Exit
	err       error
}

func (r result) String() string {
	return fmt.Sprintf("stdout %.300q, stderr %.300q, %+v, error %v", r.out, r.errs, r.exit, r.err)
}

// run runs p with its outputs collected.
func (b *box) run(ctx context.Context, p sandbox.Process) result {
	var r result
	var out, errs bytes.Buffer
	p.Stdout = func(_ time.Time, b []byte) error { out.Write(b); return nil }
	p.Stderr = func(_ time.Time, b []byte) error { errs.Write(b); return nil }
	r.exit, r.err = b.Run(ctx, p)
	r.out, r.errs = out.String(), errs.String()
	return r
}

// script runs a shell script.
func (b *box) script(ctx context.Context, text string) result { return b.run(ctx, shell(text)) }

// shell is a process of /bin/sh. The words are its $1 and so on.
func shell(text string, words ...string) sandbox.Process {
	return sandbox.Process{
		Args: append([]string{"/bin/sh", "-c", text, "sh"}, words...),
		Env:  []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
	}
}

const probePath = sandbox.Workspace + "/probe"

// install puts the probe into the box.
func (b *box) install(ctx context.Context) error {
	if b.ready {
		return nil
	}
	b.ready = true
	return wrap("put the probe", b.Put(ctx, sandbox.Workspace, archive(entry{name: "probe", content: string(b.harness.Probe), mode: 0o755})))
}

// probe runs the probe.
func (b *box) probe(ctx context.Context, args ...string) result {
	if err := b.install(ctx); err != nil {
		return result{err: err}
	}
	return b.run(ctx, sandbox.Process{Args: append([]string{probePath}, args...)})
}

// succeeded says what is wrong with a result that should be a success.
func (r result) succeeded() error {
	if r.err != nil || r.exit != (sandbox.Exit{}) {
		return fmt.Errorf("got %v, want success", r)
	}
	return nil
}

// printed is succeeded, and wants to have seen text on stdout.
func (r result) printed(text string) error {
	if err := r.succeeded(); err != nil || r.out != text {
		return fmt.Errorf("got %v, want success and %.300q", r, text)
	}
	return nil
}

// refused says that a probe got what it was after, or did not even try.
func (r result) refused() error {
	if r.err != nil || r.exit.Code == 0 || r.exit.Code == 2 || r.exit.Code == 126 || r.exit.Code == 127 {
		return fmt.Errorf("got %v, want refused", r)
	}
	return nil
}

// An entry is a file of an archive.
type entry struct {
	name, content string
	link          string
	mode          int64
	kind          byte // 0 is a regular file
}

// archive is a tar stream.
func archive(entries ...entry) io.Reader {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	var err error
	for _, e := range entries {
		kind := e.kind
		if kind == 0 {
			kind = tar.TypeReg
		}
		err = errors.Join(err, w.WriteHeader(&tar.Header{Name: e.name, Linkname: e.link, Mode: e.mode, Size: int64(len(e.content)), Typeflag: kind, Format: tar.FormatPAX}))
		_, e := io.WriteString(w, e.content)
		err = errors.Join(err, e)
	}
	if err = errors.Join(err, w.Close()); err != nil {
		return &broken{err}
	}
	return &b
}

// broken is a stream that could not be made.
type broken struct{ err error }

func (b *broken) Read([]byte) (int, error) { return 0, b.err }

func wrap(what string, err error) error {
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// eventually polls until ok, at most for limit.
func eventually(ctx context.Context, limit time.Duration, what string, ok func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("not within %v: %s", limit, what)
		}
	}
	return nil
}
