package monitor

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mayfly-ci/mayfly/runner/audit"
)

// A Record passes events on to the audit, and counts what they say. It
// remembers a little of each job that has ended and is not reported yet, and of
// each lease that could not be revoked. Where leases are, the journal knows.
type Record struct {
	next audit.Sink

	mu     sync.Mutex
	err    error // of the last event
	ended  map[string]ended
	leases map[string]lease

	jobs, issued, egress, reaped, reloads *prometheus.CounterVec
	stages                                *prometheus.HistogramVec
	recovered, stuck, events, failures    prometheus.Counter
}

var _ audit.Sink = (*Record)(nil)

// ended is a job that has ended; at is zero if an earlier life of the agent
// began it, and this one cannot know how long it took.
type ended struct {
	at   time.Time
	took time.Duration
}

// lease is one that could not be revoked so far, and was counted for that; or one
// that is unprovable until it ends.
type lease struct {
	issuer string
	until  time.Time
}

// NewRecord returns a record in front of a sink.
func NewRecord(next audit.Sink) *Record {
	vec := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	one := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	return &Record{
		next: next, ended: map[string]ended{}, leases: map[string]lease{},
		jobs:    vec("mayfly_jobs_total", "Jobs that were reported.", "provider", "conclusion"),
		issued:  vec("mayfly_leases_total", "What became of leases: issued, failed, revoked (and seen refused), unprovable (cannot be revoked), stuck (could not be revoked at first).", "issuer", "event"),
		egress:  vec("mayfly_egress_total", "Lines of the ledger: attempts of jobs to reach something.", "network", "verdict"),
		reaped:  vec("mayfly_reaped_total", "Orphans that the reaper went for: things with our label that no journal knew.", "kind"),
		reloads: vec("mayfly_policy_reloads_total", "Policies that were to replace the one in force.", "result"),
		stages: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "mayfly_job_stage_seconds", Help: "How long a stage of a job's life took; total is all of them.",
			Buckets: []float64{.001, .003, .01, .03, .1, .3, 1, 3, 10, 30, 100, 300, 1000, 3600},
		}, []string{"stage"}),
		recovered: one("mayfly_recovered_jobs_total", "Jobs of an earlier life of the agent that this one released."),
		stuck:     one("mayfly_releases_stuck_total", "Jobs that were reported although something of them could not be released."),
		events:    one("mayfly_audit_events_total", "Events that the audit took."),
		failures:  one("mayfly_audit_errors_total", "Events that the audit could not take; what they were about was not done."),
	}
}

// Append implements audit.Sink.
func (r *Record) Append(ctx context.Context, e audit.Event) error {
	err := r.next.Append(ctx, e)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.err = err
	if err != nil {
		r.failures.Inc()
	} else {
		r.events.Inc()
	}
	if err == nil || e.Action == "job.end" { // a job ends, written down or not
		r.count(e)
	}
	return err
}

// failing is why the last event is not in the audit.
func (r *Record) failing() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}

func (r *Record) count(e audit.Event) {
	good := e.Result == "ok"
	switch e.Action {
	case "job.end":
		r.endJob(e)
	case "job.recover":
		r.recovered.Inc()
		r.ended[e.Job] = ended{}
	case "job.complete":
		r.completeJob(e)
	case "lease.issue", "lease.revoke", "lease.unprovable":
		r.countLease(e, good)
	case "release.stuck":
		r.stuck.Inc()
	case "reap":
		r.reaped.WithLabelValues(oneOf(e.Detail["kind"], "box", "lease")).Inc()
	case "policy.reload":
		result := "ok"
		if !good {
			result = "refused"
		}
		r.reloads.WithLabelValues(result).Inc()
	default:
		if network, ok := strings.CutPrefix(e.Action, "egress."); ok {
			r.egress.WithLabelValues(oneOf(network, "dns", "tcp", "udp", "icmp"),
				oneOf(e.Detail["verdict"], "allowed", "learned", "refused", "failed", "ended")).Inc()
		}
	}
}

// oneOf keeps a label to known values.
func oneOf(value string, known ...string) string {
	if slices.Contains(known, value) {
		return value
	}
	return "other"
}

// endJob takes how long each stage took.
func (r *Record) endJob(e audit.Event) {
	spent := map[string]time.Duration{}
	var all time.Duration
	for key, value := range e.Detail {
		lap, ok := strings.CutPrefix(key, "took_")
		took, err := time.ParseDuration(value)
		if ok && err == nil {
			spent[stage(lap)] += took
			all += took
		}
	}
	for stage, took := range spent {
		r.stages.WithLabelValues(stage).Observe(took.Seconds())
	}
	r.ended[e.Job] = ended{e.Time, all}
}

// stage is the stage that a lap of the agent's stopwatch belongs to.
func stage(lap string) string {
	switch {
	case lap == "intend":
		return "admit"
	case lap == "gw":
		return "box"
	case lap == "take":
		return "adopt"
	case strings.HasPrefix(lap, "l-"):
		return "leases"
	}
	// The rest is of steps: step-ID, and rN for its rules.
	if known := oneOf(lap, "claim", "admit", "wait", "box", "adopt", "attach"); known != "other" {
		return known
	}
	return "steps"
}

// completeJob counts a report once, however often it has to be made.
func (r *Record) completeJob(e audit.Event) {
	job, ok := r.ended[e.Job]
	if !ok {
		return
	}
	delete(r.ended, e.Job)
	r.jobs.WithLabelValues(e.Detail["provider"], oneOf(e.Detail["conclusion"],
		"success", "failure", "cancelled", "timed-out", "refused", "skipped", "lost")).Inc()
	if !job.at.IsZero() {
		release := e.Time.Sub(job.at)
		r.stages.WithLabelValues("release").Observe(release.Seconds())
		r.stages.WithLabelValues("total").Observe((job.took + release).Seconds())
	}
}

func (r *Record) countLease(e audit.Event, good bool) {
	issuer := e.Detail["issuer"]
	_, stuck := r.leases[e.Object]
	event := ""
	switch {
	case e.Action == "lease.issue" && good:
		event = "issued"
	case e.Action == "lease.issue":
		event = "failed"
	case e.Action == "lease.unprovable":
		event = "unprovable"
		delete(r.leases, e.Object)
		if until, err := time.Parse(time.RFC3339Nano, e.Detail["until"]); err == nil {
			r.leases[e.Object] = lease{issuer, until}
		}
	case good:
		event = "revoked"
		delete(r.leases, e.Object)
	case !stuck: // it is tried again, and counted once
		event = "stuck"
		r.leases[e.Object] = lease{issuer: issuer}
	default:
		return
	}
	r.issued.WithLabelValues(issuer, event).Inc()
}

// unprovable counts the leases that nobody can take back and that have not ended
// yet, by issuer.
func (r *Record) unprovable(now time.Time) map[string]int {
	n := map[string]int{}
	r.mu.Lock()
	defer r.mu.Unlock()
	for name, l := range r.leases {
		switch {
		case l.until.IsZero():
		case now.Before(l.until):
			n[l.issuer]++
		default:
			delete(r.leases, name)
		}
	}
	return n
}
