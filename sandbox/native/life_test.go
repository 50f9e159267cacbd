package native

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
)

func TestLife(t *testing.T) {
	t.Parallel()
	cfg := config(t)
	r := newRuntime(t, cfg)
	ctx := bounded(t)
	labels := sandbox.Labels{Owner: "test", Job: "42", Generation: 7}
	expires := time.Now().Add(time.Hour).Truncate(time.Second)
	b := create(t, r, "box", sandbox.Spec{Labels: labels, Expires: expires})
	if _, err := r.Create(ctx, "box", sandbox.Spec{}); !errors.Is(err, sandbox.ErrExists) {
		t.Errorf("second Create: got %v, want ErrExists", err)
	}
	if out, exit := script(t, b, "echo still here"); exit.Code != 0 || out != "still here\n" {
		t.Errorf("box after a refused Create: got %q %+v", out, exit)
	}
	s, err := b.Attach(ctx)
	if err != nil || s.TCP == nil || s.DNS == nil || s.Log == nil {
		t.Fatalf("Attach: got %+v, %v, want three sockets", s, err)
	}
	if err := closeAll([]*os.File{s.TCP, s.DNS, s.Log}); err != nil {
		t.Error(err)
	}
	if _, err := b.Attach(ctx); err == nil {
		t.Error("second Attach: got nil, want an error")
	}
	other := newRuntime(t, cfg) // another life of the agent
	// Two directories, three control groups of version 1 or one of version 2,
	// and a loop device: what leftovers must be able to see.
	if seen := leftovers(t, cfg.StateDir); len(seen) < 4 {
		t.Errorf("a living box has %q on the host, want at least four things", seen)
	}
	infos, err := other.List(ctx)
	if err != nil || len(infos) != 1 || infos[0].Name != "box" || infos[0].Labels != labels || !infos[0].Expires.Equal(expires) {
		t.Errorf("List: got %+v, %v, want box with %+v until %v", infos, err, labels, expires)
	}
	if err := r.Destroy(ctx, "box"); err != nil {
		t.Fatal(err)
	}
	if left := leftovers(t, cfg.StateDir); len(left) != 0 {
		t.Errorf("after Destroy: %q is left", left)
	}
	if _, err := b.Run(ctx, sandbox.Process{Args: []string{"/bin/true"}}); !errors.Is(err, sandbox.ErrDied) {
		t.Errorf("Run after Destroy: got %v, want ErrDied", err)
	}
	if err := r.Destroy(ctx, "box"); err != nil {
		t.Errorf("Destroy of an absent box: got %v, want nil", err)
	}
	for _, name := range []string{"", "..", "a/b", "A", strings.Repeat("a", 41)} {
		if _, err := r.Create(ctx, name, sandbox.Spec{}); err == nil {
			t.Errorf("Create(%q): got nil, want an error", name)
		}
		if err := r.Destroy(ctx, name); err == nil {
			t.Errorf("Destroy(%q): got nil, want an error", name)
		}
	}
	if _, err := r.Create(ctx, "image", sandbox.Spec{Image: "debian"}); !errors.Is(err, sandbox.ErrImage) {
		t.Errorf("Create with an image: got %v, want ErrImage", err)
	}
	if _, err := r.Create(ctx, "tiny", sandbox.Spec{Limits: sandbox.Limits{Disk: 4096}}); !errors.Is(err, sandbox.ErrUnsupported) {
		t.Errorf("Create with a disk of a page: got %v, want ErrUnsupported", err)
	}
}

func TestExpires(t *testing.T) {
	t.Parallel()
	r := newRuntime(t, config(t))
	b := create(t, r, "box", sandbox.Spec{Expires: time.Now().Add(8 * time.Second)})
	_, err := b.Run(bounded(t), sandbox.Process{Args: []string{"/bin/sleep", "1000"}})
	if !errors.Is(err, sandbox.ErrDied) {
		t.Errorf("Run across the expiry: got %v, want ErrDied", err)
	}
	select {
	case <-b.(*box).dead:
	case <-bounded(t).Done():
		t.Error("process 1 has not been reaped")
	}
}

func TestCheck(t *testing.T) {
	t.Parallel()
	cfg := config(t)
	r := newRuntime(t, cfg)
	claims, err := r.Check(bounded(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range claims {
		if !c.Enforced && c.Name != "Landlock" {
			t.Errorf("claim %+v: want enforced, as root", c)
		}
	}
	if left := leftovers(t, cfg.StateDir); len(left) != 0 {
		t.Errorf("after Check: %q is left", left)
	}
}

func TestParallelBoxesHaveDisjointIDs(t *testing.T) {
	t.Parallel()
	r := newRuntime(t, config(t))
	maps := make([]string, 4)
	var wait sync.WaitGroup
	for i := range maps {
		b := create(t, r, fmt.Sprintf("box-%d", i), sandbox.Spec{})
		wait.Go(func() {
			pid := b.(*box).process.Pid
			m, err := os.ReadFile(fmt.Sprintf("/proc/%d/uid_map", pid))
			if err != nil {
				t.Error(err)
			}
			maps[i] = strings.Join(strings.Fields(string(m)), " ")
		})
	}
	wait.Wait()
	seen := map[string]bool{}
	for _, m := range maps {
		f := strings.Fields(m)
		if len(f) != 3 || f[0] != "0" || f[1] == "0" || f[2] != "65536" || seen[m] {
			t.Errorf("uid maps: got %q, want disjoint ranges of 65536 that are not the host's", maps)
		}
		seen[m] = true
	}
}

// points are where an agent may die, in order.
func points() []string {
	return []string{
		"native.named", "native.recorded", "native.ids", "native.cgroup", "native.started", "native.disk",
		"native.sent", "native.ready", "run", "native.ended", "native.cleared", "native.released",
	}
}

// An agent is killed at every point between two effects. What runs ends by
// itself, and Destroy in another process removes the rest.
func TestKilledAgent(t *testing.T) { killedAgents(t, "") }

func killedAgents(t *testing.T, role string) {
	needRoot(t)
	for _, point := range points() {
		t.Run(point, func(t *testing.T) {
			cfg := config(t)
			state, out := agent(t, role+point, cfg.StateDir, nil)
			if !signalled(state) {
				t.Fatalf("the agent ended with %v, want killed at %s: %s", state, point, out)
			}
			procs := filepath.Join(memoryGroup(t, cfg), "cgroup.procs")
			eventually(t, "processes end without help", func() bool {
				b, err := os.ReadFile(procs)
				return err != nil || len(b) == 0
			})
			r := newRuntime(t, cfg)
			infos, err := r.List(t.Context())
			if err != nil || len(infos) != 1 || infos[0].Name != "box" {
				t.Errorf("List: got %+v, %v, want the partial box", infos, err)
			}
			if err := r.Destroy(bounded(t), "box"); err != nil {
				t.Fatal(err)
			}
			if left := leftovers(t, cfg.StateDir); len(left) != 0 {
				t.Errorf("after Destroy: %q is left", left)
			}
		})
	}
}

// memoryGroup is the first control group of the box.
func memoryGroup(t testing.TB, cfg Config) string {
	t.Helper()
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	h, err := findHierarchy(info, cfg.groupParent())
	if err != nil {
		t.Fatal(err)
	}
	return h.dirs("box")[0]
}

// Every point of the code is one of points, so none is forgotten there.
func TestPointsAreComplete(t *testing.T) {
	t.Parallel()
	known := strings.Join(points(), " ") + " "
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, part := range strings.Split(string(b), `cfg.Trace("`)[1:] {
			point, _, _ := strings.Cut(part, `"`)
			n++
			if !strings.HasSuffix(f, "_test.go") && !strings.Contains(known, point+" ") {
				t.Errorf("%s: point %q is not in points()", f, point)
			}
		}
	}
	if n < len(points())-1 {
		t.Errorf("got %d points in the code, want %d", n, len(points())-1)
	}
}
