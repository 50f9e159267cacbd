package policy

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"time"

	"github.com/mayfly-ci/mayfly/configs/strict"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// Version is the only version of the policy file that this agent understands.
const Version = 1

// The shape of the file. The types of values.go check what stands alone; the
// check methods here check what depends on a neighbour.
type policyFile struct {
	Version int        `yaml:"version,required"`
	Rules   []ruleNode `yaml:"rules,required"`
}

type ruleNode struct {
	Self    strict.Node  `yaml:",self"`
	Name    ruleName     `yaml:"name,required"`
	Match   match        `yaml:"match,required"`
	Runtime runtime      `yaml:"runtime"`
	Image   image        `yaml:"image"`
	Pull    leaseName    `yaml:"pull"`
	Images  imageList    `yaml:"images"`
	Timeout span         `yaml:"timeout"`
	Limits  limitsNode   `yaml:"limits"`
	Egress  []egressNode `yaml:"egress"`
	Leases  []leaseNode  `yaml:"leases"`
	Keep    keepSpan     `yaml:"keep-on-failure"`
	Wall    isolation    `yaml:"isolation"`
	Options optionsNode  `yaml:",inline"`
}

type optionsNode struct {
	Narrow bool     `yaml:"narrow"`
	Mode   mode     `yaml:"mode"`
	Token  delivery `yaml:"provider-token"`
	When   when     `yaml:"when"`
}

type match struct {
	Provider   oneOf `yaml:"provider"`
	Repository oneOf `yaml:"repository"`
	Ref        oneOf `yaml:"ref"`
	Event      oneOf `yaml:"event"`
	Workflow   oneOf `yaml:"workflow"`
	Trust      tiers `yaml:"trust,required"`
}

type limitsNode struct {
	Memory size  `yaml:"memory"`
	Pids   count `yaml:"pids"`
	CPU    cores `yaml:"cpu"`
	Disk   size  `yaml:"disk"`
	Inodes count `yaml:"inodes"`
	Log    size  `yaml:"log"`
}

type egressNode struct {
	Self     strict.Node    `yaml:",self"`
	Set      setName        `yaml:"set"`
	Name     host           `yaml:"name"`
	Port     port           `yaml:"port"`
	Protocol protocol       `yaml:"protocol"`
	Resolve  *[]prefix      `yaml:"resolve"`
	Requests *[]requestNode `yaml:"requests"`
	CA       certificates   `yaml:"ca"`
	Step     stepID         `yaml:"step"`
	Service  serviceID      `yaml:"service"`
	Purpose  purpose        `yaml:"purpose"`
	When     when           `yaml:"when"`
}

type leaseNode struct {
	Self   strict.Node        `yaml:",self"`
	Name   leaseName          `yaml:"name,required"`
	Issuer issuerName         `yaml:"issuer,required"`
	Step   stepID             `yaml:"step"`
	TTL    span               `yaml:"ttl"`
	Scope  strict.Node        `yaml:"scope"`
	Env    map[variable]field `yaml:"env"`
	Files  map[fileName]field `yaml:"files"`
	Broker []brokerNode       `yaml:"broker"`
	Login  []loginNode        `yaml:"login"`
	Clear  []field            `yaml:"clear"`
	When   when               `yaml:"when"`
	Uses   requestNumber      `yaml:"uses"`
	Tools  []Tool             `yaml:"tools"`

	Requires requiresNode `yaml:"requires"`
}

// decode reads the file and reports everything that is wrong with it.
func decode(src []byte, file string) ([]rule, error) {
	root, err := strict.Parse(src, file)
	if err != nil {
		return nil, err
	}
	var f policyFile
	if err := root.Get("version").Decode(&f.Version); err == nil && f.Version != Version {
		// Another version has other keys: what they say of this one would mislead.
		return nil, root.At("version").Errorf("version %d is not supported: this agent reads version: %d", f.Version, Version)
	}
	errs := []error{root.Decode(&f)}
	if len(f.Rules) == 0 && errs[0] == nil {
		errs = append(errs, root.At("rules").Errorf("no rules: every job would be refused"))
	}
	names := map[ruleName]strict.Pos{}
	var rules []rule
	compiler := &conditions{}
	for _, n := range f.Rules {
		if first, seen := names[n.Name]; seen && n.Name != "" {
			errs = append(errs, n.Self.At("name").Errorf("rule %s is already at %s", n.Name, first))
		}
		names[n.Name] = n.Self.Pos()
		r, err := n.rule(compiler)
		errs = append(errs, err)
		rules = append(rules, r)
	}
	if err := strict.Join(errs...); err != nil {
		return nil, err
	}
	return rules, nil
}

// rule turns one rule of the file into what Decide uses.
func (n ruleNode) rule(compiler *conditions) (rule, error) {
	r := rule{match: n.Match, plan: n.basics()}
	r.plan.Isolation, r.plan.Narrows, r.plan.Mode, r.plan.Token = sandbox.Isolation(n.Wall), n.Options.Narrow, string(n.Options.Mode), Delivery(n.Options.Token)
	var out []placed
	when, err := compiler.compile(n.Self)
	r.when = when
	errs := []error{err}
	for _, e := range n.Egress {
		all, err := e.expand()
		when, werr := compiler.compile(e.Self)
		for i := range all {
			all[i].when = when
		}
		errs = append(errs, err, werr)
		out = append(out, all...)
	}
	for _, p := range out {
		r.plan.Egress = append(r.plan.Egress, p.Egress)
	}
	for _, l := range n.Leases {
		_, all, _ := l.brokers() // what is wrong with them is said below
		out = append(out, all...)
	}
	errs = append(errs, n.checkTTL(), n.checkPull(), n.checkMode(), contradictions(out), overlaps(n.Leases, leaseKeys))
	names := map[leaseName]bool{}
	for _, l := range n.Leases {
		if names[l.Name] {
			errs = append(errs, l.Self.At("name").Errorf("lease %s is named twice in this rule", l.Name))
		}
		names[l.Name] = true
		lease, err := l.lease()
		when, werr := compiler.compile(l.Self)
		errs, lease.when = append(errs, werr), when
		if errs = append(errs, err); l.Name == n.Pull && n.Pull != "" {
			lease.Step = PullStep
		} else {
			errs = append(errs, l.check())
		}
		r.plan.Leases = append(r.plan.Leases, lease)
	}
	return r, strict.Join(errs...)
}

// checkPull holds the lease of a pull to what it is for: the registry gets it,
// and nobody else.
func (n ruleNode) checkPull() error {
	at := n.Self.At("pull")
	if n.Self.Get("pull").IsZero() || n.Pull == "" {
		return nil
	}
	if n.Self.Get("image").IsZero() {
		return at.Errorf("no image to pull: add image, or remove pull")
	}
	for _, l := range n.Leases {
		switch {
		case l.Name != n.Pull:
		case !l.Requires.Self.IsZero():
			return l.Self.At("requires").Errorf("lease %s is what the image is pulled with, before anything could be so: remove requires", l.Name)
		case l.When != "":
			return l.Self.At("when").Errorf("the image could not be pulled without lease %s: write the condition into the rule", l.Name)
		case l.Uses > 0:
			return l.Self.At("uses").Errorf("uses are counted at the gateway, and what lease %s pulls does not pass it: remove uses", l.Name)
		case len(l.Env) > 0 || len(l.Files) > 0 || len(l.Broker)+len(l.Login)+len(l.Tools) > 0 || l.Step != "":
			return l.Self.Errorf("lease %s is what the image is pulled with, and no step may see it: remove step, env, files, broker, login and tools", l.Name)
		default:
			return nil
		}
	}
	return at.Errorf("lease %s is not among the leases of this rule", n.Pull)
}

// checkMode keeps strangers from learning what is open to them.
func (n ruleNode) checkMode() error {
	if n.Options.Mode != "" && n.Match.Trust.match(string(providers.TrustFork)) {
		return n.Self.At("mode").Errorf("mode %s opens every name to the job, and trust fork is anybody's code: take fork out of this rule", n.Options.Mode)
	}
	return nil
}

func (n ruleNode) checkTTL() error {
	var errs []error
	timeout := orDefault(n.Timeout, span(DefaultTimeout))
	if n.Timeout == 0 && !n.Self.Get("timeout").IsZero() {
		timeout = span(maxSpan) // it was refused already
	}
	for _, l := range n.Leases {
		if l.TTL > timeout {
			errs = append(errs, l.Self.At("ttl").Errorf("lease would outlive its job: ttl is at most the rule's timeout"))
		}
	}
	return strict.Join(errs...)
}

func (l leaseNode) check() error {
	if len(l.Env) == 0 && len(l.Files) == 0 && len(l.Broker)+len(l.Login)+len(l.Tools) == 0 {
		return l.Self.Errorf("lease is delivered nowhere: add broker, login, tools, env or files")
	}
	if l.Uses > 0 && (len(l.Broker)+len(l.Login) == 0 || len(l.Clear) > 0) {
		return l.Self.At("uses").Errorf("uses are counted at the gateway, and lease %s is given to the job in clear: deliver it by broker or login, without clear", l.Name)
	}
	return l.checkTools()
}

func at(n strict.Node) string {
	pos := n.Pos()
	return fmt.Sprintf("%s:%d", filepath.Base(pos.File), pos.Line)
}

// lease is the lease of a plan. A TTL that is not given is the job's timeout.
func (l leaseNode) lease() (Lease, error) {
	scope, err := l.Scope.JSON()
	if err == nil && scope != nil && scope[0] != '{' {
		err = l.Scope.Errorf("want a mapping: the scope that issuer %s understands", l.Issuer)
	}
	brokers, _, berr := l.brokers()
	requires, rerr := l.requires()
	return Lease{
		Name: string(l.Name), Issuer: string(l.Issuer), Step: string(l.Step),
		TTL: time.Duration(l.TTL), Scope: scope,
		Env: stringMap(l.Env), Files: stringMap(l.Files), Broker: brokers, Clear: texts(l.Clear), Uses: int(l.Uses), Requires: requires, Tools: l.Tools,
	}, strict.Join(err, berr, rerr)
}

// egress is the rule of the gateway, which copies its ID to every line that
// the rule allows.
func (e egressNode) egress() (Egress, error) {
	r := egress.Rule{
		ID: at(e.Self), Name: string(e.Name), Port: uint16(e.Port),
		Protocol: egress.Protocol(e.Protocol), Purpose: string(e.Purpose), CA: string(e.CA),
	}
	if e.Resolve != nil {
		for _, p := range *e.Resolve {
			r.Resolve = append(r.Resolve, netip.Prefix(p))
		}
	}
	var errs []error
	if e.Requests != nil {
		for _, n := range *e.Requests {
			q, err := n.request()
			errs = append(errs, err)
			r.Requests = append(r.Requests, q)
		}
	}
	return Egress{Step: string(e.Step), Service: string(e.Service), Rule: r}, strict.Join(errs...)
}

// basics is the part of the plan that every rule has.
func (n ruleNode) basics() Plan {
	return Plan{
		Rule:     at(n.Self) + " " + string(n.Name),
		Runtime:  orDefault(string(n.Runtime), defaultRuntime),
		Image:    string(n.Image),
		Pull:     string(n.Pull),
		Images:   texts(n.Images),
		Timeout:  orDefault(time.Duration(n.Timeout), DefaultTimeout),
		Keep:     time.Duration(n.Keep),
		LogBytes: orDefault(int64(n.Limits.Log), DefaultLogBytes),
		Limits: sandbox.Limits{
			Memory: int64(n.Limits.Memory), Pids: int64(n.Limits.Pids), MilliCPU: int64(n.Limits.CPU),
			Disk: int64(n.Limits.Disk), Inodes: int64(n.Limits.Inodes),
		},
	}
}

// A claim is something that only one neighbour of a list may have at a time.
type claim struct {
	what string
	step stepID
	at   strict.Node
}

func leaseKeys(l leaseNode) []claim {
	var cs []claim
	for k, v := range l.Self.Get("env").Pairs() {
		cs = append(cs, claim{"environment variable " + k.Text(), l.Step, v})
	}
	for k, v := range l.Self.Get("files").Pairs() {
		cs = append(cs, claim{"file " + k.Text(), l.Step, v})
	}
	for _, t := range l.Tools {
		for _, name := range t.variables() {
			cs = append(cs, claim{"environment variable " + name, l.Step, l.Self.At("tools")})
		}
	}
	return cs
}

// overlaps refuses two claims to one thing that a step could see both of. A
// claim without a step is seen by all of them.
func overlaps[T any](list []T, keys func(T) []claim) error {
	type holder struct {
		what string
		step stepID
	}
	held, first := map[holder]claim{}, map[string]claim{}
	var errs []error
	for _, item := range list {
		for _, c := range keys(item) {
			other, taken := held[holder{c.what, c.step}]
			if !taken {
				other, taken = held[holder{c.what, ""}]
			}
			if !taken && c.step == "" {
				other, taken = first[c.what]
			}
			if taken {
				errs = append(errs, c.at.Errorf("%s is already given in line %d", c.what, other.at.Pos().Line))
				continue
			}
			held[holder{c.what, c.step}] = c
			if _, seen := first[c.what]; !seen {
				first[c.what] = c
			}
		}
	}
	return strict.Join(errs...)
}

func orDefault[T comparable](v, def T) T {
	var zero T
	if v == zero {
		return def
	}
	return v
}

func stringMap[K, V ~string](m map[K]V) map[string]string {
	if len(m) == 0 {
		return nil
	}
	out := make(map[string]string, len(m))
	for k, v := range m {
		out[string(k)] = string(v)
	}
	return out
}
