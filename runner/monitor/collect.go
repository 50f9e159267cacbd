package monitor

import (
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// registry has all that /metrics shows.
func registry(c Config) *prometheus.Registry {
	r := c.Record
	reg := prometheus.NewRegistry()
	reg.MustRegister(
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		r.jobs, r.issued, r.egress, r.reaped, r.reloads, r.stages, r.recovered, r.stuck, r.events, r.failures,
		newMoment(c),
	)
	return reg
}

// A moment is what the agent says when it is asked.
type moment struct {
	config Config
	descs  map[string]*prometheus.Desc
}

func newMoment(c Config) *moment {
	m := &moment{c, map[string]*prometheus.Desc{}}
	for _, d := range []struct {
		name, help string
		labels     []string
	}{
		{"mayfly_build_info", "1; the version is in the label.", []string{"version", "go"}},
		{"mayfly_policy_info", "1; the digest of the policy in force for new jobs is in the label.", []string{"digest"}},
		{"mayfly_slots", "Jobs that may run at once.", nil},
		{"mayfly_slots_used", "Slots that are held.", nil},
		{"mayfly_boxes_stuck", "Boxes that will not die; no jobs are taken while there is one.", nil},
		{"mayfly_boxes_warm", "Boxes that are ready and that no job has.", nil},
		{"mayfly_jobs", "Jobs that are not reported yet: claimed, waiting for their repository's turn, working.", []string{"provider", "state"}},
		{"mayfly_polls_total", "Answers of the service to the question for jobs, errors included.", []string{"provider"}},
		{"mayfly_poll_errors_total", "Errors among them.", []string{"provider"}},
		{"mayfly_poll_failing", "1 if the last one was an error.", []string{"provider"}},
		{"mayfly_leases", "Leases by the state that the journal has them in: intended, issued, renewed, revoking, stuck; and unprovable, until they end, of this life of the agent.", []string{"issuer", "state"}},
	} {
		m.descs[d.name] = prometheus.NewDesc(d.name, d.help, d.labels, nil)
	}
	return m
}

// Describe implements prometheus.Collector.
func (m *moment) Describe(to chan<- *prometheus.Desc) {
	for _, d := range m.descs {
		to <- d
	}
}

// Collect implements prometheus.Collector.
func (m *moment) Collect(to chan<- prometheus.Metric) {
	send := func(kind prometheus.ValueType, name string, value float64, labels ...string) {
		to <- prometheus.MustNewConstMetric(m.descs[name], kind, value, labels...)
	}
	gauge := func(name string, value int, labels ...string) {
		send(prometheus.GaugeValue, name, float64(value), labels...)
	}
	s := m.config.Status()
	gauge("mayfly_build_info", 1, m.config.Version, runtime.Version())
	gauge("mayfly_policy_info", 1, s.Policy)
	gauge("mayfly_slots", s.Slots)
	gauge("mayfly_slots_used", s.Busy)
	gauge("mayfly_boxes_stuck", s.Jammed)
	gauge("mayfly_boxes_warm", s.Warm)
	for name, p := range s.Providers {
		gauge("mayfly_jobs", p.Claimed, name, "claimed")
		gauge("mayfly_jobs", p.Waiting, name, "waiting")
		gauge("mayfly_jobs", p.Working, name, "working")
		send(prometheus.CounterValue, "mayfly_polls_total", float64(p.Polls), name)
		send(prometheus.CounterValue, "mayfly_poll_errors_total", float64(p.Errors), name)
		failing := 0
		if p.Failing != nil {
			failing = 1
		}
		gauge("mayfly_poll_failing", failing, name)
	}
	for at, n := range m.leases() {
		gauge("mayfly_leases", n, at.issuer, at.state)
	}
}

type leaseAt struct{ issuer, state string }

// leases counts what the journal has. What cannot be read of it is a problem of
// /healthz.
func (m *moment) leases() map[leaseAt]int {
	count := map[leaseAt]int{}
	jobs, _ := m.config.Jobs()
	for _, j := range jobs {
		for _, d := range j.Owes {
			if d.State != "" {
				count[leaseAt{d.By, d.State}]++
			}
			if d.State != "" && !d.Stuck() {
				count[leaseAt{d.By, "stuck"}] += 0 // there to alert on before it is more
			}
		}
	}
	for issuer, n := range m.config.Record.unprovable(time.Now()) {
		count[leaseAt{issuer, "unprovable"}] += n
	}
	return count
}
