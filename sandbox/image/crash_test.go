package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/test/imagetest"
)

// Variables of the process that plays an agent which is killed.
const (
	childPoint = "MAYFLY_IMAGE_CHILD"
	childDir   = "MAYFLY_IMAGE_DIR"
	childFrom  = "MAYFLY_IMAGE_FROM"
)

func TestMain(m *testing.M) {
	point := os.Getenv(childPoint)
	if point == "" {
		os.Exit(m.Run())
	}
	if err := child(point); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// child pulls an image and prunes everything, and dies at a point as by kill -9.
func child(point string) error {
	cfg := Config{Dir: os.Getenv(childDir), Sources: map[string]string{"app:1": os.Getenv(childFrom)}}
	cfg.Trace = func(at string) {
		if at == point {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {} // it is on its way
		}
	}
	s, err := Open(cfg)
	if err != nil {
		return err
	}
	if _, err := s.Pull(context.Background(), sandbox.Pull{Image: "app:1"}); err != nil {
		return err
	}
	_, err = s.prune(context.Background(), time.Now().Add(100*24*time.Hour))
	return err
}

// TestKilled: an agent that dies at any point of a pull or of a prune leaves
// nothing half done to the next, for which the same image is whole.
func TestKilled(t *testing.T) {
	t.Parallel()
	img := small(t, "content")
	from := imagetest.Layout(t, img)
	for _, point := range []string{
		"image.layer.work", "image.layer.unpacked", "image.layer.renamed", "image.recorded", "image.named", "image.forgotten", "image.pruned", "none",
	} {
		dir := filepath.Join(t.TempDir(), "images")
		cmd := exec.CommandContext(bounded(t), "/proc/self/exe")
		cmd.Env = append(os.Environ(), childPoint+"="+point, childDir+"="+dir, childFrom+"="+from)
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		killed := errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
		if killed == (point == "none") || !killed && err != nil {
			t.Errorf("%s: got %v, want killed there: %s", point, err, out)
			continue
		}
		s := open(t, func(c *Config) { c.Dir, c.Sources = dir, map[string]string{"app:1": from} })
		if entries, err := os.ReadDir(s.path("work")); err != nil || len(entries) > 0 {
			t.Errorf("%s: half done: %v, %v", point, entries, err)
		}
		got, err := s.get(t, "app:1")
		if err != nil || got.Digest != imagetest.Digest(t, img) {
			t.Errorf("%s: got %+v, %v", point, got, err)
			continue
		}
		if b, err := os.ReadFile(filepath.Join(s.dirs(t, got.Ref)[0], "g")); err != nil || string(b) != "content" {
			t.Errorf("%s: got %q, %v, want the layer whole", point, b, err)
		}
		must(s.prune(bounded(t), time.Now().Add(100*24*time.Hour)))(t)
		s.empty(t)
	}
}

// TestWorkOfOthers: what another process has in work stays.
func TestWorkOfOthers(t *testing.T) {
	t.Parallel()
	s := open(t, nil)
	dir, done, err := s.work(bounded(t))
	if err != nil {
		t.Fatal(err)
	}
	open(t, func(c *Config) { c.Dir = s.cfg.Dir })
	if _, err := os.Stat(dir); err != nil {
		t.Errorf("work of a living process: %v", err)
	}
	if err := done(); err != nil {
		t.Fatal(err)
	}
	s.empty(t)
}

// TestConfig: what cannot be meant is refused before anything is pulled.
func TestConfig(t *testing.T) {
	t.Parallel()
	for reason, c := range map[string]Config{
		"is not absolute":        {Dir: "images"},
		"write missing, always":  {Pull: "sometimes"},
		"write registry/repos":   {From: []string{"debian"}},
		"is no registry":         {From: []string{"library/debian"}},
		"a limit is negative":    {MaxBytes: -1},
		"not an absolute path":   {Sources: map[string]string{"a": "b.tar"}},
		"source \"A B\"":         {Sources: map[string]string{"A B": "/b.tar"}},
		"no such file":           {CAFile: "/nonexistent"},
		"no certificate in it":   {CAFile: "/proc/version"},
		"write registry/reposit": {From: []string{"**/*"}},
	} {
		if c.Dir == "" {
			c.Dir = filepath.Join(t.TempDir(), "images")
		}
		if _, err := Open(c); err == nil || !strings.Contains(err.Error(), reason) {
			t.Errorf("%+v: got %v, want %q", c, err, reason)
		}
	}
	n := must(ParseName("registry.example/team/sub/app:1.2"))(t)
	for p, want := range map[string]bool{
		"registry.example/team/**": true, "registry.example/team/*": false, "registry.example/*/sub/app": true, "registry.example/team/sub/app:1.*": true,
		"registry.example/team/sub/app:2": false, "registry.example.evil/**": false, "registry*/team/sub/app": true, "registry.example/team/sub": false,
	} {
		if got := n.matches([]string{p}); got != want {
			t.Errorf("%s and %s: got %v, want %v", p, n, got, want)
		}
	}
	if !slices.Contains([]string{"docker.io/library/debian:latest"}, must(ParseName("debian"))(t).String()) {
		t.Error("debian is not an image of Docker Hub")
	}
}
