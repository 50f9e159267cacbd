package runner

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/workflow"
	"github.com/mayfly-ci/mayfly/runner/internal/journal"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// A service of a job has a gateway and a box of its own, held around the job's.
// The job reaches it through its own gateway, which dials into the service's
// box; a service reaches nothing that the policy does not name for it, and never
// the job (docs/adr/0018).

// A service is one of the job's, while the agent has it.
type service struct {
	workflow.Container
	index int
	host  string // what the job calls it
	image sandbox.Image
	box   sandbox.Sandbox // nil before it is made
	log   *tail

	exit sandbox.Exit // these are valid when done is closed
	err  error
	done chan struct{} // nil before it runs
}

func (s *service) key() string { return "service " + s.Name }

// contain evaluates the containers that the workflow names, and asks the policy
// about each image, before anything is made.
func (l *life) contain(ctx context.Context, plan policy.Plan) (policy.Plan, error) {
	if len(l.job.Containers) == 0 {
		return plan, nil
	}
	scope, err := l.startScope()
	if err != nil {
		return plan, err
	}
	used := map[uint16]bool{}
	for _, c := range l.job.Containers {
		evaluated, err := workflow.Contain(c, scope)
		if err != nil {
			return plan, err
		}
		if evaluated.Image == "" {
			continue // as on GitHub: an expression may leave it out
		}
		full, err := plan.AllowImage(evaluated.Image)
		if err != nil {
			err = fmt.Errorf("%s: %w", c.Position, err)
			return plan, errors.Join(err, l.audit(ctx, l.log.Job, "image.refuse", evaluated.Image, err, "service", c.Name, "rule", plan.Rule))
		}
		evaluated.Image = full
		if c.Name == "" {
			l.own = &evaluated
			plan.Image, plan.Limits = full, lower(plan.Limits, evaluated.Options)
			continue
		}
		s := &service{Container: evaluated, index: len(l.services), host: strings.ToLower(c.Name), log: newTail(l.out)}
		if err := s.choosePorts(used); err != nil {
			return plan, fmt.Errorf("%w: %s: %w", providers.ErrBadJob, c.Position, err)
		}
		l.services = append(l.services, s)
	}
	return plan, nil
}

// startScope is what the expressions of containers can see.
func (l *life) startScope() (workflow.Scope, error) {
	contexts := maps.Clone(l.job.Contexts)
	if contexts == nil {
		contexts = map[string]any{}
	}
	contexts["secrets"] = l.job.Secrets
	scope := workflow.Scope{Contexts: contexts, Status: providers.Success}
	env, err := variables(l.job.Env, scope)
	if err != nil {
		return scope, fmt.Errorf("%w: %w", providers.ErrBadJob, err)
	}
	contexts["env"] = env
	return scope, nil
}

// lower is limits with what a container asks less of. Where the plan says
// nothing the runtime's default stands, which nobody here knows.
func lower(limits sandbox.Limits, o workflow.Options) sandbox.Limits {
	for _, l := range []struct {
		plan *int64
		own  int64
	}{{&limits.Memory, o.Memory}, {&limits.MilliCPU, o.MilliCPU}, {&limits.Pids, o.Pids}} {
		if l.own > 0 && l.own < *l.plan {
			*l.plan = l.own
		}
	}
	return limits
}

// firstPort is where ports begin that the workflow leaves to us, if the service's
// own is taken: above those that the kernel gives to clients.
const firstPort = 61000

// choosePorts settles which port of the job's localhost leads to which of the
// service. The box is empty, so only its other services can be in the way.
func (s *service) choosePorts(used map[uint16]bool) error {
	for i, p := range s.Ports {
		host := cmp.Or(p.Host, p.Container)
		if used[host] && p.Host != 0 {
			return fmt.Errorf("service %s: port %d of localhost is another service's", s.Name, host)
		}
		for next := uint16(firstPort); used[host]; next++ {
			host = next
		}
		used[host] = true
		s.Ports[i].Host = host
	}
	return nil
}

// serviceDebts names what the services will hold.
func (l *life) serviceDebts(plan policy.Plan) []journal.Debt {
	var ds []journal.Debt
	for _, s := range l.services {
		ds = append(ds,
			journal.Debt{Kind: kindGateway, Name: serviceGateway(l.log.Job, s.index)},
			journal.Debt{Kind: kindBox, Name: serviceBox(l.log.Job, s.index), By: plan.Runtime})
	}
	return ds
}

// startServices makes the boxes of the services and starts what is in them. It
// waits for none.
func (l *life) startServices(ctx, alive context.Context, plan policy.Plan, deadline time.Time) error {
	for _, s := range l.services { // every image is ready before there is a box
		image, err := l.pull(ctx, plan.Runtime, s.key(), sandbox.Pull{Image: s.Image, User: s.Username, Password: s.Password})
		if err != nil {
			return fmt.Errorf("%s: %w", s.key(), err)
		}
		s.image = image
	}
	for _, s := range l.services {
		if err := l.startService(ctx, alive, plan, deadline, s); err != nil {
			return fmt.Errorf("%s: %w", s.key(), err)
		}
	}
	return nil
}

func (l *life) startService(ctx, alive context.Context, plan policy.Plan, deadline time.Time, s *service) error {
	gateway, name := serviceGateway(l.log.Job, s.index), serviceBox(l.log.Job, s.index)
	_, err := hold(ctx, l, gateway, func(ctx context.Context) (none, grip, error) {
		rules := egress.Rules{Allow: serviceRules(plan, s.host)}
		return none{}, grip{}, l.cfg.Gateway.Open(ctx, gateway, egress.Opening{Rules: rules, Ledger: l.ledger, Expires: deadline.Add(boxGrace)})
	})
	if err != nil {
		return err
	}
	spec := l.spec(plan, s.image, deadline)
	spec.Mounts = nil // those are the job's
	spec.Limits, spec.Expires = lower(spec.Limits, s.Options), deadline.Add(boxGrace)
	box, err := hold(ctx, l, name, func(ctx context.Context) (sandbox.Sandbox, grip, error) {
		box, err := l.cfg.Runtimes[plan.Runtime].Create(ctx, name, spec)
		return box, grip{}, err
	})
	if err != nil {
		return err
	}
	sockets, err := box.Attach(ctx)
	if err == nil {
		err = l.cfg.Gateway.Attach(ctx, gateway, egress.Sockets(sockets))
	}
	if err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	if err := l.attest(ctx, name, gateway, box, sockets, attestBefore); err != nil {
		return err
	}
	if err := l.trust(ctx, box, &s.image, gateway, terminated(serviceRules(plan, s.host))); err != nil {
		return err
	}
	p, err := s.process()
	if err != nil {
		return err
	}
	s.box, s.done = box, make(chan struct{})
	// Steps that run always() after a cancellation may still need it.
	go func() { // ends with stopServices
		defer close(s.done)
		s.exit, s.err = box.Run(alive, p)
	}()
	return nil
}

// process is what a service runs: its own program, or the one that its image is
// for.
func (s *service) process() (sandbox.Process, error) {
	p := sandbox.Process{
		Args: slices.Concat(s.image.Entrypoint, s.image.Cmd), Env: s.environment(), User: s.user(),
		Dir: cmp.Or(s.Options.Dir, s.image.Dir, "/"), Stdout: s.log.write, Stderr: s.log.write,
		Grace: time.Millisecond, // nothing of it is to be saved
	}
	if s.Options.Entrypoint != "" {
		p.Args = []string{s.Options.Entrypoint} // as engines do, without the image's arguments
	}
	if len(p.Args) == 0 {
		return p, fmt.Errorf("the image %s names no program: write options: --entrypoint", s.Image)
	}
	return p, nil
}

func (s *service) environment() []string {
	env := map[string]string{"PATH": basePath}
	if s.user() == "" {
		env["HOME"] = "/root"
	}
	return mergeEnv(env, s.image.Env, s.Env, s.Options.Env)
}

// mergeEnv adds the variables of an image and then those of maps, sorted.
func mergeEnv(env map[string]string, image []string, more ...map[string]string) []string {
	for _, kv := range image {
		if k, v, ok := strings.Cut(kv, "="); ok && k != "" {
			env[k] = v
		}
	}
	for _, m := range more {
		maps.Copy(env, m)
	}
	list := make([]string, 0, len(env))
	for _, k := range slices.Sorted(maps.Keys(env)) {
		list = append(list, k+"="+env[k])
	}
	return list
}

// user is who the service runs as, "" for root, whom not every image names.
func (s *service) user() string {
	u := cmp.Or(s.Options.User, s.image.User)
	if slices.Contains([]string{"root", "0", "0:0", "root:root", "0:root", "root:0"}, u) {
		return ""
	}
	return u
}

// stopServices ends what the services run, and shows what they said. Their boxes
// are released with the job.
func (l *life) stopServices(stop context.CancelFunc) {
	stop()
	for _, s := range l.services {
		if s.done == nil {
			continue
		}
		early := isClosed(s.done) && !errors.Is(s.err, context.Canceled)
		<-s.done
		l.clock.mark("-stop-" + s.host)
		last := max(len(l.job.Steps)-1, 0)
		if err := s.log.show(last, s.key()); err != nil {
			l.out.notice(-1, s.key()+": its output is lost: "+err.Error())
		}
		if early {
			l.out.notice(-1, s.ended().Error())
		}
	}
}

// ended says how a service ended by itself.
func (s *service) ended() error {
	switch {
	case s.err != nil && !errors.Is(s.err, context.Canceled):
		return fmt.Errorf("%s ended: %w", s.key(), s.err)
	case s.exit.OOM:
		return fmt.Errorf("%s was killed: out of memory: raise limits.memory in the policy", s.key())
	}
	return fmt.Errorf("%s ended with exit status %d", s.key(), s.exit.Code)
}

// awaitServices returns when every service can be used, or says which one can
// not.
func (l *life) awaitServices(ctx context.Context) error {
	if len(l.services) == 0 {
		return nil
	}
	ctx, cancel := context.WithCancelCause(ctx)
	var watching sync.WaitGroup
	defer watching.Wait()
	defer cancel(nil)
	for _, s := range l.services {
		if !s.awaited() {
			continue
		}
		watching.Go(func() {
			select {
			case <-s.done:
				cancel(fmt.Errorf("%w before it was ready", s.ended()))
			case <-ctx.Done():
			}
		})
	}
	for _, s := range l.services {
		if err := l.await(ctx, s); err != nil {
			return err
		}
		l.clock.mark("-ready-" + s.host)
	}
	return nil
}

// awaited says whether a service has something to wait for.
func (s *service) awaited() bool { return s.Options.Health.Command != "" || len(s.Ports) > 0 }

const (
	// readyFirst and readyLast bound the pauses between two looks at a service:
	// most are ready within a second, and a look costs a process.
	readyFirst = 50 * time.Millisecond
	readyLast  = time.Second
	// portPatience is how long a port is waited for that no health check vouches
	// for. GitHub waits for none, so the job then goes on.
	portPatience = time.Minute
)

func (l *life) await(ctx context.Context, s *service) error {
	if s.Options.Health.Command != "" {
		return s.healthy(ctx)
	}
	for _, p := range s.Ports {
		err := l.listens(ctx, s, p.Container)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			l.out.notice(0, fmt.Sprintf("%s: nothing listens on port %d after %v, and it has no health check (options: --health-cmd): the job goes on", s.key(), p.Container, portPatience))
		}
	}
	return nil
}

func (l *life) listens(ctx context.Context, s *service, port uint16) error {
	ctx, cancel := context.WithTimeout(ctx, portPatience)
	defer cancel()
	for wait := readyFirst; ; wait = min(2*wait, readyLast) {
		err := l.cfg.Gateway.Probe(ctx, serviceGateway(l.log.Job, s.index), port)
		if err == nil || !pause(ctx, wait) {
			return err
		}
	}
}

// healthy runs the health check until it succeeds. It is tried early and often;
// a failure counts once in an interval, so that a service has as long as an
// engine would give it.
func (s *service) healthy(ctx context.Context) error {
	h := s.Options.Health
	next := time.Now().Add(h.StartPeriod + h.Interval)
	failures := 0
	for wait := readyFirst; ; wait = min(2*wait, readyLast) {
		why, err := s.check(ctx, h)
		if err != nil || why == "" {
			return err
		}
		if !time.Now().Before(next) {
			failures++
			next = time.Now().Add(h.Interval)
		}
		if failures >= h.Retries {
			return fmt.Errorf("%s is not healthy: its health check failed %d times in a row: %s", s.key(), failures, why)
		}
		if !pause(ctx, min(wait, max(h.Interval, readyFirst))) {
			return context.Cause(ctx)
		}
	}
}

// check runs the health check once and says why it failed, "" if it did not.
func (s *service) check(ctx context.Context, h workflow.Health) (why string, err error) {
	timeout := h.Timeout
	if timeout == 0 {
		timeout = time.Minute // an engine's "no timeout" would hold the job for ever
	}
	limited, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("no answer within %v", timeout))
	defer cancel()
	said := newTail(s.log.stream)
	exit, err := s.box.Run(limited, sandbox.Process{
		Args: []string{"/bin/sh", "-c", h.Command}, Env: s.environment(), User: s.user(),
		Dir: cmp.Or(s.Options.Dir, s.image.Dir, "/"), Stdout: said.write, Stderr: said.write,
		Grace: 100 * time.Millisecond, Beside: true,
	})
	switch {
	case ctx.Err() != nil:
		return "", context.Cause(ctx)
	case errors.Is(err, sandbox.ErrDied):
		return "", err
	case err != nil:
		return err.Error(), nil
	case exit.Code != 0:
		return strings.TrimSpace(fmt.Sprintf("exit status %d: %s", exit.Code, said.excerpt())), nil
	}
	return "", nil
}

// serviceOf is the name of the service that a gateway is of, "" for the job.
func (l *life) serviceOf(gateway string) string {
	for _, s := range l.services {
		if gateway == serviceGateway(l.log.Job, s.index) {
			return s.Name
		}
	}
	return ""
}

// reach is how the job gets to its services: by name, at any port, and by the
// ports of its localhost that the workflow maps.
func (l *life) reach(plan policy.Plan) (rules []egress.Rule, ports []egress.Published) {
	id, _, _ := strings.Cut(plan.Rule, " ")
	for _, s := range l.services {
		r := egress.Rule{
			ID: id, Name: s.host, Protocol: egress.TCP, Purpose: "a service of the job",
			Service: serviceGateway(l.log.Job, s.index),
		}
		rules = append(rules, r)
		for _, p := range s.Ports {
			r.Port = p.Container
			ports = append(ports, egress.Published{Port: p.Host, Rule: r})
		}
	}
	return rules, ports
}

// jobContext is the context "job", as GitHub documents it.
func (l *life) jobContext(status providers.Conclusion) map[string]any {
	job := l.log.Job
	c := map[string]any{"status": string(status)}
	if l.own != nil {
		c["container"] = map[string]any{"id": l.box(), "network": gatewayName(job)}
	}
	services := map[string]any{}
	for _, s := range l.services {
		ports := map[string]any{}
		for _, p := range s.Ports {
			ports[strconv.Itoa(int(p.Container))] = strconv.Itoa(int(p.Host))
		}
		services[s.Name] = map[string]any{"id": serviceBox(job, s.index), "network": serviceGateway(job, s.index), "ports": ports}
	}
	if len(services) > 0 {
		c["services"] = services
	}
	return c
}
