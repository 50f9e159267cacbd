//go:build failpoint

package runner_test

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/sandbox/kernel"
	"github.com/mayfly-ci/mayfly/test/containerdtest"
)

// TestEngineKilled kills the daemon under an agent, with SIGKILL, and starts it
// again: during a job, which fails and says why if the daemon of Docker ends its
// containers with itself, and goes on over containerd; and during release, which
// insists until the daemon is back and then reports what is true.
func TestEngineKilled(t *testing.T) {
	t.Run("docker", func(t *testing.T) {
		s := newScene(t, "docker", 0)
		engineKilled(t, s, s.daemon, "300", providers.Failure, "sandbox died")
	})
	for lane, v := range containerdtest.Versions() {
		t.Run("containerd "+string(v), func(t *testing.T) {
			s := newScene(t, "containerd", lane)
			engineKilled(t, s, s.containerd, "5", providers.Success, "")
		})
	}
}

// killable is a daemon of either kind.
type killable interface {
	Kill(context.Context) error
	Restart(context.Context) error
}

func engineKilled(t *testing.T, s *scene, daemon killable, seconds string, want providers.Conclusion, reason string) {
	for _, c := range []struct {
		name, first string
		until       string // what the audit says when the daemon comes back
		want        providers.Conclusion
		reason      string
	}{
		{"during a job", "echo one; sleep " + seconds, "", want, reason},
		{"during release", "echo one; sleep 2", `"job.end"`, providers.Success, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			s.prepare(t)
			defer s.remove(t)
			workflow := "on: push\njobs:\n  build:\n    runs-on: linux\n    steps:\n      - run: " + c.first + "\n"
			if err := os.WriteFile(filepath.Join(s.Dir, "repo", ".github", "workflows", "ci.yml"), []byte(workflow), 0o600); err != nil {
				t.Fatal(err)
			}
			ended := make(chan struct{})
			go func() { defer close(ended); s.life(t, "run", "", false) }()
			s.await(t, s.spool("done", crashJob, "log"), "one")
			ctx := context.Background()
			if err := daemon.Kill(ctx); err != nil {
				t.Fatal(err)
			}
			if c.until != "" {
				s.await(t, filepath.Join(s.Dir, "audit", "*"), c.until)
			}
			if err := daemon.Restart(ctx); err != nil {
				t.Fatal(err)
			}
			<-ended
			left, err := s.left()
			if err != nil || len(left) > 0 {
				t.Errorf("left over: %v, %v", left, err)
			}
			var r providers.Result
			raw, err := os.ReadFile(s.spool("done", crashJob, "result.json"))
			if err := errors.Join(err, json.Unmarshal(raw, &r)); err != nil {
				t.Fatal(err)
			}
			if r.Conclusion != c.want || !strings.Contains(r.Reason, c.reason) || s.reports(t) != 1 {
				t.Errorf("reported %d times, last %+v, want once %s and a reason with %q", s.reports(t), r, c.want, c.reason)
			}
		})
	}
}

// await polls until a file that matches the pattern has the text in it.
func (s *scene) await(t *testing.T, pattern, text string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	err := kernel.Poll(ctx, pattern+" has "+text, func() (bool, error) {
		files, err := filepath.Glob(pattern)
		for _, f := range files {
			if b, err := os.ReadFile(f); err == nil && strings.Contains(string(b), text) {
				return true, nil
			}
		}
		return false, err
	})
	if err != nil {
		t.Fatal(err)
	}
}
