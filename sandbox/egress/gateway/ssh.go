package gateway

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

const (
	// channelsMax bounds the channels of one SSH connection, as sshd's MaxSessions.
	channelsMax = 10
	// sshVersion is what the gateway calls itself, to both sides.
	sshVersion = "SSH-2.0-Mayfly"
)

// serveSSH ends the job's SSH under the host key of its box. Each channel that may
// be is a connection of its own to the destination: the rules that allow two of
// them may log in with two keys.
func (c *session) serveSSH(ctx context.Context) {
	key, err := c.box.logins.hostKey()
	if err != nil {
		c.fail(err)
		return
	}
	config := &ssh.ServerConfig{
		ServerVersion: sshVersion,
		// Who is in the box is the job. A key that it shows all the same is not used.
		NoClientAuth:      true,
		PublicKeyCallback: func(ssh.ConnMetadata, ssh.PublicKey) (*ssh.Permissions, error) { return nil, nil },
	}
	config.AddHostKey(key)
	hurry := time.AfterFunc(c.gateway.cfg.Hello, func() { reset(c.job) })
	conn, channels, requests, err := ssh.NewServerConn(&attentive{Conn: c.job, idle: c.gateway.cfg.Idle}, config)
	if hurry.Stop(); err != nil {
		c.fail(cmp.Or(context.Cause(ctx), refused("no SSH with the job: %s", printable(err.Error()))))
		return
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer conn.Close()
	wg.Go(func() { c.refuseGlobal(requests) })
	free := make(chan struct{}, channelsMax)
	for ch := range channels {
		if kind := ch.ChannelType(); kind != "session" {
			c.say("channel", kind, "an SSH connection carries sessions only: nothing is forwarded")
			_ = ch.Reject(ssh.Prohibited, "refused by the policy of this job") // the connection may be gone
			continue
		}
		select {
		case free <- struct{}{}:
			wg.Go(func() {
				defer func() { <-free }()
				c.serveChannel(ctx, conn.User(), ch)
			})
		default:
			_ = ch.Reject(ssh.ResourceShortage, fmt.Sprintf("%d sessions are open", channelsMax)) // as above
		}
	}
}

// refuseGlobal answers what is asked of the connection as a whole: with no. That
// is also what keeps a connection alive.
func (c *session) refuseGlobal(requests <-chan *ssh.Request) {
	for r := range requests {
		if r.Type == "tcpip-forward" || strings.HasPrefix(r.Type, "streamlocal-forward") {
			c.say("request", r.Type, "an SSH connection carries sessions only: nothing is forwarded")
		}
		if r.WantReply {
			_ = r.Reply(false, nil) // the connection may be gone
		}
	}
}

// say writes the line of something that no rule could allow.
func (c *session) say(method, what, reason string) {
	l := c.line
	l.Time, l.Verdict, l.Reason = time.Now(), egress.Refused, reason
	l.Request = egress.Exchange{Method: method, Path: printable(what)}
	_ = c.book().line(l) // it is refused anyway
}

// attentive is the job's connection, which ends if nothing comes for too long:
// who takes bytes says so.
type attentive struct {
	net.Conn
	idle time.Duration
	set  time.Time
}

// Read implements net.Conn. One goroutine reads.
func (a *attentive) Read(b []byte) (int, error) {
	if now := time.Now(); now.Sub(a.set) > a.idle/10 {
		_ = a.SetReadDeadline(now.Add(a.idle)) // fails on a closed connection, as the read then does
		a.set = now
	}
	return a.Conn.Read(b)
}

// dialSSH logs in at the destination of a rule, over a connection to it.
func (c *session) dialSSH(ctx context.Context, conn net.Conn, g grant) (*ssh.Client, error) {
	key, err := clientKey(g.inject.Value)
	if err != nil {
		return nil, err
	}
	pinned, err := hostKeys(g.Session.HostKeys)
	if err != nil {
		return nil, err
	}
	ctx, cancel := c.gateway.soon(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { reset(conn) })
	defer stop()
	stranger := errors.New("its host key is none of those that the rule has")
	up, channels, requests, err := ssh.NewClientConn(conn, c.line.Name, &ssh.ClientConfig{
		User: g.inject.User, Auth: []ssh.AuthMethod{ssh.PublicKeys(key)}, ClientVersion: sshVersion,
		HostKeyAlgorithms: algorithms(pinned),
		HostKeyCallback: func(_ string, _ net.Addr, shown ssh.PublicKey) error {
			if !slices.ContainsFunc(pinned, func(p ssh.PublicKey) bool { return bytes.Equal(p.Marshal(), shown.Marshal()) }) {
				return stranger
			}
			return nil
		},
	})
	switch {
	case err == nil:
		return ssh.NewClient(up, channels, requests), nil
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	case errors.Is(err, stranger):
		err = stranger
	}
	return nil, fmt.Errorf("SSH with %s: %w", c.line.Name, err)
}

// algorithms are those that keys sign with.
func algorithms(keys []ssh.PublicKey) []string {
	var all []string
	for _, k := range keys {
		if k.Type() == ssh.KeyAlgoRSA {
			all = append(all, ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256)
		} else {
			all = append(all, k.Type())
		}
	}
	return all
}
