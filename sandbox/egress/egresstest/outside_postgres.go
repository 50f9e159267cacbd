package egresstest

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"net"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// What the suite's PostgreSQL knows.
const (
	pgUser, pgDatabase = "mayfly_job", "app"
	pgPassword         = "the-real-password"
	pgPlaceholder      = "placeholder-of-job"
)

// A pgServer is one of the suite: SCRAM over TLS, and a session that says of each
// query that it saw it.
type pgServer struct {
	cert    tls.Certificate
	cancels chan uint32 // what was to be cancelled
}

// newPostgres makes a server for an address, as the owner of names.
func (b *bench) newPostgres(n *notary, address string, names ...string) (*pgServer, error) {
	cert, err := n.certify(names...)
	if err != nil {
		return nil, err
	}
	s := &pgServer{cert: cert, cancels: make(chan uint32, 8)}
	return s, b.serve(address, func(conn net.Conn) { _ = s.serve(conn) })
}

func pgRule(name string, n *notary) egress.Rule {
	r := rule(name, 5432, egress.Postgres)
	r.CA = n.pem
	r.Inject = &egress.Injection{Lease: "db", As: egress.Password, User: pgUser, Name: pgDatabase, Value: creds.NewSecret(pgPassword), Placeholder: pgPlaceholder}
	return r
}

// serve returns why a session ended.
func (s *pgServer) serve(conn net.Conn) error {
	plain := pgproto3.NewBackend(conn, conn)
	if m, err := plain.ReceiveStartupMessage(); err != nil {
		return err
	} else if _, ok := m.(*pgproto3.SSLRequest); !ok {
		return fmt.Errorf("got %T, want TLS", m)
	}
	if _, err := conn.Write([]byte{'S'}); err != nil {
		return err
	}
	t := tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{s.cert}})
	b := pgproto3.NewBackend(t, t)
	m, err := b.ReceiveStartupMessage()
	if err != nil {
		return err
	}
	switch m := m.(type) {
	case *pgproto3.CancelRequest:
		s.cancels <- m.ProcessID
		return t.Close()
	case *pgproto3.StartupMessage:
		if err := scram(b, m.Parameters["user"]); err != nil {
			return err
		}
		return s.session(b, m.Parameters)
	}
	return fmt.Errorf("got %T", m)
}

// scram is the server's side of SCRAM-SHA-256 (RFC 5802, RFC 7677).
func scram(b *pgproto3.Backend, user string) error {
	b.Send(&pgproto3.AuthenticationSASL{AuthMechanisms: []string{"SCRAM-SHA-256"}})
	if err := b.Flush(); err != nil {
		return err
	}
	if err := b.SetAuthType(pgproto3.AuthTypeSASL); err != nil {
		return err
	}
	m, err := b.Receive()
	if err != nil {
		return err
	}
	first, ok := m.(*pgproto3.SASLInitialResponse)
	if !ok {
		return fmt.Errorf("got %T, want a SASL response", m)
	}
	_, bare, _ := strings.Cut(string(first.Data), ",,") // behind what is said of channel binding
	_, nonce, _ := strings.Cut(bare, ",r=")
	salt := "salt"
	challenge := fmt.Sprintf("r=%sserver,s=%s,i=4096", nonce, base64.StdEncoding.EncodeToString([]byte(salt)))
	b.Send(&pgproto3.AuthenticationSASLContinue{Data: []byte(challenge)})
	if err := b.Flush(); err != nil {
		return err
	}
	if err := b.SetAuthType(pgproto3.AuthTypeSASLContinue); err != nil {
		return err
	}
	if m, err = b.Receive(); err != nil {
		return err
	}
	last, ok := m.(*pgproto3.SASLResponse)
	if !ok {
		return fmt.Errorf("got %T, want a SASL response", m)
	}
	bound, proof, _ := strings.Cut(string(last.Data), ",p=")
	salted, err := pbkdf2.Key(sha256.New, pgPassword, []byte(salt), 4096, sha256.Size)
	if err != nil {
		return err
	}
	text := bare + "," + challenge + "," + bound
	client := mac(salted, "Client Key")
	stored := sha256.Sum256(client)
	want := mac(stored[:], text)
	for i := range want {
		want[i] ^= client[i]
	}
	if got, err := base64.StdEncoding.DecodeString(proof); err != nil || !bytes.Equal(got, want) || user != pgUser {
		b.Send(&pgproto3.ErrorResponse{Severity: "FATAL", SeverityUnlocalized: "FATAL", Code: "28P01", Message: "password authentication failed"})
		return b.Flush()
	}
	server := mac(mac(salted, "Server Key"), text)
	b.Send(&pgproto3.AuthenticationSASLFinal{Data: []byte("v=" + base64.StdEncoding.EncodeToString(server))})
	b.Send(&pgproto3.AuthenticationOk{})
	return b.Flush()
}

func mac(key []byte, text string) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(text))
	return h.Sum(nil)
}

// session answers queries with what the server knows of it.
func (s *pgServer) session(b *pgproto3.Backend, parameters map[string]string) error {
	b.Send(&pgproto3.ParameterStatus{Name: "server_version", Value: "15.0"})
	b.Send(&pgproto3.BackendKeyData{ProcessID: 4711, SecretKey: []byte{1, 2, 3, 4}})
	b.Send(&pgproto3.ReadyForQuery{TxStatus: 'I'})
	if err := b.Flush(); err != nil {
		return err
	}
	for {
		m, err := b.Receive()
		if err != nil {
			return err
		}
		q, ok := m.(*pgproto3.Query)
		if !ok {
			return fmt.Errorf("got %T", m)
		}
		b.Send(&pgproto3.CommandComplete{CommandTag: fmt.Appendf(nil, "%s %s %s", parameters["database"], parameters["application_name"], q.String)})
		b.Send(&pgproto3.ReadyForQuery{TxStatus: 'I'})
		if err := b.Flush(); err != nil {
			return err
		}
	}
}

// postgres is a program of the job's that logs in at a name, with TLS or without.
func (j *job) postgres(name, user, database, password string, secure bool) (*pgconn.PgConn, error) {
	c, err := pgconn.ParseConfig("host=" + name + " port=5432 user=" + user + " password=x sslmode=disable passfile=/dev/null")
	if err != nil {
		return nil, err
	}
	c.Password, c.Database, c.Fallbacks = password, database, nil
	c.RuntimeParams = map[string]string{"application_name": "suite"}
	if secure {
		pool, _, err := j.authority()
		if err != nil {
			return nil, err
		}
		c.TLSConfig = &tls.Config{RootCAs: pool, ServerName: name}
	}
	c.LookupFunc = func(context.Context, string) ([]string, error) { return []string{"192.0.2.1"}, nil }
	c.DialFunc = func(context.Context, string, string) (net.Conn, error) { return j.connect(name, 5432) }
	ctx, cancel := context.WithTimeout(context.Background(), j.patience)
	defer cancel()
	conn, err := pgconn.ConnectConfig(ctx, c)
	if err != nil {
		return nil, err
	}
	j.tb.Cleanup(func() { conn.Close(context.Background()) })
	return conn, nil
}
