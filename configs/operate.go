package configs

import (
	"net/netip"
	"path/filepath"
	"time"

	"github.com/mayfly-ci/mayfly/configs/strict"
)

// Quotas say how many jobs of one repository run at once on this agent. The
// zero value limits nothing.
type Quotas struct {
	Jobs         int           // of a repository that none of Repositories is about; 0 is no limit
	Waiting      int           // claimed jobs of one provider that wait; 0 is the agent's default
	Patience     time.Duration // how long one of them waits; 0 is the agent's default
	Repositories []Quota       // the first that matches decides
}

// A Quota is for the repositories that a pattern of the policy language
// matches, each on its own.
type Quota struct {
	Match string
	Jobs  int // 0 is no limit but the slots
	node  strict.Node
}

// Errorf returns an error at the pattern, for whoever knows the language.
func (q Quota) Errorf(format string, args ...any) error {
	return q.node.At("match").Errorf(format, args...)
}

// Warm says how many boxes are ready before there is a job. The zero value is
// none.
type Warm struct {
	Boxes int           // of each class that the policy has
	Age   time.Duration // after which one that was not used is replaced; 0 is the agent's default
	node  strict.Node
}

// Errorf returns an error at the key boxes, for whoever knows the policy.
func (w Warm) Errorf(format string, args ...any) error {
	return w.node.At("boxes").Errorf(format, args...)
}

// A Monitor is where the agent says how it is. The zero value is nowhere.
type Monitor struct {
	Network string // tcp or unix
	Address string // 127.0.0.1:9464, or the path of a socket
}

// AddrPort is the address of the listener, if it has one that a network reaches.
func (m Monitor) AddrPort() (a netip.AddrPort, ok bool) {
	if m.Network != "tcp" {
		return a, false
	}
	a, err := netip.ParseAddrPort(m.Address)
	return a, err == nil
}

type quotasNode struct {
	Self         strict.Node    `yaml:",self"`
	Jobs         *int           `yaml:"jobs"`
	Waiting      *int           `yaml:"waiting"`
	Patience     *time.Duration `yaml:"patience"`
	Repositories []quotaNode    `yaml:"repositories"`
}

type quotaNode struct {
	Self  strict.Node `yaml:",self"`
	Match string      `yaml:"match,required"`
	Jobs  *int        `yaml:"jobs"`
}

func (n *quotasNode) fill(q *Quotas) error {
	if n == nil {
		return nil
	}
	errs := []error{
		positive(n.Self, "jobs", n.Jobs, &q.Jobs, "to have no limit"),
		positive(n.Self, "waiting", n.Waiting, &q.Waiting, "for the default"),
	}
	if n.Patience != nil {
		if q.Patience = *n.Patience; q.Patience <= 0 {
			errs = append(errs, n.Self.At("patience").Errorf("%s is out of range: write more than 0s, or remove the key for the default", q.Patience))
		}
	}
	for _, r := range n.Repositories {
		one := Quota{Match: r.Match, node: r.Self}
		errs = append(errs, positive(r.Self, "jobs", r.Jobs, &one.Jobs, "to have no limit"))
		q.Repositories = append(q.Repositories, one)
	}
	return strict.Join(errs...)
}

func positive(n strict.Node, key string, from, into *int, without string) error {
	if from == nil {
		return nil
	}
	if *into = *from; *from < 1 {
		return n.At(key).Errorf("%d is out of range: write 1 or more, or remove the key %s", *from, without)
	}
	return nil
}

type warmNode struct {
	Self  strict.Node    `yaml:",self"`
	Boxes *int           `yaml:"boxes,required"`
	Age   *time.Duration `yaml:"age"`
}

func (n *warmNode) fill(w *Warm) error {
	if n == nil {
		return nil
	}
	w.node = n.Self
	errs := []error{positive(n.Self, "boxes", n.Boxes, &w.Boxes, "warm to have none")}
	if n.Age != nil {
		if w.Age = *n.Age; w.Age < time.Minute || w.Age > 24*time.Hour {
			errs = append(errs, n.Self.At("age").Errorf("%s is out of range: 1m to 24h", w.Age))
		}
	}
	return strict.Join(errs...)
}

type monitorNode struct {
	Self   strict.Node `yaml:",self"`
	Listen string      `yaml:"listen,required"`
	Expose bool        `yaml:"expose"`
}

func (n *monitorNode) fill(m *Monitor) error {
	if n == nil || n.Listen == "" {
		return nil
	}
	at := n.Self.At("listen")
	if filepath.IsAbs(n.Listen) {
		*m = Monitor{"unix", n.Listen}
		return nil
	}
	a, err := netip.ParseAddrPort(n.Listen)
	switch {
	case err != nil || a.Port() == 0 || a.Addr().Zone() != "":
		return at.Errorf("%q: want an address and a port, such as 127.0.0.1:9464, or the absolute path of a socket", n.Listen)
	case !a.Addr().Unmap().IsLoopback() && !n.Expose:
		return at.Errorf("%s can be reached from other machines, and nobody is asked for a password: write 127.0.0.1:%d, or expose: true if that is meant", a, a.Port())
	}
	*m = Monitor{"tcp", a.String()}
	return nil
}
