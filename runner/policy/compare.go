package policy

import (
	"fmt"
	"slices"
	"strings"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// compare holds the plan against what the case wants of it.
func (n caseNode) compare(v *Verdict, plan Plan) {
	ways := ways(plan)
	leaseOK, wayOK := map[int]bool{}, map[int]bool{}
	for _, w := range n.Grants.Leases {
		n.wantLease(v, w, plan.Leases, leaseOK)
	}
	for _, w := range n.Grants.Egress {
		n.wantWay(v, w, ways, wayOK)
	}
	for _, w := range n.Not.Leases {
		for i, l := range plan.Leases {
			if l.Name == string(w.Name) && heldIn(l.Step, string(w.Step)) {
				v.differ("+ %s, which may not be (line %d)", leaseText(l), w.Self.Pos().Line)
				leaseOK[i] = true // once is enough
			}
		}
	}
	for _, w := range n.Not.Egress {
		for i, e := range ways {
			if w.touched(e) && heldIn(e.Step, string(w.Step)) {
				v.differ("+ %s, which may not be (line %d)", wayText(e), w.Self.Pos().Line)
				wayOK[i] = true
			}
		}
		if plan.Mode != "" {
			v.differ("+ mode: %s opens every name, %s:%d as well (line %d)", plan.Mode, w.Name, w.Port, w.Self.Pos().Line)
		}
	}
	if n.Only {
		n.onlyThese(v, plan, ways, leaseOK, wayOK)
	}
}

// onlyThese finds what is granted and not listed.
func (n caseNode) onlyThese(v *Verdict, plan Plan, ways []Egress, leaseOK, wayOK map[int]bool) {
	for i, l := range plan.Leases {
		if !leaseOK[i] {
			v.differ("+ %s", leaseText(l))
		}
	}
	for i, e := range ways {
		if !wayOK[i] {
			v.differ("+ %s", wayText(e))
		}
	}
	if plan.Mode != "" {
		v.differ("+ mode: %s, which opens every name", plan.Mode)
	}
}

// ways are all ways out of a plan: those on which the gateway has a credential
// lead out as well.
func ways(plan Plan) []Egress {
	all := slices.Clone(plan.Egress)
	for _, l := range plan.Leases {
		for _, b := range l.Broker {
			all = append(all, Egress{Step: l.Step, Rule: b.Rule})
		}
	}
	return all
}

// wantLease looks for a lease that is granted just so.
func (n caseNode) wantLease(v *Verdict, w wantLease, all []Lease, ok map[int]bool) {
	want := leaseText(Lease{Name: string(w.Name), Step: string(w.Step)})
	i := slices.IndexFunc(all, func(l Lease) bool { return l.Name == string(w.Name) })
	switch {
	case i < 0:
		v.differ("- %s", want)
	case all[i].Step != string(w.Step):
		v.differ("- %s", want)
		v.differ("+ %s", leaseText(all[i]))
	case n.lacks(w.Step):
		v.differ("- %s: the job has no such step, so that nobody gets it", want)
	default:
		w.compare(v, want, all[i], n.Job.job())
	}
	if i >= 0 {
		ok[i] = true
	}
}

// compare holds what the case says of a lease beyond its step. What the service does
// not release is not had, whatever is granted.
func (w wantLease) compare(v *Verdict, want string, l Lease, j providers.Job) {
	if err := l.Requires.Released(j); err != nil {
		v.differ("- %s: %v", want, err)
	}
	if w.Uses > 0 && int(w.Uses) != l.Uses {
		v.differ("- %s for %d uses", want, w.Uses)
		v.differ("+ %s for %d uses (0 is any number)", want, l.Uses)
	}
	if kinds := l.Requires.Kinds(); w.Requires != nil && !slices.Equal(slices.Sorted(slices.Values(texts(*w.Requires))), slices.Sorted(slices.Values(kinds))) {
		v.differ("- %s, which requires %q", want, texts(*w.Requires))
		v.differ("+ %s, which requires %q", want, kinds)
	}
}

// wantWay looks for a way out that is granted just so: for that name or by a
// wildcard that covers it, for that step and service, by that protocol.
func (n caseNode) wantWay(v *Verdict, w wantWay, all []Egress, ok map[int]bool) {
	want := wayText(Egress{Step: string(w.Step), Service: string(w.Service), Rule: egress.Rule{Name: string(w.Name), Port: uint16(w.Port), Protocol: egress.Protocol(w.Protocol)}})
	found := false
	var near []int
	for i, e := range all {
		if !w.reached(e) {
			continue
		}
		if e.Step == string(w.Step) && (w.Protocol == "" || e.Rule.Protocol == egress.Protocol(w.Protocol)) {
			found, ok[i] = true, true
			continue
		}
		near = append(near, i)
	}
	if found && n.lacks(w.Step) {
		v.differ("- %s: the job has no such step, so that nobody gets it", want)
	}
	if found {
		return
	}
	v.differ("- %s", want)
	for _, i := range near {
		v.differ("+ %s", wayText(all[i]))
		ok[i] = true
	}
}

// lacks says that the job of the case names its steps, and not this one.
func (n caseNode) lacks(step stepID) bool {
	return step != "" && n.Job.Steps != nil && !slices.Contains(*n.Job.Steps, step)
}

// heldIn says whether what is granted for a step, or for the whole job, is had in
// another; "" asks for any.
func heldIn(granted, asked string) bool {
	return asked == "" || granted == "" || granted == asked
}

// reached says whether the rule opens what is named, whoever it is for but for
// services: those have ways of their own.
func (w wantWay) reached(e Egress) bool {
	return narrowWayNode{Name: w.Name, Port: w.Port, Step: stepID(e.Step), Service: w.Service}.within(e)
}

// touched says whether the rule opens any of what is named, for a service as well
// unless another one is named.
func (w wantWay) touched(e Egress) bool {
	w.Service = serviceID(orDefault(string(w.Service), e.Service))
	below := narrowWayNode{Name: host(e.Rule.Name), Port: port(e.Rule.Port), Service: serviceID(e.Service)}
	named := Egress{Service: string(w.Service), Rule: egress.Rule{Name: string(w.Name), Port: uint16(w.Port)}}
	return w.reached(e) || below.within(named)
}

func leaseText(l Lease) string { return "lease " + l.Name + whose(l.Step, "") }

func wayText(e Egress) string {
	text := fmt.Sprintf("egress %s:%d %s", e.Rule.Name, e.Rule.Port, e.Rule.Protocol)
	return strings.TrimSpace(text) + whose(e.Step, e.Service)
}

// whose is for whom something is.
func whose(step, service string) string {
	switch {
	case step == PullStep:
		return ", only to pull the image"
	case step != "":
		return ", only in step " + step
	case service != "":
		return ", for service " + service
	}
	return ""
}
