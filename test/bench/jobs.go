package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers/local"
	"github.com/mayfly-ci/mayfly/runner/audit"
)

// A timing is one job with a lease.
type timing struct {
	result local.Result
	first  time.Time // of the step's own write
}

// latency measures one job at a time, in a box that is made for it and in one
// that is ready, and beside it what is no work of ours.
func latency(ctx context.Context, w *world, t *table) error {
	cold, err := w.start("one", capacity, "")
	if err != nil {
		return err
	}
	warm, err := w.startWarm("warm", capacity)
	if err != nil {
		return err
	}
	f, err := newFloors(w, "floors")
	if err != nil {
		return err
	}
	agents, taken := []*agent{cold, warm}, [2]timings{}
	var issued, revoked []float64
	for i := range latencyRounds + 1 {
		for n, a := range agents {
			if err := a.ready(ctx); err != nil {
				return err
			}
			if err := taken[n].round(ctx, a); err != nil {
				return err
			}
		}
		issue, revoke, err := w.lease(ctx, fmt.Sprintf("bench-%d", i))
		if err != nil {
			return err
		}
		if err := f.round(ctx); err != nil {
			return err
		}
		if i == 0 { // it made what later ones find: disk template, /etc, connections
			f.forget()
			taken = [2]timings{}
			continue
		}
		issued, revoked = append(issued, ms(issue)), append(revoked, ms(revoke))
	}
	for n, a := range agents {
		if err := a.stop(); err != nil {
			return err
		}
		stages, err := a.stages()
		if err != nil {
			return err
		}
		if n == 0 {
			taken[n].rows(t, "cold", 30, 70, stages, revoked)
		} else if err := taken[n].warmRows(t, stages, revoked); err != nil {
			return err
		}
		if err := stages.print([]string{"cold", "warm"}[n], taken[n].leased); err != nil {
			return err
		}
	}
	t.info("issuer: issue, called alone", "ms", issued...)
	t.info("issuer: revoke and probe, called alone", "ms", revoked...)
	f.rows(t)
	return nil
}

// timings are jobs of one agent, with a lease and without.
type timings struct{ leased, bare []timing }

func (j *timings) round(ctx context.Context, a *agent) error {
	leased, err := a.time(ctx, "lease.yml")
	if err != nil {
		return err
	}
	if err := a.ready(ctx); err != nil {
		return err
	}
	bare, err := a.time(ctx, "bare.yml")
	j.leased, j.bare = append(j.leased, leased), append(j.bare, bare)
	return err
}

// ready waits until the agent has the boxes ready that it is configured to have,
// each of which has a log in the journal.
func (a *agent) ready(ctx context.Context) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		logs, err := filepath.Glob(filepath.Join(a.state, "jobs", "pool-*"))
		if err != nil || len(logs) == a.warm {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// rows take the issuer's own time off: of each job what the audit says of its
// lease, and for the revocation, which the audit does not separate, the median
// of calling the same issuer between the jobs.
func (j timings) rows(t *table, kind string, firstBudget, wholeBudget float64, s stages, revoked []float64) {
	var first, firstRaw, claimed, whole, wholeRaw, issue, without, wholeBare []float64
	for _, l := range j.leased {
		own := ms(s.took(l.result.Name, "l-db"))
		issue = append(issue, own)
		firstRaw = append(firstRaw, ms(l.first.Sub(l.result.AnsweredAt)))
		first = append(first, ms(l.first.Sub(l.result.AnsweredAt))-own)
		claimed = append(claimed, ms(l.first.Sub(l.result.ClaimedAt))-own)
		wholeRaw = append(wholeRaw, ms(l.result.CompletedAt.Sub(l.result.AnsweredAt)))
		whole = append(whole, ms(l.result.CompletedAt.Sub(l.result.AnsweredAt))-own-median(revoked))
	}
	for _, b := range j.bare {
		without = append(without, ms(b.first.Sub(b.result.AnsweredAt)))
		wholeBare = append(wholeBare, ms(b.result.CompletedAt.Sub(b.result.AnsweredAt)))
	}
	t.most(firstBudget, "claim answered → first byte, "+kind+", one lease, without the issuer's time", "ms", first...)
	t.info("  the same with the issuer's time", "ms", firstRaw...)
	t.info("  the same from the claim (reads git), without the issuer's time", "ms", claimed...)
	t.info("  the same without a lease", "ms", without...)
	t.most(wholeBudget, "claim answered → complete, "+kind+", lease revoked, box gone, without the issuer's time", "ms", whole...)
	t.info("  the same with the issuer's time", "ms", wholeRaw...)
	t.info("  the same without a lease", "ms", wholeBare...)
	t.info("  issuer: issue, as the audit has it", "ms", issue...)
}

// warmRows are those of jobs that adopted a box, as each must have.
func (j timings) warmRows(t *table, s stages, revoked []float64) error {
	j.rows(t, "warm", 10, 40, s, revoked)
	var adoption []float64
	for _, l := range j.leased {
		name := l.result.Name
		if s.took(name, "adopt") == 0 {
			return fmt.Errorf("job %s adopted no box", name)
		}
		adoption = append(adoption, ms(s.took(name, "take")+s.took(name, "adopt")+s.took(name, "attach")))
	}
	t.most(5, "adoption of a warm box: asked, taken, attached", "ms", adoption...)
	return nil
}

// time runs a job that prints the time.
func (a *agent) time(ctx context.Context, file string) (timing, error) {
	r, err := a.run(ctx, file)
	if err != nil {
		return timing{}, err
	}
	text, err := a.printed(r.ID)
	if err != nil {
		return timing{}, err
	}
	first, err := epoch(strings.TrimSpace(text))
	return timing{r, first}, err
}

// epoch reads bash's EPOCHREALTIME, seconds with six decimals.
func epoch(text string) (time.Time, error) {
	seconds, micros, _ := strings.Cut(text, ".")
	n, err := strconv.ParseInt(seconds+micros, 10, 64)
	if err != nil || len(micros) != 6 {
		return time.Time{}, fmt.Errorf("time %q: %w", text, err)
	}
	return time.UnixMicro(n), nil
}

// lease issues, revokes and probes as the agent does, and nothing else.
func (w *world) lease(ctx context.Context, name string) (issue, revoke time.Duration, err error) {
	start := time.Now()
	grant := creds.Grant{Subject: creds.Subject{Provider: local.Name, Job: name}, Scope: json.RawMessage(`{}`), Expires: start.Add(4 * time.Minute)}
	l, err := w.issuer.Issue(ctx, name, grant)
	if err != nil {
		return 0, 0, err
	}
	issue = time.Since(start)
	start = time.Now()
	err = w.issuer.Revoke(ctx, name, l.Handle)
	if err == nil {
		_, err = w.issuer.Probe(ctx, name, l.Handle)
	}
	return issue, time.Since(start), err
}

// stages are the events of the audit by job.
type stages map[string][]audit.Event

func (a *agent) stages() (stages, error) {
	s := stages{}
	for e, err := range audit.Read(filepath.Join(a.state, "audit"), audit.Filter{}) {
		if err != nil {
			return nil, err
		}
		s[e.Job] = append(s[e.Job], e)
	}
	return s, nil
}

// took is the duration of a stage up to the end of the last step, as the agent
// measured it.
func (s stages) took(job, stage string) time.Duration {
	for _, e := range s[job] {
		if text, ok := e.Detail["took_"+stage]; ok && e.Action == "job.end" {
			d, _ := time.ParseDuration(text) // the agent wrote it
			return d
		}
	}
	return 0
}

func (s stages) at(job, action string) time.Time {
	for _, e := range s[job] {
		if e.Action == action {
			return e.Time
		}
	}
	return time.Time{}
}

// print shows where the median time of a job goes.
func (s stages) print(kind string, jobs []timing) error {
	if len(jobs) == 0 {
		return errors.New("no jobs")
	}
	taken := map[string][]float64{}
	for _, j := range jobs {
		name, end := j.result.Name, s.at(j.result.Name, "job.end")
		for _, stage := range []string{"admit", "take", "intend", "gw", "box", "adopt", "attach", "l-db"} {
			taken[stage] = append(taken[stage], ms(s.took(name, stage)))
		}
		before := s.at(name, "lease.issue")
		revoked, complete := s.at(name, "lease.revoke"), s.at(name, "job.complete")
		taken["first byte"] = append(taken["first byte"], ms(j.first.Sub(before)))
		taken["rest of the step"] = append(taken["rest of the step"], ms(end.Sub(j.first)))
		taken["outcome and revoke"] = append(taken["outcome and revoke"], ms(revoked.Sub(end)))
		taken["box and gateway gone"] = append(taken["box and gateway gone"], ms(complete.Sub(revoked)))
		taken["report"] = append(taken["report"], ms(j.result.CompletedAt.Sub(complete)))
	}
	fmt.Printf("stages of a job with a lease, %s, medians (least) in ms:", kind)
	for _, stage := range []string{
		"admit", "take", "intend", "gw", "box", "adopt", "attach", "l-db", "first byte", "rest of the step",
		"outcome and revoke", "box and gateway gone", "report",
	} {
		fmt.Printf(" %s %.2f (%.2f);", stage, median(taken[stage]), slices.Min(taken[stage]))
	}
	fmt.Println()
	return nil
}

// steps measures what one more step costs: the time from a step's start to the
// next one's.
func steps(ctx context.Context, w *world, t *table) error {
	a, err := w.start("steps", capacity, "")
	if err != nil {
		return err
	}
	var each []float64
	for i := range stepsJobs + 1 {
		r, err := a.run(ctx, "steps.yml")
		if err != nil {
			return err
		}
		states, err := local.ReadSteps(a.spool(), r.ID)
		if err != nil {
			return err
		}
		for n := range len(states) - 1 {
			if i > 0 {
				each = append(each, ms(states[n+1].Started.Sub(states[n].Started)))
			}
		}
	}
	t.most(3, "a step inside a running box (bash -e, true)", "ms", each...)
	return a.stop()
}

// throughput gives an agent more jobs than it has slots for.
func throughput(ctx context.Context, w *world, t *table) error {
	a, err := w.start("many", capacity, "")
	if err != nil {
		return err
	}
	fresh, freshOwn, err := idleRSS(ctx, a)
	if err != nil {
		return err
	}
	rates, used := map[string][]float64{}, map[string][]float64{}
	for range batches {
		for _, file := range []string{"true.yml", "leases.yml"} {
			before, err := cpu(a.cmd.Process.Pid)
			if err != nil {
				return err
			}
			rate, err := a.batch(ctx, file, jobsOfABatch)
			if err != nil {
				return err
			}
			after, err := cpu(a.cmd.Process.Pid)
			if err != nil {
				return err
			}
			rates[file] = append(rates[file], rate)
			used[file] = append(used[file], ms(after-before)/(jobsOfABatch+1))
		}
	}
	later, laterOwn, err := idleRSS(ctx, a)
	if err != nil {
		return err
	}
	t.least(3000, fmt.Sprintf("jobs a minute, capacity %d, %d jobs", capacity, jobsOfABatch), "1/min", rates["true.yml"]...)
	t.info("  the same with a lease each, the issuer's time included", "1/min", rates["leases.yml"]...)
	t.info("  CPU time of agent, git and boxes, a job", "ms", used["true.yml"]...)
	t.info("  CPU time of agent, git and boxes, a job with a lease", "ms", used["leases.yml"]...)
	t.most(30, "idle agent RSS, fresh", "MiB", fresh)
	t.most(30, fmt.Sprintf("idle agent RSS, after %d jobs", 2*batches*jobsOfABatch), "MiB", later)
	t.info("  what of it is no page of a file, fresh and later", "MiB", freshOwn, laterOwn)
	return errors.Join(binarySize(w, t), a.stop())
}

// batch returns the jobs a minute from the first claim to the last report.
func (a *agent) batch(ctx context.Context, file string, jobs int) (float64, error) {
	if _, err := a.run(ctx, file); err != nil { // makes what is made once
		return 0, err
	}
	var ids []string
	for range jobs {
		id, err := a.submit(file)
		if err != nil {
			return 0, err
		}
		ids = append(ids, id)
	}
	var begun, ended []time.Time
	for _, id := range ids {
		r, err := a.wait(ctx, id)
		if err != nil {
			return 0, err
		}
		begun, ended = append(begun, r.ClaimedAt), append(ended, r.CompletedAt)
	}
	d := slices.MaxFunc(ended, time.Time.Compare).Sub(slices.MinFunc(begun, time.Time.Compare))
	return float64(jobs) / d.Minutes(), nil
}
