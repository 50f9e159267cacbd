package gateway

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

const (
	// quiet is how long a connection under no rule may say nothing before it is
	// taken for one whose server speaks first.
	quiet = 300 * time.Millisecond
	// opening is how many bytes tell TLS and HTTP from the rest: the longest
	// method and its space.
	opening = 8
)

// unlearned are the last labels of names that mean nobody outside (RFC 6761,
// RFC 7686). What looks at the wall asks for one of them.
func unlearned() []string { return []string{"invalid", "localhost", "onion"} }

// learns says whether the box may use a name that no rule allows.
func (b *box) learns(name string) bool {
	return b.learn != nil && !reserved(name) && !slices.Contains(unlearned(), name[strings.LastIndexByte(name, '.')+1:])
}

// learned is what a box that learns may do with a port of a name without a rule.
// What the connection speaks is seen when it does.
func (b *box) learned(name string, port uint16, p egress.Protocol) *grant {
	return &grant{
		Rule:  egress.Rule{Name: name, Port: port, Protocol: p},
		scope: b.root, learned: true, private: b.learn.Private,
	}
}

// verdict is that of an attempt under a grant.
func (g *grant) verdict() egress.Verdict {
	if g.learned {
		return egress.Learned
	}
	return egress.Allowed
}

// learn serves a connection that no rule allows as what it turns out to be.
func (c *session) learn(ctx context.Context) {
	first, err := c.listen()
	if err != nil {
		c.fail(err)
		return
	}
	switch {
	case len(first) > 1 && first[0] == 22 && first[1] == 3: // a handshake (RFC 8446 section 5.1)
		c.speaks(egress.TLS)
		c.pass(ctx, first)
	case begins(first):
		c.speaks(egress.HTTP)
		c.serveHTTP(ctx, &replayed{Conn: c.job, head: first}, false)
	default:
		c.speaks(egress.TCP)
		c.pass(ctx, first)
	}
}

func (c *session) speaks(p egress.Protocol) { c.grant.Protocol, c.line.Protocol = p, p }

// listen reads what the job says first, nothing if it waits for the server.
func (c *session) listen() ([]byte, error) {
	buf, n := make([]byte, opening), 0
	if err := c.job.SetReadDeadline(time.Now().Add(quiet)); err != nil {
		return nil, err
	}
	for n < len(buf) {
		m, err := c.job.Read(buf[n:])
		n += m
		if errors.Is(err, os.ErrDeadlineExceeded) || err != nil && n > 0 {
			break // the next read tells
		}
		if err != nil {
			if ended := (*net.OpError)(nil); errors.As(err, &ended) {
				return nil, cause(ended.Err)
			}
			break // it sends nothing
		}
	}
	return buf[:n], c.job.SetReadDeadline(time.Time{})
}

// begins reports the first bytes of an HTTP/1 request (RFC 9112 section 3).
func begins(first []byte) bool {
	ok, err := regexp.Match(`^(GET|HEAD|POST|PUT|DELETE|PATCH|OPTIONS) `, first)
	return err == nil && ok
}

// learnRequest lets a request pass that no rule allows, in a box that learns.
func (c *session) learnRequest(r *http.Request) *permit {
	if !c.box.learns(c.line.Name) || upgrades(r) && !strings.EqualFold(r.Header.Get("Upgrade"), "websocket") {
		return nil
	}
	g := c.box.learned(c.line.Name, c.line.Port, c.line.Protocol)
	return &permit{grant: g}
}
