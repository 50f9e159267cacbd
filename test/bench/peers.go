package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/test/dockertest"
	"github.com/mayfly-ci/mayfly/test/giteatest"
)

// How often things are done with each runner of the same Gitea. They take turns,
// and only one of them runs at a time.
const (
	peerPasses  = 2
	peerRounds  = 4                // a pass, one job each, right after the other
	peerIdle    = 2                // a pass, one job each, after a while without work
	peerMatrix  = 20               // jobs of one dispatch
	peerTimeout = 10 * time.Minute // for all; on an idle machine they take four
)

// A contestant is a runner that takes jobs of the Gitea.
type contestant struct {
	name  string // in rows
	label string // in runs-on
	tuned bool   // asks so often that it makes no difference how long it had no work
	start func(ctx context.Context, name string) (running, error)

	assigned, waited, first, done, whole, rate, idle, peak []float64
}

// running is a process that takes jobs.
type running interface {
	Pid() int
	Stop() error
}

// Statuses of a job in Gitea's database.
const (
	statusSuccess = 1
	statusRunning = 6
)

// peers compares runners: from the dispatch of a workflow to the job's own first
// write and to the end as the server has it, throughput, and memory.
func peers(ctx context.Context, w *world, t *table) (err error) {
	ctx, cancel := context.WithTimeout(ctx, peerTimeout)
	defer cancel()
	g, err := newGitea(ctx, w)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, g.close()) }()
	all := g.contestants()
	for pass := range peerPasses {
		for _, c := range all {
			if err := g.turn(ctx, c, pass); err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
		}
	}
	for _, c := range all {
		t.info(c.name+": queued → assigned", "ms", c.assigned...)
		if len(c.waited) > 0 {
			t.info(fmt.Sprintf("%s: queued → assigned, after %v without work", c.name, settling), "ms", c.waited...)
		}
		t.info(c.name+": assigned → first byte", "ms", c.first...)
		t.info(c.name+": assigned → done", "ms", c.done...)
		t.info(c.name+": queued → done", "ms", c.whole...)
		t.info(fmt.Sprintf("%s: %d jobs of a matrix, capacity %d", c.name, peerMatrix, capacity), "1/min", c.rate...)
		t.info(c.name+": RSS, idle", "MiB", c.idle...)
		t.info(c.name+": RSS, at most", "MiB", c.peak...)
	}
	return nil
}

// A gitea is the server of all contestants, and who watches it.
type gitea struct {
	world  *world
	server *giteatest.Server
	repo   *giteatest.Repository
	docker *dockertest.Daemon
	watch  *watch
}

func newGitea(ctx context.Context, w *world) (g *gitea, err error) {
	g = &gitea{world: w}
	defer func() {
		if err != nil {
			err = errors.Join(err, g.close())
		}
	}()
	if g.server, err = giteatest.New(ctx, w.path("gitea"), giteatest.Config{}); err != nil {
		return g, err
	}
	if g.repo, err = g.server.NewRepository(ctx, "bench"); err != nil {
		return g, err
	}
	if g.docker, err = dockertest.New(ctx, w.path("docker")); err != nil {
		return g, err
	}
	files := map[string]string{}
	for _, c := range g.contestants() {
		files[".gitea/workflows/one-"+c.label+".yml"] = "on: workflow_dispatch\njobs:\n  one:\n    runs-on: " + c.label +
			"\n    steps:\n      - run: echo $EPOCHREALTIME\n"
		files[".gitea/workflows/many-"+c.label+".yml"] = "on: workflow_dispatch\njobs:\n  many:\n    runs-on: " + c.label +
			"\n    strategy: {matrix: {n: [" + numbers(peerMatrix) + "]}}\n    steps:\n      - run: echo $EPOCHREALTIME\n"
	}
	if _, err = g.repo.Push(ctx, files); err != nil {
		return g, err
	}
	g.watch, err = startWatch(g.server.Database())
	return g, err
}

func numbers(n int) string {
	var all []string
	for i := range n {
		all = append(all, strconv.Itoa(i))
	}
	return strings.Join(all, ", ")
}

func (g *gitea) close() error {
	var err error
	if g.watch != nil {
		err = g.watch.stop()
	}
	if g.server != nil {
		err = errors.Join(err, g.server.Close())
	}
	if g.docker != nil {
		err = errors.Join(err, g.docker.Close())
	}
	return err
}

// contestants are Mayfly and Gitea's own runner, on the host and in Docker, as
// they come and with short pauses between two asks for a job.
func (g *gitea) contestants() []*contestant {
	var all []*contestant
	for _, tuned := range []bool{false, true} {
		suffix, poll, labelSuffix := "", "", ""
		if tuned {
			suffix, poll, labelSuffix = ", tuned", ", poll: 200ms", "-tuned"
		}
		mayfly := func(runtime, section string) {
			label := "mayfly-" + runtime + labelSuffix
			all = append(all, &contestant{name: "mayfly, " + runtime + suffix, label: label, tuned: tuned, start: func(ctx context.Context, name string) (running, error) {
				return g.mayfly(ctx, name, label, poll, runtime, section)
			}})
		}
		peer := func(where, image string) {
			label := "peer-" + where + labelSuffix
			all = append(all, &contestant{name: "gitea-runner, " + where + suffix, label: label, tuned: tuned, start: func(ctx context.Context, name string) (running, error) {
				return g.server.StartPeer(ctx, giteatest.PeerConfig{Name: name, Label: label, Image: image, Docker: g.docker.Host(), Capacity: capacity, Tuned: tuned})
			}})
		}
		mayfly("native", "")
		peer("host", "")
		mayfly("docker", fmt.Sprintf("image: %q, host: %q", dockertest.Debian, g.docker.Host()))
		peer("docker", dockertest.Debian)
	}
	return all
}

const giteaPolicy = `version: 1
rules:
  - name: all
    match: {trust: [fork, branch, protected]}
    runtime: %s
    timeout: 5m
`

const giteaConfig = `version: 1
state: %[1]s
slots: %[2]d
policy: %[1]s.policy
providers: {gitea: {url: %[3]q, token_file: %[1]s.token, name: %[4]s, labels: [%[4]s]%[5]s}}
sandbox: {%[6]s: {%[7]s}}
log: {level: warn}
`

// mayfly starts an agent for the jobs of a label.
func (g *gitea) mayfly(ctx context.Context, name, label, poll, runtime, section string) (running, error) {
	token, err := g.server.RegistrationToken(ctx)
	if err != nil {
		return nil, err
	}
	state := g.world.path(name)
	err = errors.Join(
		os.Mkdir(state, 0o700),
		os.WriteFile(state+".token", []byte(token), 0o600),
		os.WriteFile(state+".policy", fmt.Appendf(nil, giteaPolicy, runtime), 0o600),
		os.WriteFile(state+".yaml", fmt.Appendf(nil, giteaConfig, state, capacity, g.server.URL(), label, poll, runtime, section), 0o600),
	)
	if err != nil {
		return nil, err
	}
	a, err := g.world.launch(state, state+".yaml")
	return process{a}, err
}

// process is an agent as one of those that take jobs.
type process struct{ *agent }

func (p process) Pid() int    { return p.cmd.Process.Pid }
func (p process) Stop() error { return p.stop() }

// turn is one pass of one contestant.
func (g *gitea) turn(ctx context.Context, c *contestant, pass int) (err error) {
	r, err := c.start(ctx, fmt.Sprintf("%s-%d", c.label, pass))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Stop()) }()
	for round := range peerRounds + 1 {
		s, err := g.job(ctx, c)
		if err != nil {
			return err
		}
		if round == 0 { // it made what is made once
			continue
		}
		c.assigned = append(c.assigned, ms(s.assigned.Sub(s.queued)))
		c.first = append(c.first, ms(s.first.Sub(s.assigned)))
		c.done = append(c.done, ms(s.done.Sub(s.assigned)))
		c.whole = append(c.whole, ms(s.done.Sub(s.queued)))
	}
	status := fmt.Sprintf("/proc/%d/status", r.Pid())
	for range peerIdle {
		if err := pause(ctx, settling); err != nil {
			return err
		}
		idle, err := field(status, "VmRSS:")
		if err != nil {
			return err
		}
		c.idle = append(c.idle, idle)
		if c.tuned {
			break
		}
		s, err := g.job(ctx, c)
		if err != nil {
			return err
		}
		c.waited = append(c.waited, ms(s.assigned.Sub(s.queued)))
	}
	rate, err := g.batch(ctx, c)
	if err != nil {
		return err
	}
	peak, err := field(status, "VmHWM:")
	c.rate, c.peak = append(c.rate, rate), append(c.peak, peak)
	return err
}

// stamps are the moments of one job.
type stamps struct{ queued, assigned, first, done time.Time }

// job runs one job. It is queued when the dispatch is sent.
func (g *gitea) job(ctx context.Context, c *contestant) (s stamps, err error) {
	s.queued = time.Now()
	jobs, err := g.dispatch(ctx, "one-"+c.label+".yml", 1)
	if err != nil {
		return s, err
	}
	log, err := g.repo.Log(ctx, jobs[0].ID)
	if err != nil {
		return s, err
	}
	for line := range strings.Lines(giteatest.Printed(log)) {
		if at, err := epoch(strings.TrimSpace(line)); err == nil {
			s.first = at
		}
	}
	s.assigned, s.done = g.watch.at(jobs[0].ID, statusRunning), g.watch.at(jobs[0].ID, statusSuccess)
	if s.first.IsZero() || s.assigned.IsZero() || s.done.IsZero() {
		err = fmt.Errorf("job %d: a moment is missing: %+v: %s", jobs[0].ID, s, tail(log))
	}
	return s, err
}

// dispatch runs a workflow, whose jobs must succeed.
func (g *gitea) dispatch(ctx context.Context, file string, want int) ([]giteatest.Job, error) {
	run, err := g.repo.Dispatch(ctx, file)
	if err != nil {
		return nil, err
	}
	jobs, err := g.repo.Wait(ctx, run)
	if err == nil && len(jobs) != want {
		err = fmt.Errorf("%s: %d jobs, want %d", file, len(jobs), want)
	}
	for _, j := range jobs {
		if err == nil && j.Conclusion != "success" {
			log, _ := g.repo.Log(ctx, j.ID)
			err = fmt.Errorf("%s: %s: %s", file, j.Conclusion, tail(log))
		}
	}
	return jobs, err
}

// batch returns the jobs a minute from the first assignment to the last end.
func (g *gitea) batch(ctx context.Context, c *contestant) (float64, error) {
	jobs, err := g.dispatch(ctx, "many-"+c.label+".yml", peerMatrix)
	if err != nil {
		return 0, err
	}
	var begun, ended time.Time
	for _, j := range jobs {
		at, end := g.watch.at(j.ID, statusRunning), g.watch.at(j.ID, statusSuccess)
		if begun.IsZero() || at.Before(begun) {
			begun = at
		}
		if end.After(ended) {
			ended = end
		}
	}
	if begun.IsZero() || ended.IsZero() {
		return 0, errors.New("a moment of the matrix is missing")
	}
	return peerMatrix / ended.Sub(begun).Minutes(), nil
}

// A watch knows when each job of the server changed its status.
type watch struct {
	cmd *exec.Cmd

	mu    sync.Mutex
	times map[[2]int64]time.Time // by job and status
	read  sync.WaitGroup
}

func startWatch(database string) (*watch, error) {
	w := &watch{cmd: exec.Command("python3", "test/bench/watch.py", database), times: map[[2]int64]time.Time{}}
	out, err := w.cmd.StdoutPipe()
	if err == nil {
		err = w.cmd.Start()
	}
	if err != nil {
		return nil, err
	}
	w.read.Go(func() {
		for s := bufio.NewScanner(out); s.Scan(); {
			var job, status int64
			var at string
			if _, err := fmt.Sscan(s.Text(), &job, &status, &at); err != nil {
				continue // cut off by its end
			}
			if t, err := epoch(at); err == nil {
				w.mu.Lock()
				w.times[[2]int64{job, status}] = t
				w.mu.Unlock()
			}
		}
	})
	return w, nil
}

// at is zero if that has not happened.
func (w *watch) at(job, status int64) time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.times[[2]int64{job, status}]
}

func (w *watch) stop() error {
	err := w.cmd.Process.Kill()
	w.read.Wait()
	_ = w.cmd.Wait() // killed
	return err
}
