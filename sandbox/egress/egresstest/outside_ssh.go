package egresstest

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"strings"

	"golang.org/x/crypto/ssh"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// An sshServer is one of the suite. It knows one key, of the user git, and says of
// each command that it ran it.
type sshServer struct {
	hostKey string // as in authorized_keys
	key     string // that logs in, as PEM
	config  *ssh.ServerConfig
}

// newKey makes a key and its PEM.
func newKey() (ssh.Signer, string, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, "", err
	}
	block, err := ssh.MarshalPrivateKey(key, "")
	if err != nil {
		return nil, "", err
	}
	signer, err := ssh.NewSignerFromKey(key)
	return signer, string(pem.EncodeToMemory(block)), err
}

// newSSH makes a server for an address outside.
func (b *bench) newSSH(address string) (*sshServer, error) {
	host, _, err := newKey()
	if err != nil {
		return nil, err
	}
	user, text, err := newKey()
	if err != nil {
		return nil, err
	}
	s := &sshServer{hostKey: strings.TrimSpace(string(ssh.MarshalAuthorizedKey(host.PublicKey()))), key: text}
	s.config = &ssh.ServerConfig{PublicKeyCallback: func(c ssh.ConnMetadata, k ssh.PublicKey) (*ssh.Permissions, error) {
		if c.User() != "git" || !bytes.Equal(k.Marshal(), user.PublicKey().Marshal()) {
			return nil, fmt.Errorf("user %s has another key", c.User())
		}
		return nil, nil
	}}
	s.config.AddHostKey(host)
	return s, b.serve(address, s.serve)
}

// rule is one for the server.
func (s *sshServer) rule(name string, commands ...string) egress.Rule {
	r := rule(name, 22, egress.SSH)
	r.Inject = &egress.Injection{Lease: "deploy", As: egress.SSHKey, User: "git", Value: creds.NewSecret(s.key), Placeholder: "placeholder-of-the-suite"}
	r.Session = &egress.Session{HostKeys: []string{s.hostKey}, Commands: commands}
	return r
}

func (s *sshServer) serve(conn net.Conn) {
	_, channels, requests, err := ssh.NewServerConn(conn, s.config)
	if err != nil {
		return
	}
	go ssh.DiscardRequests(requests) // ends with the connection
	for offer := range channels {
		ch, requests, err := offer.Accept()
		if err != nil {
			return
		}
		for r := range requests {
			s.answer(ch, r)
		}
	}
}

// answer runs any command: it says its name, and what it reads, up to the end; and
// then how it ended.
func (s *sshServer) answer(ch ssh.Channel, r *ssh.Request) {
	if r.WantReply {
		_ = r.Reply(true, nil)
	}
	if r.Type != "exec" && r.Type != "shell" && r.Type != "subsystem" {
		return
	}
	var p struct{ Command string }
	_ = ssh.Unmarshal(r.Payload, &p)
	in, _ := io.ReadAll(ch)
	fmt.Fprintf(ch, "ran %s with %s", p.Command, in)
	fmt.Fprint(ch.Stderr(), "warned")
	_, _ = ch.SendRequest("exit-status", false, ssh.Marshal(struct{ Status uint32 }{3}))
	_ = ch.Close()
}

// ssh is a program of the job's that logs in at a name.
func (j *job) ssh(name, user string) (*ssh.Client, error) {
	h, ok := j.gateway.(egress.Host)
	if !ok {
		return nil, fmt.Errorf("the gateway is no egress.Host")
	}
	line, err := h.HostKey(j.name)
	if err != nil {
		return nil, fmt.Errorf("HostKey(%s): %w", j.name, err)
	}
	key, _, _, _, err := ssh.ParseAuthorizedKey(line)
	if err != nil {
		return nil, fmt.Errorf("HostKey(%s): %q: %w", j.name, line, err)
	}
	conn, err := j.connect(name, 22)
	if err != nil {
		return nil, err
	}
	c, channels, requests, err := ssh.NewClientConn(conn, name, &ssh.ClientConfig{User: user, HostKeyCallback: ssh.FixedHostKey(key)})
	if err != nil {
		return nil, err
	}
	client := ssh.NewClient(c, channels, requests)
	j.tb.Cleanup(func() { client.Close() })
	return client, nil
}

// A ran is what came of a command.
type ran struct {
	out, err string
	status   int // -1: none came
}

// run runs a command that reads input.
func run(c *ssh.Client, command, input string) (ran, error) {
	s, err := c.NewSession()
	if err != nil {
		return ran{}, err
	}
	defer s.Close()
	var out, errs bytes.Buffer
	s.Stdin, s.Stdout, s.Stderr = strings.NewReader(input), &out, &errs
	err = s.Run(command)
	r := ran{out: out.String(), err: errs.String()}
	switch e := err.(type) {
	case nil:
	case *ssh.ExitError:
		r.status = e.ExitStatus()
	default:
		r.status = -1
	}
	return r, nil
}
