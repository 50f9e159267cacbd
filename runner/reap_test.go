package runner_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/sandbox"
)

// listing is the issuer of a world that can list what it issued.
type listing struct{ *worldIssuer }

func (l listing) List(context.Context) ([]creds.Info, error) {
	w := (*world)(l.worldIssuer)
	w.mu.Lock()
	defer w.mu.Unlock()
	var infos []creds.Info
	for name, g := range w.leases {
		infos = append(infos, creds.Info{Name: name, Owner: g.Subject.Repository})
	}
	return infos, nil
}

// The second net takes what carries our label and no journal knows: nothing of
// another installation, and nothing of a job that runs.
func TestReap(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.offers <- job(providers.Step{Run: "block", TimeoutMinutes: "10"})
		a := w.agent(func(c *runner.Config) {
			c.Issuers = map[string]creds.Issuer{"pg": listing{(*worldIssuer)(w)}}
		})
		state, err := runner.PeekState(filepath.Join(w.dir, "state"))
		if err != nil {
			t.Fatal(err)
		}
		const orphan, foreign = "mf-aaaaaaaaaaaaaaaa-box", "mf-bbbbbbbbbbbbbbbb-box"
		for name, owner := range map[string]string{orphan: state.Owner, foreign: "somebody-else"} {
			if _, err := w.boxes.Create(t.Context(), name, sandbox.Spec{Labels: sandbox.Labels{Owner: owner}}); err != nil {
				t.Fatal(err)
			}
			w.leases[name] = creds.Grant{Subject: creds.Subject{Repository: owner}}
		}
		examined := sandbox.Spec{Labels: sandbox.Labels{Owner: state.Owner}, Expires: time.Now().Add(3 * time.Minute)}
		if _, err := w.boxes.Create(t.Context(), "check-1", examined); err != nil {
			t.Fatal(err)
		}
		done := make(chan error)
		go func() { done <- a.Run(lifetime(t), lifetime(t)) }()
		time.Sleep(2 * time.Minute) // the job blocks; the reaper has been round twice
		left, err := os.ReadDir(w.boxes.Dir)
		if err != nil || len(left) != 3 {
			t.Errorf("boxes while the job runs: %v, %v, want the job's own, the foreign one and the doctor's", left, err)
		}
		if _, err := os.Stat(filepath.Join(w.boxes.Dir, orphan)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the orphan box is still there: %v", err)
		}
		w.mu.Lock()
		if _, there := w.leases[orphan]; there {
			t.Error("the orphan lease is still there")
		}
		if _, there := w.leases[foreign]; !there || len(w.leases) != 2 {
			t.Errorf("leases while the job runs: %v, want the job's own and the foreign one", w.leases)
		}
		delete(w.leases, foreign)
		w.mu.Unlock()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if err := w.boxes.Destroy(t.Context(), foreign); err != nil {
			t.Error(err)
		}
		reaped := 0
		for _, e := range w.events {
			if e.Action == "reap" {
				reaped++
			}
		}
		if reaped != 3 {
			t.Errorf("%d events of the reaper, want 3: the doctor's box once it had expired", reaped)
		}
		<-w.results
		w.clean()
	})
}

// An unreadable journal may owe anything: then nothing is reaped, and no new
// job is taken.
func TestUnreadableJournalStopsTheAgent(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.agent(nil)
	wal := filepath.Join(w.dir, "state", "jobs", "mf-cccccccccccccccc.wal")
	if err := os.WriteFile(wal, []byte(`{"op":"begin","version":99}`+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	w.offers <- job(providers.Step{Run: "print one"})
	if err := a.Run(lifetime(t), lifetime(t)); err == nil {
		t.Error("got nil, want an error that says which debts are unreadable")
	}
	if len(w.offers) != 1 {
		t.Error("a job was taken")
	}
	if _, err := a.Reap(t.Context()); err == nil {
		t.Error("reap: got nil, want a refusal")
	}
}
