package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/configs"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/monitor"
	"github.com/mayfly-ci/mayfly/runner/policy"
)

// What an agent does beside running jobs: it says how it is, to whoever looks
// and to its service manager, and takes another policy.

// quotasOf are the quotas of the configuration, as the agent asks for them.
func quotasOf(c configs.Quotas) (runner.Quotas, error) {
	q := runner.Quotas{Waiting: c.Waiting, Patience: c.Patience}
	var errs []error
	patterns := make([]policy.Pattern, len(c.Repositories))
	for i, r := range c.Repositories {
		p, err := policy.ParsePattern(r.Match)
		if err != nil {
			errs = append(errs, r.Errorf("%w", err))
		}
		patterns[i] = p
	}
	if c.Jobs > 0 || len(patterns) > 0 {
		q.Jobs = func(_, repository string) int {
			for i, p := range patterns {
				if p.Match(repository) {
					return c.Repositories[i].Jobs
				}
			}
			return c.Jobs
		}
	}
	return q, errors.Join(errs...)
}

// checkWarm refuses more boxes than there are ranges of user ids for.
func checkWarm(c *configs.Config, rules *policy.Policy) error {
	room, want := configs.MaxSlots-c.Slots-c.Keep, c.Warm.Boxes*runner.Classes(rules)
	if want > room {
		return c.Warm.Errorf("%s: beside %d slots and %d kept boxes there is room for %d", warmText(c, rules), c.Slots, c.Keep, room)
	}
	return nil
}

// warmText says how many boxes are kept ready.
func warmText(c *configs.Config, rules *policy.Policy) string {
	classes := runner.Classes(rules)
	text := fmt.Sprintf("warm: %d boxes of each of %d classes that the policy has, %d in all", c.Warm.Boxes, classes, c.Warm.Boxes*classes)
	if c.Warm.Boxes > c.Slots {
		text += fmt.Sprintf("; only %d jobs run at once, so that more of a class are seldom of use", c.Slots)
	}
	return text
}

// examineWarm says what the boxes that are ready cost.
func (w *wiring) examineWarm() []finding {
	f := finding{"agent", "warm boxes", stateOK, "none: a job's box is made when the job comes (warm: in the configuration)"}
	if w.config.Warm.Boxes > 0 {
		f.Detail = warmText(w.config, w.agent.Policy) + "; one takes 2 MiB while it is idle, and with an engine what that runs beside it"
	}
	return []finding{f}
}

// serve opens the monitor, if the configuration says where. record is where the
// agent writes its audit.
func (w *wiring) serve(agent *runner.Agent, record *monitor.Record) error {
	m := w.config.Monitor
	if m.Network == "" {
		return nil
	}
	l, err := monitor.Listen(m.Network, m.Address)
	if err != nil {
		return err
	}
	pages := http.NewServeMux()
	pages.Handle("/", monitor.Handler(monitor.Config{
		Status: agent.Status, Record: record, Version: version,
		Jobs: w.state.Jobs,
		Dirs: map[string]string{"journal": filepath.Join(w.state.Dir, "jobs"), "audit": w.auditDir()},
	}))
	if w.identity != nil {
		pages.Handle("/.well-known/", w.identity)
	}
	w.closers = append(w.closers, monitor.Serve(l, pages))
	w.agent.Log.Info().Str("network", m.Network).Str("address", m.Address).Msg("monitor")
	return nil
}

// reload reads the policy again and puts it in force if it is good.
func (w *wiring) reload(ctx context.Context, agent *runner.Agent) {
	old := agent.Status().Policy
	rules, err := readPolicy(w.policyFile)
	if err == nil {
		err = errors.Join(w.config.Validate(), w.checkRules(rules))
	}
	if err := agent.Reload(ctx, rules, err); err != nil {
		w.agent.Log.Error().Err(err).Str("policy", old).Msg("reload: the policy stays")
		return
	}
	w.agent.Log.Info().Str("old", old).Str("policy", rules.Digest()).Msg("reload")
}

// attend does what signals and the service manager ask for while the agent
// runs, until ctx ends.
func (w *wiring) attend(ctx, drain context.Context, agent *runner.Agent, sd notifier, hangups <-chan os.Signal) {
	tell := func(err error) {
		if err != nil {
			w.agent.Log.Warn().Err(err).Msg("notify")
		}
	}
	tell(sd.send("READY=1"))
	var tick <-chan time.Time
	if sd.every > 0 {
		t := time.NewTicker(sd.every)
		defer t.Stop()
		tick = t.C
	}
	look := time.NewTicker(restAfter)
	defer look.Stop()
	var r rest
	for draining := drain.Done(); ; {
		select {
		case <-look.C:
			if err := r.look(agent.Status()); err != nil {
				w.agent.Log.Warn().Err(err).Msg("rest")
			}
		case <-hangups:
			tell(sd.reloading())
			w.reload(ctx, agent)
			tell(sd.send("READY=1"))
		case <-tick:
			_ = agent.Status() // does not return if the agent hangs
			tell(sd.send("WATCHDOG=1"))
		case <-draining:
			draining = nil
			tell(sd.send("STOPPING=1"))
		case <-ctx.Done():
			if draining != nil { // both came at once, or there was an error
				tell(sd.send("STOPPING=1"))
			}
			return
		}
	}
}

// examineMonitor asks the agent that runs, if one does.
func (w *wiring) examineMonitor() []finding {
	m := w.config.Monitor
	f := finding{About: "monitor", Name: "off", State: stateOK, Detail: "monitor: in the configuration turns /healthz and /metrics on"}
	if m.Network != "" {
		f.Name = m.Address
		var health monitor.Health
		switch err := ask(m, &health); {
		case err != nil:
			f.Detail = "no agent answers there now"
		case health.Policy != w.agent.Policy.Digest():
			f.State, f.Detail = stateMissing, "the agent works by the policy "+health.Policy+", which is not that of the file: reload it (SIGHUP)"
		case len(health.Problems) > 0:
			var b strings.Builder
			for _, p := range health.Problems {
				fmt.Fprintf(&b, "; %s: %s", p.What, p.Why)
			}
			f.State, f.Detail = stateMissing, b.String()[2:]
		default:
			f.Detail = "an agent is well, and works by the policy of the file"
		}
	}
	return []finding{f}
}

// ask asks a living agent for its health.
func ask(m configs.Monitor, into *monitor.Health) error {
	ctx, cancel := context.WithTimeout(context.Background(), doctorTimeout)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, m.Network, m.Address)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent/healthz", nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	return errors.Join(json.NewDecoder(resp.Body).Decode(into), resp.Body.Close())
}

// examineSlots says how many jobs run at once.
func (w *wiring) examineSlots() []finding {
	q := w.config.Quotas
	f := finding{"agent", "slots", stateOK, fmt.Sprintf("%d jobs at once", w.config.Slots)}
	if q.Jobs > 0 {
		f.Detail += fmt.Sprintf(", %d of one repository", q.Jobs)
	}
	if n := len(q.Repositories); n > 0 {
		f.Detail += fmt.Sprintf(", %d exceptions", n)
	}
	return []finding{f}
}
