// Package providertest is the conformance suite of providers.Provider and
// providers.Logger, and a fake service that survives the death of its users.
package providertest

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
)

// A Service is one CI service, empty at first, as a test drives it from the
// other side.
type Service struct {
	// New connects another agent, or the same one after a restart. What New
	// returns shares nothing with what it returned before but the service.
	New func() (providers.Provider, error)

	// Submit offers a job with one step that runs the command, and returns
	// the service's id of it.
	Submit func(command string) (id string, err error)

	// SubmitBad offers a job that cannot be run as it is written.
	SubmitBad func() (id string, err error)

	// Cancel asks for a job to be stopped.
	Cancel func(id string) error

	// Reports returns the results that were reported for a job and took
	// effect, oldest first.
	Reports func(id string) ([]providers.Result, error)

	// Log returns what the log of a job holds, and the states of its steps by
	// their index. It is not called if New's providers are no Loggers.
	Log func(id string) ([]byte, map[int]providers.StepState, error)

	// Notes returns the annotations of a job and its summary: what its steps
	// said, one behind the other. It is not called if New's logs are no
	// Annotators.
	Notes func(id string) ([]providers.Annotation, []byte, error)

	// Shown is what Log returns of bytes that were written, for services that
	// keep lines of text; nil is the bytes themselves.
	Shown func(written []byte) []byte

	// Words are the conclusions that the service does not know, and what it
	// shows instead.
	Words map[providers.Conclusion]providers.Conclusion

	// Taking says that asking is taking: what an earlier life claimed cannot be
	// asked for again, and Claim may answer ErrGone. Its Job.Ref serves the other
	// calls.
	Taking bool
}

const (
	// limit bounds a clause. It is spent only by an implementation that hangs.
	limit = 2 * time.Minute

	// moment is how long a check waits for what must not happen.
	moment = 100 * time.Millisecond
)

// patience is how long a check waits for what must happen: half of what is left
// to its clause, so that it can say what did not.
func patience(ctx context.Context) time.Duration {
	end, ok := ctx.Deadline()
	if !ok {
		end = time.Now().Add(limit)
	}
	return time.Until(end) / 2
}

// Run runs one subtest for each clause of the contract, each on a service of
// its own. Clauses about the log are left out if the provider keeps none.
func Run(t *testing.T, factory func(t *testing.T) Service) {
	t.Helper()
	for _, c := range clauses() {
		t.Run(strings.ReplaceAll(c.name, " ", "_"), func(t *testing.T) {
			t.Parallel()
			s := factory(t)
			if c.log && !isLogger(t, s) {
				return
			}
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			if err := c.check(ctx, s); err != nil {
				t.Errorf("clause %q: %v", c.name, err)
			}
		})
	}
}

func isLogger(t *testing.T, s Service) bool {
	t.Helper()
	p, err := s.New()
	if err != nil {
		t.Fatalf("New: %v", err)
	}
	_, ok := p.(providers.Logger)
	return ok
}

// A clause is one sentence of the contract. Its check is a plain function, so
// that the suite can be run against broken implementations and seen to fail.
type clause struct {
	name  string
	log   bool
	check func(context.Context, Service) error
}

func clauses() []clause {
	return []clause{
		{name: "poll waits and gives back when ctx ends", check: pollWaits},
		{name: "poll offers what is submitted while it waits", check: pollWakes},
		{name: "claim gives the job that was submitted", check: claimGivesJob},
		{name: "claiming a name twice gives the same job", check: claimTwice},
		{name: "claiming a name again after a restart gives the same job", check: claimAfterRestart},
		{name: "an offer is claimed by one agent only", check: claimOnce},
		{name: "an offer that never was is gone", check: claimNothing},
		{name: "fifty jobs and four agents: none lost, none twice", check: noneLost},
		{name: "a bad job is claimed, refused and can be completed", check: badJob},
		{name: "names of 40 bytes work", check: longNames},
		{name: "the source of a job is the service's own", check: sourceIsPlain},
		{name: "watch lasts until ctx ends", check: watchLasts},
		{name: "watch tells of a cancel", check: watchCancelled},
		{name: "watch tells of a cancel that came before it", check: watchCancelledBefore},
		{name: "watch goes on after a cancel", check: watchGoesOn},
		{name: "complete reports the result", check: completeReports},
		{name: "complete twice reports once", check: completeTwice},
		{name: "complete works without a ref", check: completeWithoutRef},
		{name: "complete works after a restart", check: completeAfterRestart},
		{name: "complete of a name never claimed does nothing", check: completeUnclaimed},
		{name: "a completed job is not offered again", check: completedIsOver},
		{name: "the log holds the bytes as written", log: true, check: logBytes},
		{name: "the log goes on behind what was written", log: true, check: logReopened},
		{name: "the log is with the service when close returns", log: true, check: logClosed},
		{name: "the log closes after the job's ctx is done", log: true, check: logClosedLate},
		{name: "the log of a name without a claim is gone", log: true, check: logGone},
		{name: "the states of steps are shown", log: true, check: logSteps},
		{name: "annotations are kept", log: true, check: notesKept},
		{name: "summaries are kept in order", log: true, check: summariesKept},
	}
}
