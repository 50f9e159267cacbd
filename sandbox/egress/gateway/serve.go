package gateway

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/netns"
)

// reserved says whether a name is the agent's own to answer for.
func reserved(name string) bool {
	return name == egress.Reserved || strings.HasSuffix(name, "."+egress.Reserved)
}

// validateServed refuses what could lead out of the box, or to somebody else.
func validateServed(s egress.Served, parent string) error {
	r := s.Rule
	plain := r.Service == "" && r.Inject == nil && r.Session == nil && len(r.Resolve)+len(r.Requests) == 0
	switch {
	case !reserved(r.Name) || r.Name == egress.Reserved:
		return fmt.Errorf("name %s: what the agent serves is below %s", printable(r.Name), egress.Reserved)
	case r.Protocol != egress.HTTP || !plain || s.Handler == nil:
		return errors.New("what the agent serves is http, has a handler and is not narrowed")
	case s.Local != 0 && (parent == "" || s.Local == netns.Port):
		return fmt.Errorf("local port %d: it is for what is opened when the box runs, and not %d", s.Local, netns.Port)
	}
	return validateRule(r)
}

// serveLocal listens on the loopback of the box for the names that have a port
// there. The listeners are closed with the scope.
func (g *Gateway) serveLocal(s *scope, all []egress.Served) error {
	for _, served := range all {
		if served.Local == 0 {
			continue
		}
		ns, err := s.box.network()
		if err != nil {
			return fmt.Errorf("local port: %w", err)
		}
		at := loopback().String()
		var l net.Listener
		err = within(ns, func() (err error) {
			l, err = net.Listen("tcp4", fmt.Sprintf("%s:%d", at, served.Local))
			return err
		})
		if err != nil {
			return fmt.Errorf("local port %d: %w", served.Local, innermost(err))
		}
		tcp, ok := l.(*net.TCPListener)
		if !ok {
			return errors.Join(errors.New("local port: not TCP"), l.Close())
		}
		r := served.Rule
		r.Name, r.Port = at, served.Local // as its clients write them
		known := &grant{Rule: r, scope: s, answers: served.Handler}
		if !s.box.take(s, tcp) {
			return errors.Join(errWithdrawn, tcp.Close())
		}
		go func() { // counted in by take
			defer s.wg.Done()
			defer s.box.root.wg.Done()
			g.accept(s.box, tcp, known)
		}()
	}
	return nil
}

// take makes a listener one of its scope's. It fails if the scope is closed.
func (b *box) take(s *scope, l *net.TCPListener) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if s.closed {
		return false
	}
	s.own = append(s.own, l)
	s.wg.Add(1)
	b.root.wg.Add(1) // the box ends with the last of its listeners
	return true
}

// answer answers a request as the agent itself, unless the name is withdrawn while
// it does.
func (x *exchange) answer(v *visit, r *http.Request) {
	v.grant.answers.ServeHTTP(v.answer, r)
	switch {
	case v.answer.status != 0:
	case r.Context().Err() != nil:
		x.hangUp(v.answer, r, context.Cause(r.Context()))
	default:
		v.answer.WriteHeader(http.StatusOK)
	}
}
