package hostile_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/local"
	"github.com/mayfly-ci/mayfly/test/agenttest"
)

func TestSpoolFiles(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, agenttest.Config{Slots: 4})
	flow := w.Workflow(t, "job", "      - run: echo begun\n")
	a := w.Start(t)
	good := fmt.Sprintf(`{"repository":%q,"ref":"refs/heads/main","workflow":%q}`, w.Repository, flow)
	put := func(name, text string) { // not renamed into place: written where it is read
		t.Helper()
		agenttest.Must(t, os.WriteFile(filepath.Join(w.Spool, "new", name+".json"), []byte(text), 0o644))
	}
	outside := filepath.Join(w.Dir, "outside.json")
	agenttest.Must(t, os.WriteFile(outside, []byte(good), 0o644))

	reported := map[string]string{
		"empty": "byte 0 of 0", "truncated": "unexpected EOF", "large": "more than 65536 bytes",
		"unknown": `unknown field "secrets"`, "binary": "invalid character",
		"link": "not a regular file", "fifo": "not a regular file",
	}
	// The spool takes a name once, so that the slow ones are made elsewhere.
	draft := filepath.Join(w.Dir, "draft")
	for id, text := range map[string]string{
		"empty": "", "truncated": good[:len(good)/2], "large": good[:len(good)-1] + `,"actor":"` + strings.Repeat("x", 70<<10) + `"}`,
		"unknown": good[:len(good)-1] + `,"secrets":{}}`, "binary": "\x00\xff\xfe\x7fELF\x01\r\n",
	} {
		agenttest.Must(t, os.WriteFile(draft, []byte(text), 0o644))
		agenttest.Must(t, os.Rename(draft, filepath.Join(w.Spool, "new", id+".json")))
	}
	agenttest.Must(t, os.Symlink(outside, filepath.Join(w.Spool, "new", "link.json")))
	agenttest.Must(t, syscall.Mkfifo(filepath.Join(w.Spool, "new", "fifo.json"), 0o644))

	// What has no name of a job is no offer, and stays where it is.
	agenttest.Must(t, os.Mkdir(filepath.Join(w.Spool, "new", "directory.json"), 0o755))
	strange := []string{".", "..", strings.Repeat("a", 65), "-option", "with space", "new\nline", "é"}
	for _, name := range strange {
		put(name, good)
	}
	for id, want := range reported {
		ends(t, w, id, providers.Failure, want)
	}
	w.Good(t)
	for _, name := range append(strange, "directory") {
		if _, err := os.Lstat(filepath.Join(w.Spool, "new", name+".json")); err != nil {
			t.Errorf("%q is no job, and was taken: %v", name, err)
		}
	}
	a.Stop(t)
	owesNothing(t, w)
}

// A job file that is replaced while it is claimed and read is one job or the
// other, or the second of the name is put aside; the agent goes on.
func TestSpoolFileReplaced(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, agenttest.Config{Slots: 4})
	flow := w.Workflow(t, "job", "      - run: echo begun\n")
	a := w.Start(t)
	good := fmt.Sprintf(`{"repository":%q,"ref":"refs/heads/main","workflow":%q,"actor":`, w.Repository, flow)
	draft, over := filepath.Join(w.Dir, "draft"), time.After(2*time.Second)
	n := 0
	for done := false; !done; n++ {
		agenttest.Must(t, os.WriteFile(draft, []byte(good+fmt.Sprintf(`"%d"}`, n)), 0o644))
		agenttest.Must(t, os.Rename(draft, filepath.Join(w.Spool, "new", "race.json")))
		select {
		case <-over:
			done = true
		default:
		}
	}
	ends(t, w, "race", providers.Success, "")
	agenttest.Eventually(t, time.Minute, "all files of that name are taken", func() bool {
		left, err := filepath.Glob(filepath.Join(w.Spool, "new", "*.json"))
		claimed, cerr := filepath.Glob(filepath.Join(w.Spool, "claimed", "*"))
		return err == nil && cerr == nil && len(left)+len(claimed) == 0
	})
	if lines := strings.Count(w.Log(t, "race"), "begun"); lines != 1 {
		t.Errorf("after %d replacements the job ran %d times, want once", n, lines)
	}
	w.Good(t)
	a.Stop(t)
	owesNothing(t, w)
}

func TestLargeWorkflow(t *testing.T) {
	w := agenttest.New(t, agenttest.Config{})
	a := w.Start(t)
	file := w.Commit(t, "large", "on: push\njobs:\n  job:\n    runs-on: linux\n    steps:\n"+strings.Repeat("      - run: echo 0123456789\n", 10<<20/28))
	before, begun := memoryPeak(t, a), time.Now()
	committed := w.Submit(t, file)
	ends(t, w, committed, providers.Failure, file+" has 10860291 bytes, more than the 1048576")
	if r := w.Result(t, committed, time.Minute); strings.Count(r.Reason, "refused") > 1 {
		t.Errorf("the reason says it twice: %s", r.Reason)
	}
	if grown, took := memoryPeak(t, a)-before, time.Since(begun); grown > most || took > time.Minute {
		t.Errorf("refusing it took %v and %d MiB, want at most a minute and %d MiB", took, grown>>20, most>>20)
	}
	id, err := local.Submit(w.Spool, local.Job{Repository: w.Repository, Workflow: file, Worktree: true})
	agenttest.Must(t, err)
	ends(t, w, id, providers.Failure, file)
	w.Good(t)
	a.Stop(t)
	owesNothing(t, w)
}
