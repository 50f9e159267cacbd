package native

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/native/boxinit"
)

func TestSetupMessage(t *testing.T) {
	t.Parallel()
	want := &boxinit.Setup{
		Layers: []boxinit.Layer{{Path: "/usr", Source: "/usr", Write: true}, {Path: "/opt/x", Source: "/y"}},
		Hide:   []string{"/a", "/b"}, RunBytes: 1, ShmBytes: 2, DiskBytes: 3, DiskInodes: 4, Processes: 5, Files: 6, Expires: 7,
		Filter: []byte{1, 2, 3}, Unprivileged: true,
	}
	b := want.Encode()
	got, err := boxinit.Decode(b)
	if err != nil || string(got.Encode()) != string(b) || got.Layers[1] != want.Layers[1] || got.Hide[1] != "/b" || got.Expires != 7 {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	for n := range b {
		if _, err := boxinit.Decode(b[:n]); err == nil {
			t.Errorf("the first %d of %d bytes: got nil, want an error", n, len(b))
		}
	}
}

// tree copies a recorded hierarchy to where it may be written.
func tree(t *testing.T, name string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(filepath.Join("testdata", name))); err != nil {
		t.Fatal(err)
	}
	return dir
}

func content(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// Version 2 has been tried on a recorded tree of plain files only.
func TestCgroupV2(t *testing.T) {
	t.Parallel()
	root := tree(t, "cgroup2")
	h, err := findHierarchy([]byte("30 1 0:26 / "+root+" rw - cgroup2 cgroup2 rw\n"), "mayfly")
	if err != nil {
		t.Fatal(err)
	}
	if got := content(t, root+"/mayfly/cgroup.subtree_control"); got != "+memory +pids +cpu" {
		t.Errorf("controllers of the parent: got %q", got)
	}
	if got := h.dirs("box"); len(got) != 1 || got[0] != root+"/mayfly/box" {
		t.Errorf("dirs: got %q", got)
	}
	// The kernel fills a new group; a directory needs help.
	v, ok := h.(v2)
	if !ok {
		t.Fatalf("got %T, want version 2", h)
	}
	for _, s := range v.settings(sandbox.Limits{Memory: 1 << 20, Pids: 10, MilliCPU: 1500}) {
		want := map[string]string{"memory.max": "1048576", "memory.swap.max": "0", "pids.max": "10", "cpu.max": "150000 100000"}[s.file]
		if s.value != want {
			t.Errorf("%s: got %q, want %q", s.file, s.value, want)
		}
		if _, err := os.Stat(root + "/mayfly/recorded/" + s.file); err != nil {
			t.Errorf("%s: the recorded group has no such file", s.file)
		}
	}
	if n, err := h.kills("recorded"); err != nil || n != 3 {
		t.Errorf("kills: got %d, %v, want 3", n, err)
	}
}

// An agent that a service manager put into the group that it delegated makes
// room there for the groups of its boxes.
func TestCgroupV2Delegated(t *testing.T) {
	t.Parallel()
	root := tree(t, "cgroup2")
	unit := root + "/system.slice/mayfly.service"
	if err := os.MkdirAll(unit+"/agent", 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(unit+"/agent/cgroup.procs", "")
	write(root+"/system.slice/cgroup.procs", "1"+strconv.Itoa(os.Getpid())+"\n") // somebody else
	write(unit+"/cgroup.procs", "1\n"+strconv.Itoa(os.Getpid())+"\n")
	if _, err := findHierarchy([]byte("30 1 0:26 / "+root+" rw - cgroup2 cgroup2 rw\n"), "system.slice/mayfly.service/abc"); err != nil {
		t.Fatal(err)
	}
	if got := content(t, unit+"/agent/cgroup.procs"); got != "0" {
		t.Errorf("the group beside the boxes': got %q, want this process to move there", got)
	}
	if got := content(t, unit+"/abc/cgroup.subtree_control"); got != "+memory +pids +cpu" {
		t.Errorf("controllers: got %q", got)
	}
	if _, err := os.Stat(root + "/system.slice/agent"); err == nil {
		t.Error("a group was made where this process is not")
	}
}

func TestCgroupV1(t *testing.T) {
	t.Parallel()
	root := tree(t, "cgroup1")
	info := ""
	for _, c := range []string{"memory", "pids", "cpu,cpuacct"} {
		info += "30 1 0:26 / " + root + "/" + c + " rw - cgroup cgroup rw," + c + "\n"
	}
	info += "30 1 0:26 / " + root + "/unified rw - cgroup2 cgroup2 rw\n" // hybrid
	h, err := findHierarchy([]byte(info), "mayfly")
	if err != nil {
		t.Fatal(err)
	}
	if got := h.dirs("box"); len(got) != 3 || got[2] != root+"/cpu,cpuacct/mayfly/box" {
		t.Errorf("dirs: got %q", got)
	}
	if n, err := h.kills("recorded"); err != nil || n != 2 {
		t.Errorf("kills: got %d, %v, want 2", n, err)
	}
	if _, err := findHierarchy([]byte("1 0 8:1 / / rw - ext4 /dev/a rw\n"), "mayfly"); !errors.Is(err, sandbox.ErrUnsupported) {
		t.Errorf("no hierarchy: got %v, want ErrUnsupported", err)
	}
}

func TestPrune(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	old := time.Now().Add(-baseAge - time.Hour)
	for name, at := range map[string]time.Time{"etc-current": old, "etc-old": old, "disk-old": old, "etc-young": time.Now()} {
		if err := errors.Join(os.Mkdir(filepath.Join(dir, name), 0o755), os.Chtimes(filepath.Join(dir, name), at, at)); err != nil {
			t.Fatal(err)
		}
	}
	if err := prune(dir, filepath.Join(dir, "etc-current")); err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(dir + "/*")
	if err != nil || len(left) != 2 {
		t.Errorf("left: got %q, %v, want the current and the young one", left, err)
	}
}
