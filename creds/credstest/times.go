package credstest

import (
	"errors"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
)

// envTimes asks for figures: that many leases are issued, revoked and seen
// refused after the clauses, one by one, and their times are logged.
const envTimes = "MAYFLY_LEASE_TIMES"

// timesAtMost bounds the figures of one issuer, where the provider takes long.
const timesAtMost = time.Minute

// times logs how long a job waits for its lease, and how long after its end the
// lease is still accepted. There is nothing that it must be: it fails no test.
func times(t *testing.T, h Harness) {
	n, _ := strconv.Atoi(os.Getenv(envTimes))
	var issue, refused []time.Duration
	unprovable := 0
	for begin := time.Now(); len(issue) < n && time.Since(begin) < timesAtMost; {
		name, asked := newName(), time.Now()
		l, err := h.Issuer.Issue(t.Context(), name, h.grant())
		if err != nil {
			t.Fatalf("Issue: %v", err)
		}
		issue = append(issue, time.Since(asked))
		ended := time.Now()
		err = h.Issuer.Revoke(t.Context(), name, l.Handle)
		if err == nil {
			_, err = h.proof(t.Context(), name, l.Handle)
		}
		switch {
		case errors.Is(err, creds.ErrNotRevocable):
			unprovable++
		case err != nil:
			t.Fatalf("Revoke and Probe: %v", err)
		default:
			refused = append(refused, time.Since(ended))
		}
	}
	t.Logf("issue, of %d: p50 %v, p99 %v", len(issue), quantile(issue, 50), quantile(issue, 99))
	t.Logf("revoke, until a refusal is seen, of %d: p50 %v, p99 %v; unprovable: %d", len(refused), quantile(refused, 50), quantile(refused, 99), unprovable)
}

// quantile is the least that percent of the times are not above; 0 of none.
func quantile(ts []time.Duration, percent int) time.Duration {
	if len(ts) == 0 {
		return 0
	}
	slices.Sort(ts)
	return ts[(len(ts)*percent+99)/100-1].Round(10 * time.Microsecond)
}
