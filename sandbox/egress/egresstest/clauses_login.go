package egresstest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

func loginClauses() []clause {
	return []clause{
		{"ssh: a command runs with the lease's key, with two lines", sshRuns},
		{"ssh: what no rule allows does not arrive", sshNarrow},
		{"ssh: the destination has a host key of its rule", sshPinned},
		{"ssh: two rules of one host have their own keys", sshKeys},
		{"ssh: a child's commands end with it", sshWithdrawn},
		{"the host key of a box is its own", hostKeys},
		{"postgres: a session begins with the placeholder, with two lines", pgSession},
		{"postgres: user, database and password are the lease's", pgNarrow},
		{"postgres: the destination owns its name", pgOwnsName},
		{"postgres: a session is cancelled by its own box", pgCancel},
		{"https: a credential is given away as often as it has uses", usesHTTPS},
		{"a login is made as often as its lease has uses", usesLogin},
		{"a login without a lease, or a host key, is refused", badLogins},
	}
}

func (b *bench) git(commands ...string) (egress.Rule, error) {
	b.outside.name("git.example", public)
	s, err := b.newSSH(public + ":22")
	if err != nil {
		return egress.Rule{}, err
	}
	return s.rule("git.example", commands...), nil
}

func sshRuns(b *bench) error {
	r, err := b.git("upload '/acme/*.git'")
	if err != nil {
		return err
	}
	j, err := b.start("job-1", r)
	if err != nil {
		return err
	}
	c, err := j.ssh("git.example", "git")
	if err != nil {
		return err
	}
	want := ran{"ran upload '/acme/app.git' with " + strings.Repeat("x", 1<<20), "warned", 3}
	for range 2 { // on one connection
		if got, err := run(c, "upload '/acme/app.git'", strings.Repeat("x", 1<<20)); err != nil || got != want {
			return fmt.Errorf("command: got %.60q %q %d %v, want %.60q %q %d", got.out, got.err, got.status, err, want.out, want.err, want.status)
		}
	}
	end, err := j.ledger.await("ended", is(egress.Ended))
	if err != nil {
		return err
	}
	what := egress.Exchange{Method: "exec", Path: "upload '/acme/*.git'", Status: 3, Lease: "deploy"}
	if end.Request != what || end.Name != "git.example" || end.Rule != r.ID || end.Sent != 1<<20 || end.Received != int64(len(want.out)+len(want.err)) || end.Reason != "" {
		return fmt.Errorf("last line: got %+v, want %+v, the rule and the bytes", end, what)
	}
	start, err := j.ledger.await("allowed", is(egress.Allowed))
	if what.Status = 0; err == nil && (start.Request != what || start.Dialled == "") {
		err = fmt.Errorf("line: got %+v, want %+v and what was dialled", start, what)
	}
	return err
}

func sshNarrow(b *bench) error {
	r, err := b.git("upload '/acme/*.git'")
	if err != nil {
		return err
	}
	j, err := b.start("job-1", r)
	if err != nil {
		return err
	}
	c, err := j.ssh("git.example", "git")
	if err != nil {
		return err
	}
	for _, command := range []string{
		"id", "upload '/other/app.git'", "upload '/acme/app.git'; id", "upload '/acme/app.git' --exec=id", "upload '/acme/../x.git'",
		"upload '/acme/a/b.git'", "upload '/acme/$(id).git'", "upload  '/acme/app.git'", "upload '/acme/.git'", "",
	} {
		got, err := run(c, command, "")
		if err != nil || strings.Contains(got.out, "ran") || got.status == 3 {
			return fmt.Errorf("command %q: got %+v %v", command, got, err)
		}
	}
	for _, kind := range []string{"direct-tcpip", "direct-streamlocal@openssh.com", "auth-agent@openssh.com", "x11"} {
		if ch, _, err := c.OpenChannel(kind, make([]byte, 64)); err == nil {
			ch.Close()
			return fmt.Errorf("a channel %s was opened", kind)
		}
	}
	if ok, _, err := c.SendRequest("tcpip-forward", true, make([]byte, 8)); ok || err != nil {
		return fmt.Errorf("tcpip-forward: got %v %v", ok, err)
	}
	s, err := c.NewSession()
	if err != nil {
		return err
	}
	for _, request := range []string{"env", "pty-req", "x11-req", "auth-agent-req@openssh.com", "nonsense"} {
		if ok, err := s.SendRequest(request, true, make([]byte, 64)); ok || err != nil {
			return fmt.Errorf("%s: got %v %v", request, ok, err)
		}
	}
	if err := s.RequestSubsystem("sftp"); err == nil {
		if err := s.Wait(); err == nil {
			return errors.New("sftp: got a session")
		}
	}
	other, err := j.ssh("git.example", "root")
	if err != nil {
		return err
	}
	if got, err := run(other, "upload '/acme/app.git'", ""); err != nil || strings.Contains(got.out, "ran") {
		return fmt.Errorf("another user: got %+v %v", got, err)
	}
	if err := j.close("job-1"); err != nil { // the lines are written when it returns
		return err
	}
	if n := j.ledger.count(is(egress.Allowed)); n != 0 {
		return fmt.Errorf("got %d lines of what was allowed", n)
	}
	if n := j.ledger.count(is(egress.Refused)); n != 10+4+1+3+1+1 {
		return fmt.Errorf("got %d lines of what was refused, want 20", n)
	}
	return nil
}

func sshPinned(b *bench) error {
	first, err := b.newSSH(public + ":22")
	if err != nil {
		return err
	}
	second, err := b.newSSH("93.184.216.35:22")
	if err != nil {
		return err
	}
	b.outside.name("git.example", public)
	b.outside.name("other.example", "93.184.216.35")
	b.outside.name("stranger.example", "93.184.216.35")
	stranger := second.rule("stranger.example", "a")
	stranger.Session.HostKeys = []string{first.hostKey}
	j, err := b.start("job-1", first.rule("git.example", "a"), second.rule("other.example", "a"), stranger)
	if err != nil {
		return err
	}
	for name, want := range map[string]int{"git.example": 3, "other.example": 3, "stranger.example": 255} {
		c, err := j.ssh(name, "git")
		if err != nil {
			return err
		}
		if got, err := run(c, "a", ""); err != nil || got.status != want {
			return fmt.Errorf("%s: got %+v %v, want status %d", name, got, err, want)
		}
	}
	_, err = j.ledger.await("failed", func(l egress.Line) bool {
		return l.Name == "stranger.example" && l.Verdict == egress.Failed && strings.Contains(l.Reason, "host key")
	})
	return err
}

func sshKeys(b *bench) error {
	s, err := b.newSSH(public + ":22")
	if err != nil {
		return err
	}
	wrong, err := b.newSSH("93.184.216.35:22")
	if err != nil {
		return err
	}
	b.outside.name("git.example", public)
	read, write := s.rule("git.example", "read"), wrong.rule("git.example", "write")
	write.Session.HostKeys = read.Session.HostKeys
	j, err := b.start("job-1", read, write)
	if err != nil {
		return err
	}
	c, err := j.ssh("git.example", "git")
	if err != nil {
		return err
	}
	for command, want := range map[string]int{"read": 3, "write": 255} {
		if got, err := run(c, command, ""); err != nil || got.status != want {
			return fmt.Errorf("%s: got %+v %v, want status %d", command, got, err, want)
		}
	}
	return nil
}

func sshWithdrawn(b *bench) error {
	r, err := b.git("always")
	if err != nil {
		return err
	}
	child := r
	session := *r.Session
	session.Commands = []string{"step"}
	child.Session = &session
	j, err := b.start("job-1", r)
	if err != nil {
		return err
	}
	if err := j.open("job-1-step-1", "job-1", child); err != nil {
		return err
	}
	c, err := j.ssh("git.example", "git")
	if err != nil {
		return err
	}
	s, err := c.NewSession()
	if err != nil {
		return err
	}
	if _, err := s.StdinPipe(); err != nil { // which stays open
		return err
	}
	if err := s.Start("step"); err != nil {
		return err
	}
	if _, err := j.ledger.await("allowed", is(egress.Allowed)); err != nil {
		return err
	}
	if err := j.close("job-1-step-1"); err != nil {
		return err
	}
	if _, err := j.ledger.await("ended", func(l egress.Line) bool { return l.Verdict == egress.Ended && l.Reason != "" }); err != nil {
		return err
	}
	if c, err = j.ssh("git.example", "git"); err != nil {
		return err
	}
	for command, want := range map[string]int{"always": 3, "step": 255} {
		if got, err := run(c, command, ""); err != nil || got.status != want {
			return fmt.Errorf("%s: got %+v %v, want status %d", command, got, err, want)
		}
	}
	return nil
}

func hostKeys(b *bench) error {
	r, err := b.git("a")
	if err != nil {
		return err
	}
	h, ok := b.gateway.(egress.Host)
	if !ok {
		return errors.New("the gateway is no egress.Host")
	}
	var last []byte
	for _, name := range []string{"job-1", "job-2"} {
		j, err := b.start(name, r)
		if err != nil {
			return err
		}
		key, err := h.HostKey(name)
		if err != nil {
			return fmt.Errorf("HostKey(%s): %w", name, err)
		}
		if bytes.Equal(key, last) {
			return fmt.Errorf("HostKey(%s): got %s, as another box", name, key)
		}
		last = key
		c, err := j.ssh("git.example", "git")
		if err != nil {
			return err
		}
		if got, err := run(c, "a", ""); err != nil || got.status != 3 {
			return fmt.Errorf("%s: got %+v %v", name, got, err)
		}
	}
	if _, err := h.HostKey("never-open"); err == nil {
		return errors.New("HostKey of a gateway that is not open: got one")
	}
	return nil
}

func (b *bench) database() (egress.Rule, *pgServer, *notary, error) {
	n, err := newNotary()
	if err != nil {
		return egress.Rule{}, nil, nil, err
	}
	b.outside.name("db.example", public)
	s, err := b.newPostgres(n, public+":5432", "db.example")
	return pgRule("db.example", n), s, n, err
}

// ask asks one question of a session.
func (b *bench) query(c *pgconn.PgConn, question string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), b.patience)
	defer cancel()
	all, err := c.Exec(ctx, question).ReadAll()
	if err != nil || len(all) != 1 {
		return "", fmt.Errorf("query: got %d answers and %w", len(all), err)
	}
	return all[0].CommandTag.String(), nil
}

func pgSession(b *bench) error {
	r, _, _, err := b.database()
	if err != nil {
		return err
	}
	j, err := b.start("job-1", r)
	if err != nil {
		return err
	}
	for _, secure := range []bool{false, true} {
		c, err := j.postgres("db.example", pgUser, pgDatabase, pgPlaceholder, secure)
		if err != nil {
			return err
		}
		if c.ParameterStatus("server_version") != "15.0" || c.PID() != 4711 {
			return fmt.Errorf("got version %q and process %d", c.ParameterStatus("server_version"), c.PID())
		}
		if got, err := b.query(c, "hello"); err != nil || got != "app suite hello" {
			return fmt.Errorf("TLS %v: got %q %v", secure, got, err)
		}
		if err := c.Close(context.Background()); err != nil {
			return err
		}
	}
	end, err := j.ledger.await("ended", is(egress.Ended))
	if err != nil {
		return err
	}
	if what := (egress.Exchange{Method: "login", Path: pgDatabase, Lease: "db"}); end.Request != what || end.Rule != r.ID || end.Sent == 0 || end.Received == 0 {
		return fmt.Errorf("last line: got %+v, want %+v, the rule and the bytes", end, what)
	}
	_, err = j.ledger.await("allowed", is(egress.Allowed))
	return err
}

func pgNarrow(b *bench) error {
	r, _, _, err := b.database()
	if err != nil {
		return err
	}
	j, err := b.start("job-1", r)
	if err != nil {
		return err
	}
	for _, c := range [][3]string{
		{"postgres", pgDatabase, pgPlaceholder},
		{pgUser, "postgres", pgPlaceholder},
		{pgUser, pgDatabase, pgPassword},
		{pgUser, pgDatabase, ""},
		{pgUser, "", pgPlaceholder},
		{pgUser, pgDatabase, pgPlaceholder + "x"},
		{pgUser, pgDatabase, pgPlaceholder[1:]},
	} {
		_, err := j.postgres("db.example", c[0], c[1], c[2], true)
		var refusal *pgconn.PgError
		if !errors.As(err, &refusal) || refusal.Code != "28000" {
			return fmt.Errorf("%v: got %v, want it refused", c, err)
		}
	}
	if err := j.close("job-1"); err != nil { // the lines are written when it returns
		return err
	}
	if n := j.ledger.count(is(egress.Refused)); n != 7 {
		return fmt.Errorf("got %d lines of what was refused, want 7", n)
	}
	if dialled, _ := b.outside.seen(); len(dialled) > 0 {
		return fmt.Errorf("%v was dialled", dialled)
	}
	return nil
}

func pgOwnsName(b *bench) error {
	r, _, n, err := b.database()
	if err != nil {
		return err
	}
	stranger, err := newNotary()
	if err != nil {
		return err
	}
	b.outside.name("other.example", "93.184.216.35")
	b.outside.name("unknown.example", "93.184.216.36")
	_, err = b.newPostgres(n, "93.184.216.35:5432", "db.example")
	if _, err2 := b.newPostgres(stranger, "93.184.216.36:5432", "unknown.example"); err != nil || err2 != nil {
		return errors.Join(err, err2)
	}
	known := pgRule("known.example", stranger)
	j, err := b.start("job-1", r, pgRule("other.example", n), pgRule("unknown.example", n), known)
	if err != nil {
		return err
	}
	for _, name := range []string{"other.example", "unknown.example"} {
		if _, err := j.postgres(name, pgUser, pgDatabase, pgPlaceholder, true); err == nil {
			return fmt.Errorf("%s, whose certificate is not its own: got a session", name)
		}
		_, err = j.ledger.await("failed", func(l egress.Line) bool { return l.Name == name && l.Verdict == egress.Failed && l.Reason != "" })
		if err != nil {
			return err
		}
	}
	return nil
}

func pgCancel(b *bench) error {
	r, s, _, err := b.database()
	if err != nil {
		return err
	}
	j, err := b.start("job-1", r)
	if err != nil {
		return err
	}
	c, err := j.postgres("db.example", pgUser, pgDatabase, pgPlaceholder, true)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), b.patience)
	defer cancel()
	if err := c.CancelRequest(ctx); err != nil {
		return fmt.Errorf("cancel: %w", err)
	}
	select {
	case <-s.cancels:
	case <-time.After(b.patience):
		return errors.New("the server heard of no cancel")
	}
	other, err := b.start("job-2", r)
	if err != nil {
		return err
	}
	conn, err := other.connect("db.example", 5432)
	if err != nil {
		return err
	}
	// As the other box would, that was told the number and the secret.
	if _, err := conn.Write([]byte{0, 0, 0, 16, 4, 210, 22, 46, 0, 0, 18, 103, 1, 2, 3, 4}); err != nil {
		return err
	}
	if err := isReset(conn, nil); err != nil {
		return err
	}
	select {
	case <-s.cancels:
		return errors.New("a session was cancelled by another box")
	default:
	}
	_, err = other.ledger.await("refused", func(l egress.Line) bool { return l.Verdict == egress.Refused && l.Request.Method == "cancel" })
	return err
}
