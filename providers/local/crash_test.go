package local

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/mayfly-ci/mayfly/providers"
)

// Whatever point an agent dies at, the next one completes from the name alone:
// the job is reported once or on offer again, and nothing of the claim is left.
func TestDeathAtEveryPoint(t *testing.T) {
	t.Parallel()
	repo, sha := repository(t, flow("echo x"))
	text := fmt.Sprintf(`{"repository":%q,"sha":%q,"workflow":%q}`, repo, sha, ciFile)
	life := func(p *Provider) {
		_, cerr := p.Claim(t.Context(), "c", providers.Offer{ID: "job"})
		if err := errors.Join(cerr, p.Complete(t.Context(), "c", nil, providers.Result{Conclusion: providers.Success})); err != nil {
			t.Errorf("a life: %v", err)
		}
	}
	var points []string
	fresh := func(trace func(string)) *Provider {
		p := open(t, Config{Dir: t.TempDir(), Trace: trace})
		write(t, filepath.Join(p.config.Dir, dirNew, "job.json"), text)
		return p
	}
	life(fresh(func(point string) { points = append(points, point) }))
	if len(points) < 4 {
		t.Fatalf("points = %q, want those of the claim and of the end", points)
	}
	for n, point := range points {
		passed := 0
		p := fresh(func(string) {
			if passed++; passed == n+1 {
				runtime.Goexit()
			}
		})
		dead := make(chan struct{})
		go func() {
			defer close(dead)
			life(p)
		}()
		<-dead
		for range 2 {
			next := open(t, Config{Dir: p.config.Dir})
			if err := next.Complete(t.Context(), "c", nil, providers.Result{Conclusion: providers.Lost}); err != nil {
				t.Errorf("died at %s: Complete = %v", point, err)
			}
		}
		r, err := ReadResult(p.config.Dir, "job")
		_, offered := os.Stat(filepath.Join(p.config.Dir, dirNew, "job.json"))
		if (err == nil) == (offered == nil) {
			t.Errorf("died at %s: result %+v (%v), offer %v; want one of the two", point, r, err, offered)
		}
		if want := map[bool]providers.Conclusion{true: providers.Success, false: providers.Lost}[point == "local.reported"]; err == nil && r.Conclusion != want {
			t.Errorf("died at %s: reported %q, want %q", point, r.Conclusion, want)
		}
		if left, err := os.ReadDir(filepath.Join(p.config.Dir, dirClaimed)); err != nil || len(left) > 0 {
			t.Errorf("died at %s: claims left: %v, %v", point, left, err)
		}
		if left, err := os.ReadDir(p.config.Dir); err != nil || len(left) != 4 {
			t.Errorf("died at %s: the spool holds %v, %v", point, left, err)
		}
	}
}

// What a loss of power leaves of a file that was not fsynced is no JSON.
func TestTornFiles(t *testing.T) {
	t.Parallel()
	repo, sha := repository(t, flow("echo x"))
	p := open(t, Config{Dir: t.TempDir()})
	id := submit(t, p.config.Dir, Job{Repository: repo, Workflow: ciFile, SHA: sha})
	if _, err := p.Claim(t.Context(), "c", providers.Offer{ID: id}); err != nil {
		t.Fatal(err)
	}
	for _, torn := range []string{"", `{"name":`} {
		write(t, filepath.Join(p.config.Dir, dirDone, id, "claim.json"), torn)
		write(t, filepath.Join(p.config.Dir, dirDone, id, "steps.jsonl"), torn)
		if job, err := p.Claim(t.Context(), "c", providers.Offer{}); err != nil || job.Subject.SHA != sha {
			t.Errorf("a record torn to %q: Claim = %v, want the job", torn, err)
		}
		l, err := p.Log(t.Context(), "c", nil)
		if err != nil {
			t.Errorf("steps torn to %q: Log = %v, want it to open", torn, err)
			continue
		}
		if err := errors.Join(l.Step(providers.StepState{Index: 1}), l.Close(t.Context())); err != nil {
			t.Errorf("steps torn to %q: Step = %v", torn, err)
		}
		if steps, err := ReadSteps(p.config.Dir, id); err != nil || len(steps) != 1 || steps[0].Index != 1 {
			t.Errorf("steps torn to %q and told again: %+v, %v; want step 1", torn, steps, err)
		}
	}
	write(t, filepath.Join(p.config.Dir, dirDone, id, "claim.json"), "")
	if err := p.Complete(t.Context(), "c", nil, providers.Result{Conclusion: providers.Lost}); err != nil {
		t.Errorf("Complete with a torn record = %v", err)
	}
	if r, err := ReadResult(p.config.Dir, id); err != nil || r.Conclusion != providers.Lost {
		t.Errorf("result = %+v, %v; want lost", r, err)
	}
}
