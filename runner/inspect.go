package runner

import (
	"encoding/json"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner/internal/journal"
)

// JobInfo is what the journal knows of a job that still owes something: one
// that runs now, or one that an earlier life of the agent left. Warm boxes have
// logs of their own, and are listed too.
type JobInfo struct {
	Job        string            `json:"job"`
	Generation int64             `json:"generation"`        // life of the agent that began it
	Warm       bool              `json:"warm,omitempty"`    // it is no job, but a box that no job has
	Damaged    int               `json:"damaged,omitempty"` // lines of the journal that cannot be read
	Owes       []DebtInfo        `json:"owes"`              // newest first: the order of release
	Outcome    *providers.Result `json:"outcome,omitempty"` // nil while it runs, or if it was lost
}

// DebtInfo is one thing that may exist. Handles are never shown.
type DebtInfo struct {
	Kind  string `json:"kind"`
	Name  string `json:"name"`
	By    string `json:"by,omitempty"`    // provider, runtime or issuer
	Scope string `json:"scope,omitempty"` // step that it is bound to
	// Until is set of a box that is kept: until then, while this life of the
	// agent lasts.
	Until time.Time `json:"until,omitzero"`
	Lease
}

// Lease is where a lease is; it is empty of other things.
type Lease struct {
	State   string    `json:"state,omitempty"`  // intended, issued, renewed, revoking, stuck, unprovable
	Since   time.Time `json:"since,omitzero"`   // that it is so
	Why     string    `json:"why,omitempty"`    // that it is stuck
	Expires time.Time `json:"expires,omitzero"` // when it ends by itself at the latest
}

// Stuck reports that the lease could not be revoked so far, or not be seen dead.
func (l Lease) Stuck() bool { return l.State == string(journal.Stuck) }

// Jobs lists every job that still owes something. It can be called beside a
// living agent. Logs that cannot be read are in the error; the others are listed.
func (s *State) Jobs() ([]JobInfo, error) {
	logs, err := s.journal.Peek()
	jobs := make([]JobInfo, 0, len(logs))
	for _, log := range logs {
		info := JobInfo{Job: log.Job, Generation: log.Generation, Warm: isWarm(log.Job), Damaged: log.Damaged}
		for _, d := range log.Debts() {
			lease := Lease{string(d.State), d.Since, d.Why, d.Expires}
			info.Owes = append(info.Owes, DebtInfo{d.Kind, d.Name, d.By, d.Scope, d.Until, lease})
		}
		if raw := log.Outcome(); raw != nil {
			info.Outcome = &providers.Result{}
			if err := json.Unmarshal(raw, info.Outcome); err != nil {
				info.Damaged++
			}
		}
		jobs = append(jobs, info)
	}
	return jobs, err
}
