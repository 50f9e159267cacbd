//go:build failpoint

package runner_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner"
)

// The crash test kills the agent with SIGKILL at every point that a job passes,
// and at every point of the recovery from each of these, and looks at what is
// left. The points are found by tracing a run, so a new kind of hold brings its
// own. The agent is this test binary, started again.

// Variables of the agent's process.
const (
	envWorld = "MAYFLY_CRASH_WORLD" // JSON of a scene
	envMode  = "MAYFLY_CRASH_MODE"  // run or recover
	envPoint = "MAYFLY_FAILPOINT"
	envTrace = "MAYFLY_FAILPOINT_TRACE"
)

// crashTimeout bounds one process: a job of this test takes a tenth of a second.
const crashTimeout = time.Minute

func TestMain(m *testing.M) {
	if os.Getenv(envWorld) == "" {
		os.Exit(m.Run())
	}
	if err := crashAgent(); err != nil {
		fmt.Fprintln(os.Stderr, "agent:", err)
		os.Exit(1)
	}
}

// crashAgent is one life of the agent.
func crashAgent() error {
	var s scene
	if err := json.Unmarshal([]byte(os.Getenv(envWorld)), &s); err != nil {
		return err
	}
	state, err := runner.OpenState(filepath.Join(s.Dir, "state"))
	if err != nil {
		return err
	}
	cfg, err := s.config(state)
	if err != nil {
		return err
	}
	wait := s.makeWarm(&cfg)
	agent, err := runner.New(cfg, state)
	if err != nil {
		return err
	}
	wait.status = agent.Status
	if os.Getenv(envMode) == "recover" {
		return agent.Recover(context.Background())
	}
	return agent.Run(context.Background(), context.Background())
}

// life runs one life of the agent. It returns the points that it passed if
// trace is set, and whether it was killed.
func (s *scene) life(t *testing.T, mode, point string, trace bool) (points []string, killed bool) {
	t.Helper()
	world, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), crashTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // its servers die with the test too
	cmd.Env = append(os.Environ(), envWorld+"="+string(world), envMode+"="+mode, envPoint+"="+point)
	file := filepath.Join(s.Dir, "trace")
	if trace {
		if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		cmd.Env = append(cmd.Env, envTrace+"="+file)
	}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err = cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL && ctx.Err() == nil {
		return nil, true
	}
	if err != nil {
		t.Errorf("agent (%s, killed at %q): %v\n%s", mode, point, err, out.String())
	}
	if !trace {
		return nil, false
	}
	b, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return strings.Fields(string(b)), false
}

// check fails the test if anything of the job is left, or if the provider was
// told something that is not so.
func (s *scene) check(t *testing.T, how string, finished bool) {
	t.Helper()
	left, err := s.left()
	if err != nil {
		t.Fatalf("%s: %v", how, err)
	}
	if len(left) > 0 {
		t.Errorf("%s: left over: %v", how, left)
	}
	if s.Kind == "gitea" {
		s.checkForge(t, how, finished)
		return
	}
	raw, err := os.ReadFile(s.spool("done", crashJob, "result.json"))
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Stat(s.spool("new", crashJob+".json")); err != nil {
			t.Errorf("%s: the job was claimed and never reported", how)
		}
		return
	}
	var r providers.Result
	if err := errors.Join(err, json.Unmarshal(raw, &r)); err != nil {
		t.Fatalf("%s: %v", how, err)
	}
	want := providers.Success
	if s.Kind == "kept" {
		want = providers.Failure
	}
	if finished && r.Conclusion != want {
		t.Errorf("%s: a finished %s was reported as %s (%s)", how, want, r.Conclusion, r.Reason)
	}
	if r.Conclusion != want && r.Conclusion != providers.Lost {
		t.Errorf("%s: reported as %s (%s), want %s or lost", how, r.Conclusion, r.Reason, want)
	}
	if n := s.reports(t); n > 1 {
		t.Errorf("%s: reported %d times", how, n)
	}
}

// trial is one sequence of kills: once during the job, and, if again is set,
// once more during the recovery. It returns the points of the last recovery.
func trial(t *testing.T, s *scene, point, again string, finished bool) []string {
	t.Helper()
	s.prepare(t)
	defer s.remove(t)
	how := "killed at " + point
	if _, killed := s.life(t, "run", point, false); !killed {
		t.Errorf("%s: the agent was not killed there", how)
		return nil
	}
	if again != "" {
		how += ", then at " + again
		s.life(t, "recover", again, false) // it may get by without that point now
	}
	points, _ := s.life(t, "recover", "", true)
	s.check(t, how, finished)
	return points
}

func crash(t *testing.T, kind string) {
	lanes := max(2, runtime.NumCPU())
	free := make(chan *scene, lanes)
	for lane := range lanes {
		free <- newScene(t, kind, lane)
	}
	first := <-free
	first.prepare(t)
	points, _ := first.life(t, "run", "", true)
	first.check(t, "not killed", true)
	first.remove(t)
	free <- first
	end := slices.Index(points, "journal.outcome.after:1")
	if end < 0 {
		t.Fatalf("the traced job recorded no outcome; points: %v", points)
	}
	if first.Warm && !slices.Contains(points, "pool.given:1") {
		t.Fatalf("the traced job adopted no box; points: %v", points)
	}
	silent := unheard(points)
	doubles := parallel(points, free, func(s *scene, i int) int {
		s.silent = slices.Contains(silent, points[i])
		again := trial(t, s, points[i], "", i >= end)
		n := 0
		for _, point := range again {
			if os.Getenv("MAYFLY_CRASH") == "single" {
				break
			}
			if !s.again(points[i], point) {
				continue
			}
			trial(t, s, points[i], point, i >= end)
			n++
		}
		return n
	})
	t.Logf("%s: %d points of a job, %d kill sequences", kind, len(points), len(points)+doubles)
}

// parallel calls do for every index of points, each with a scene of its own,
// and adds up what it returns.
func parallel(points []string, free chan *scene, do func(s *scene, i int) int) int {
	var wg sync.WaitGroup
	var mu sync.Mutex
	sum := 0
	for i := range points {
		s := <-free
		wg.Go(func() {
			n := do(s, i)
			mu.Lock()
			sum += n
			mu.Unlock()
			free <- s
		})
	}
	wg.Wait()
	return sum
}

// TestCrashFake is the protocol alone: a job over files.
func TestCrashFake(t *testing.T) { crash(t, "fake") }

// TestCrashKept is that of a job that fails and whose box is kept: until the
// agent stops, or is killed.
func TestCrashKept(t *testing.T) { crash(t, "kept") }

// TestCrashReal is the same over the native box, the gateway and PostgreSQL.
func TestCrashReal(t *testing.T) { crash(t, "real") }
