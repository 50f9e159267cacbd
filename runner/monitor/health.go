package monitor

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/runner"
)

const (
	// claimPatience is how long a claim may take. Services answer in a second;
	// one that is down is asked again and again by its provider.
	claimPatience = 5 * time.Minute
	// room is what the journal sets aside when a job begins, in bytes.
	room = 64 << 10
)

// Health is the answer of /healthz and /readyz.
type Health struct {
	Status   string    `json:"status"` // ok, or failing if there are problems
	Version  string    `json:"version"`
	Policy   string    `json:"policy"` // digest of the policy in force for new jobs
	Problems []Problem `json:"problems,omitempty"`
}

// A Problem is one thing that is wrong.
type Problem struct {
	What string `json:"what"` // journal, audit, debts, boxes, or "provider NAME"
	Why  string `json:"why"`
}

// report says how the agent is; ready asks as well whether it takes jobs.
func report(c Config, ready bool) Health {
	s := c.Status()
	h := Health{Status: "ok", Version: c.Version, Policy: s.Policy}
	wrong := func(what string, err error) {
		if err != nil {
			h.Status = "failing"
			h.Problems = append(h.Problems, Problem{what, err.Error()})
		}
	}
	for _, what := range slices.Sorted(maps.Keys(c.Dirs)) {
		wrong(what, writable(c.Dirs[what]))
	}
	wrong("audit", c.Record.failing())
	_, err := c.Jobs()
	wrong("debts", err)
	if s.Jammed > 0 {
		wrong("boxes", fmt.Errorf("%d will not die: no jobs are taken until they are gone (mayfly jobs names them)", s.Jammed))
	}
	for _, name := range slices.Sorted(maps.Keys(s.Providers)) {
		wrong("provider "+name, stalled(s.Providers[name]))
		if ready {
			wrong("provider "+name, unready(s.Providers[name]))
		}
	}
	return h
}

// stalled says why the loop that asks a provider does not go on.
func stalled(p runner.ProviderStatus) error {
	if since := time.Since(p.Since); p.Doing.Claiming() && since > claimPatience {
		return fmt.Errorf("a claim is not answered since %v", since.Round(time.Second))
	}
	return nil
}

// unready says why the provider is not asked, or not with success.
func unready(p runner.ProviderStatus) error {
	if p.Doing.Ended() {
		return errors.New("no jobs are taken: the agent starts or drains")
	}
	return p.Failing
}

// writable tries to set aside in dir what a job needs. The file has no name, so
// nothing is left of it.
func writable(dir string) error {
	f, err := os.OpenFile(dir, unix.O_TMPFILE|os.O_RDWR, 0o600)
	if errors.Is(err, errors.ErrUnsupported) { // a file system without such files
		return os.Chtimes(dir, time.Time{}, time.Now())
	}
	if err != nil {
		return err
	}
	err = unix.Fallocate(int(f.Fd()), 0, 0, room)
	if errors.Is(err, errors.ErrUnsupported) {
		_, err = f.Write(make([]byte, room))
	}
	return errors.Join(err, f.Close())
}
