package policy

import (
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/configs/strict"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// NarrowFile is where a repository says, on its default branch, what its jobs can
// do without.
const NarrowFile = ".mayfly/policy.yaml"

// narrowNode is that file. A key that is not there takes nothing away; an empty
// list takes all.
type narrowNode struct {
	Self    strict.Node      `yaml:",self"`
	Version int              `yaml:"version,required"`
	Egress  *[]narrowWayNode `yaml:"egress"`
	Leases  *[]leaseName     `yaml:"leases"`
	Timeout span             `yaml:"timeout"`
	Limits  limitsNode       `yaml:"limits"`
}

// narrowWayNode names ways out that stay, by what they lead to. All else of them
// is as the agent's policy says.
type narrowWayNode struct {
	Self    strict.Node `yaml:",self"`
	Name    host        `yaml:"name,required"`
	Port    port        `yaml:"port,required"`
	Step    stepID      `yaml:"step"`
	Service serviceID   `yaml:"service"`
}

// Narrow is the plan with what a file of the repository takes away, and with the
// file's digest in it. What the file asks for beyond the plan is an error, which
// wraps ErrDenied and names its place, and so is a file that is not understood:
//
//   - egress: each entry must be within an entry of the plan of the same port and
//     service: it has that name, or one that the plan's wildcard covers; it has
//     that step, or any if the plan's is for all. The ways out that it is within
//     stay, for that name and step. Those that no entry is within go.
//   - leases: names of leases of the plan. The others go, with their ways out, but
//     for the one that the image is pulled with.
//   - What the plan lacks because a condition is false (Unmet) can be named, and is not
//     had.
//   - timeout, limits: at most the plan's. A limit that the plan leaves to the
//     runtime cannot be named.
func (p Plan) Narrow(src []byte, file string) (Plan, error) {
	root, err := strict.Parse(src, file)
	var n narrowNode
	if err == nil {
		err = root.Decode(&n)
	}
	if err == nil && n.Version != Version {
		err = root.At("version").Errorf("version %d is not supported: this agent reads version: %d", n.Version, Version)
	}
	if err == nil {
		err = strict.Join(n.narrowEgress(&p), n.narrowLeases(&p), n.narrowTime(&p), n.narrowLimits(&p))
	}
	if err != nil {
		return Plan{}, fmt.Errorf("%w: %s: the repository's file may only narrow: %w", ErrDenied, p.Rule, err)
	}
	if n.Egress != nil {
		p.Mode = "" // what stays is all there is
	}
	p.Narrowed = fmt.Sprintf("sha256:%x", sha256.Sum256(src))
	return p, nil
}

func (n narrowNode) narrowEgress(p *Plan) error {
	if n.Egress == nil {
		return nil
	}
	var kept []Egress
	var errs []error
	used, named := map[int]bool{}, map[string]bool{}
	for _, want := range *n.Egress {
		key := fmt.Sprintf("%s:%d %s %s", want.Name, want.Port, want.Step, want.Service)
		if named[key] {
			errs = append(errs, want.Self.Errorf("%s:%d stands here twice", want.Name, want.Port))
			continue
		}
		named[key] = true
		covering := want.covering(p.Egress)
		for _, i := range covering {
			e := p.Egress[i]
			if used[i] && counts(e.Rule) {
				errs = append(errs, want.Self.Errorf("another entry has this way out already, whose requests are counted (%s): name it once", e.Rule.ID))
			}
			used[i] = true
			e.Rule.Name, e.Step = string(want.Name), orDefault(e.Step, string(want.Step))
			kept = append(kept, e)
		}
		if len(covering) == 0 && !slices.ContainsFunc(p.Unmet, func(u Unmet) bool { return u.way != nil && want.within(*u.way) }) {
			errs = append(errs, want.Self.Errorf("no rule of the agent's policy covers %s:%d here", want.Name, want.Port))
		}
	}
	p.Egress = kept
	return strict.Join(errs...)
}

// covering are the ways out that the entry is within. Of those that have its name
// and of wildcards it is the first alone, as it is for the gateway.
func (n narrowWayNode) covering(all []Egress) (found []int) {
	for _, exact := range []bool{true, false} {
		for i, e := range all {
			if n.within(e) && (e.Rule.Name == string(n.Name)) == exact {
				found = append(found, i)
			}
		}
		if len(found) > 0 {
			break
		}
	}
	return found
}

// within says whether e covers the entry.
func (n narrowWayNode) within(e Egress) bool {
	name := string(n.Name)
	if below, wild := strings.CutPrefix(e.Rule.Name, "*"); wild && name != e.Rule.Name {
		label, ok := strings.CutSuffix(name, below)
		if !ok || label == "" || strings.ContainsAny(label, ".*") {
			return false
		}
	} else if name != e.Rule.Name {
		return false
	}
	return uint16(n.Port) == e.Rule.Port && string(n.Service) == e.Service && (e.Step == "" || e.Step == string(n.Step))
}

// counts says whether two of a rule would allow more than one.
func counts(r egress.Rule) bool {
	return slices.ContainsFunc(r.Requests, func(q egress.Request) bool { return q.Count > 0 || q.Rate > 0 })
}

func (n narrowNode) narrowLeases(p *Plan) error {
	if n.Leases == nil {
		return nil
	}
	var errs []error
	for i, name := range *n.Leases {
		if !slices.ContainsFunc(p.Leases, func(l Lease) bool { return l.Name == string(name) }) &&
			!slices.ContainsFunc(p.Unmet, func(u Unmet) bool { return u.lease == string(name) }) {
			errs = append(errs, n.Self.Get("leases").Items()[i].Errorf("the agent's policy has no lease %s here", name))
		}
	}
	var kept []Lease
	for _, l := range p.Leases {
		if l.Step == PullStep || slices.Contains(*n.Leases, leaseName(l.Name)) {
			kept = append(kept, l)
		}
	}
	p.Leases = kept
	return strict.Join(errs...)
}

func (n narrowNode) narrowTime(p *Plan) error {
	if n.Timeout == 0 {
		return nil
	}
	// The job itself may have asked for less than the rule allows: that is none of
	// the file's.
	p.Timeout = min(p.Timeout, time.Duration(n.Timeout))
	p.Leases = slices.Clone(p.Leases)
	for i := range p.Leases {
		p.Leases[i].TTL = min(p.Leases[i].TTL, p.Timeout)
	}
	return nil
}

func (n narrowNode) narrowLimits(p *Plan) error {
	var errs []error
	for _, l := range []struct {
		key  string
		want int64
		have *int64
	}{
		{"memory", int64(n.Limits.Memory), &p.Limits.Memory},
		{"pids", int64(n.Limits.Pids), &p.Limits.Pids},
		{"cpu", int64(n.Limits.CPU), &p.Limits.MilliCPU},
		{"disk", int64(n.Limits.Disk), &p.Limits.Disk},
		{"inodes", int64(n.Limits.Inodes), &p.Limits.Inodes},
		{"log", int64(n.Limits.Log), &p.LogBytes},
	} {
		switch at := n.Self.Get("limits").At(l.key); {
		case l.want == 0:
		case *l.have == 0:
			errs = append(errs, at.Errorf("the agent's policy names no limit for %s, so that this could be more", l.key))
		case l.want > *l.have:
			errs = append(errs, at.Errorf("the agent's policy allows less: a limit may only be smaller"))
		default:
			*l.have = l.want
		}
	}
	return strict.Join(errs...)
}
