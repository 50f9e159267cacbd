package gateway

import (
	"context"
	"fmt"
	"mime"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// A narrow is one of a rule's Requests and what passed so far.
type narrow struct {
	egress.Request
	mu     sync.Mutex
	passed int
	due    time.Time // when the rate is used up to the minute, minus one minute
}

func narrows(all []egress.Request) []*narrow {
	var ns []*narrow
	for _, r := range all {
		ns = append(ns, &narrow{Request: r})
	}
	return ns
}

// judge says why a request may not pass, or nothing. far is how far it came,
// so that of several requests of a rule the closest can say why not.
func (n *narrow) judge(r *http.Request) (why string, far int) {
	what := r.Method + " " + shape(r.URL.EscapedPath())
	if !matches(n.Path, r.URL.EscapedPath()) {
		return "the rule allows no request for " + what, 0
	}
	if !slices.Contains(n.Methods, r.Method) {
		return fmt.Sprintf("the rule allows %s and not %s", strings.Join(n.Methods, ", "), what), 1
	}
	if upgrades(r) && !n.WebSocket {
		return "the rule does not allow " + what + " to become a WebSocket; add websocket: true", 2
	}
	if n.Query != nil {
		keys, ok := queryKeys(r.URL.RawQuery)
		if !ok {
			return "the query can be read in two ways", 3
		}
		for _, k := range keys {
			if !slices.Contains(n.Query, k) {
				return fmt.Sprintf("the rule does not allow the query key %q", printable(shapeOf(k))), 3
			}
		}
	}
	if why := n.judgeBody(r); why != "" {
		return why, 4
	}
	return "", 5
}

// shapeOf is what may be said of a word that the job chose.
func shapeOf(word string) string {
	if plain(word) {
		return word
	}
	return "*"
}

func (n *narrow) judgeBody(r *http.Request) string {
	if n.Sent > 0 && r.ContentLength > n.Sent {
		return fmt.Sprintf("the body has %d bytes, the rule allows %d", r.ContentLength, n.Sent)
	}
	if n.ContentTypes == nil || r.ContentLength == 0 {
		return ""
	}
	given := r.Header["Content-Type"]
	if len(given) != 1 {
		return "the body has no content type, or several; the rule allows " + strings.Join(n.ContentTypes, ", ")
	}
	media, _, err := mime.ParseMediaType(given[0])
	main, _, _ := strings.Cut(media, "/")
	if err != nil || !slices.Contains(n.ContentTypes, media) && !slices.Contains(n.ContentTypes, main+"/*") {
		return fmt.Sprintf("the rule does not allow the content type %q", printable(media))
	}
	return ""
}

// pass counts a request in, and waits until the rate has room for it.
func (n *narrow) pass(ctx context.Context) error {
	wait, err := n.reserve(time.Now())
	if err != nil || wait <= 0 {
		return err
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// reserve takes a place and says how far it is: the generic cell rate algorithm
// with a burst of one minute's worth.
func (n *narrow) reserve(now time.Time) (time.Duration, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.Count > 0 && n.passed >= n.Count {
		return 0, denied("the rule allows %d such requests, and they have been made", n.Count)
	}
	n.passed++
	if n.Rate == 0 {
		return 0, nil
	}
	each := time.Minute / time.Duration(n.Rate)
	if n.due.Before(now) {
		n.due = now
	}
	n.due = n.due.Add(each)
	return n.due.Sub(now) - time.Minute, nil
}

// allow finds the rule that lets a request of the connection pass: those of the
// newest scope first, so that what a step was given counts before what the job
// has.
//
// Rules with a credential count before all others, and what one of them says of
// another's credential is final: a weaker rule beside it does not let it through.
func (c *session) allow(r *http.Request) (*permit, error) {
	if c.grant.answers != nil {
		return &permit{grant: c.grant}, nil
	}
	best, far := "the rule was withdrawn", -1
	var held *permit // the credential in it is another one
	for _, g := range c.box.offers(c.line.Name, c.line.Port) {
		if !sameService(g.Rule, c.grant.Rule) {
			continue
		}
		if g.inject == nil && held != nil {
			break
		}
		n, why, f := g.judge(r)
		if f > far {
			best, far = why, f
		}
		if why != "" {
			continue
		}
		p := &permit{grant: &g, narrow: n}
		if g.inject == nil {
			return p, nil
		}
		p.use = g.inject.use(r)
		if p.use.state != foreign {
			held = p
			break
		}
		if held == nil {
			held = p
		}
	}
	if held == nil {
		if p := c.learnRequest(r); p != nil {
			return p, nil
		}
		return nil, denied("%s", best)
	}
	if why := held.use.judge(r); why != "" {
		return held, denied("%s", why)
	}
	return held, nil
}

// A permit is what lets a request pass.
type permit struct {
	grant  *grant
	narrow *narrow   // nil: the rule says nothing of requests
	use    *injected // nil: the rule has no credential
}

// judge finds what of a rule allows a request, or why nothing does, and how far
// it came.
func (g *grant) judge(r *http.Request) (n *narrow, why string, far int) {
	if len(g.narrows) == 0 {
		if upgrades(r) {
			return nil, "the rule does not allow an upgrade to another protocol; allow the request with websocket: true", 5
		}
		return nil, "", -1
	}
	far = -1
	for _, n := range g.narrows {
		w, f := n.judge(r)
		if w == "" {
			return n, "", -1
		}
		if f > far {
			why, far = w, f
		}
	}
	return nil, why, far
}

// sameService reports that what one rule says of the destination holds for a
// connection that was made under another.
func sameService(a, b egress.Rule) bool {
	return a.Protocol == b.Protocol && slices.Equal(a.Resolve, b.Resolve) && a.CA == b.CA && chain(a) == chain(b)
}

// chain is the certificate that connections under a rule are made with.
func chain(r egress.Rule) string {
	if r.Inject == nil {
		return ""
	}
	return r.Inject.Chain
}

// upgrades reports a request to leave HTTP.
func upgrades(r *http.Request) bool { return len(r.Header["Upgrade"]) > 0 }
