package giteatest_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/test/giteatest"
)

// bound is for anything that takes a second on a quiet machine.
const bound = 2 * time.Minute

const workflow = `on:
  push: {branches: [main]}
  workflow_dispatch:
jobs:
  one:
    runs-on: peer
    outputs: {word: '${{ steps.say.outputs.word }}'}
    steps:
      - run: |
          echo "variable $VARIABLE, secret $SECRET"
          printf 'tab\tand  spaces\n'
        env: {VARIABLE: '${{ vars.V }}', SECRET: '${{ secrets.S }}'}
      - id: say
        run: echo word=hello >> "$GITHUB_OUTPUT"
  two:
    needs: one
    runs-on: peer
    steps:
      - run: test "${{ needs.one.outputs.word }}" = hello
      - run: exit 3
`

const endless = `on: workflow_dispatch
jobs:
  endless:
    runs-on: peer
    steps:
      - run: echo begun; exec sleep 1000
`

func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func none(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestServer shows with Gitea's own runner that what tests of ours ask the
// server for is so.
func TestServer(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	s := giteatest.Start(t, giteatest.Config{})
	r := must(s.NewRepository(ctx, "first"))(t)
	none(t, r.SetSecret(ctx, "S", "a-secret-of-it"))
	none(t, r.SetVariable(ctx, "V", "value"))
	peer := must(s.StartPeer(ctx, giteatest.PeerConfig{Name: "peer", Tuned: true}))(t)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the runner said:\n%s", peer.Log())
		}
		none(t, peer.Stop())
	})
	if runners := must(s.Runners(ctx))(t); len(runners) != 1 || runners[0].Name != "peer" || runners[0].Ephemeral {
		t.Errorf("runners %+v, want the peer", runners)
	}

	sha := must(r.Push(ctx, map[string]string{".gitea/workflows/ci.yml": workflow, ".gitea/workflows/endless.yml": endless}))(t)
	run := must(r.Pushed(ctx, sha))(t)
	jobs := must(r.Wait(ctx, run))(t)
	if len(jobs) != 2 || jobs[0].Conclusion != "success" || jobs[1].Conclusion != "failure" || jobs[0].Runner != "peer" {
		t.Fatalf("jobs %+v, want one that succeeds and one that fails", jobs)
	}
	printed := giteatest.Printed(must(r.Log(ctx, jobs[0].ID))(t))
	for _, want := range []string{"\nvariable value, secret ***\n", "\ntab\tand  spaces\n"} {
		if !strings.Contains(printed, want) {
			t.Errorf("the log lacks %q:\n%s", want, printed)
		}
	}

	run = must(r.Dispatch(ctx, "endless.yml"))(t)
	must(r.Until(ctx, run, func(jobs []giteatest.Job) bool { return len(jobs) == 1 && jobs[0].Status == "in_progress" }))(t)
	none(t, s.Kill())
	none(t, s.Start(ctx))
	none(t, r.Cancel(ctx, run))
	if jobs := must(r.Wait(ctx, run))(t); jobs[0].Conclusion != "cancelled" {
		t.Errorf("the cancelled job is %+v", jobs[0])
	}
	if now := must(r.Run(ctx, run))(t); now.Status != "completed" || now.Conclusion != "cancelled" || now.Event != "workflow_dispatch" {
		t.Errorf("the cancelled run is %+v", now)
	}
	if tags := must(r.Tags(ctx))(t); len(tags) != 0 {
		t.Errorf("tags %v, want none", tags)
	}
}

// TestEphemeral: the server forgets such a runner after its only job.
func TestEphemeral(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	s := giteatest.Start(t, giteatest.Config{})
	r := must(s.NewRepository(ctx, "first"))(t)
	peer := must(s.StartPeer(ctx, giteatest.PeerConfig{Name: "peer", Tuned: true, Once: true}))(t)
	t.Cleanup(func() { none(t, peer.Stop()) })
	if runners := must(s.Runners(ctx))(t); len(runners) != 1 || !runners[0].Ephemeral {
		t.Errorf("runners %+v, want an ephemeral one", runners)
	}
	must(r.Push(ctx, map[string]string{".gitea/workflows/ci.yml": workflow}))(t)
	gone := func() bool { return len(must(s.Runners(ctx))(t)) == 0 && peer.Over() }
	for over := time.Now().Add(bound); !gone(); {
		if time.Now().After(over) {
			t.Fatalf("the ephemeral runner is still there: %+v\n%s", must(s.Runners(ctx))(t), peer.Log())
		}
		<-time.After(50 * time.Millisecond)
	}
}

// TestNothingStays: a server that was closed has neither process nor files.
func TestNothingStays(t *testing.T) {
	dir := t.TempDir() + "/gitea"
	s := must(giteatest.New(t.Context(), dir, giteatest.Config{Settings: "[log]\nLEVEL = Warn"}))(t)
	pid := s.Pid()
	none(t, s.Close())
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s: %v, want it gone", dir, err)
	}
	if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("process %d: %v, want it gone", pid, err)
	}
}
