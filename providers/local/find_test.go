package local

import (
	"errors"
	"io/fs"
	"testing"

	"github.com/mayfly-ci/mayfly/providers"
)

// TestFind: a job is found by the name that its agent gave it, and by no other.
func TestFind(t *testing.T) {
	t.Parallel()
	repo, sha := repository(t, flow("echo x"))
	p := open(t, Config{Dir: t.TempDir()})
	for _, name := range []string{"mf-a", "mf-b"} {
		id := submit(t, p.config.Dir, Job{Repository: repo, Workflow: ciFile, SHA: sha})
		if _, err := p.Claim(t.Context(), name, providers.Offer{ID: id}); err != nil {
			t.Fatal(err)
		}
		if got, err := Find(p.config.Dir, name); got != id || err != nil {
			t.Errorf("%s: got %q, %v, want %q", name, got, err, id)
		}
	}
	if got, err := Find(p.config.Dir, "mf-c"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a name that no agent gave: got %q, %v", got, err)
	}
}
