package gateway

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
)

// A loggedIn is a session with a destination that waits for its first query.
type loggedIn struct {
	conn     net.Conn
	secret   string // for a CancelRequest
	greeting []byte // what the destination said of the session, for the job
}

// pgTLS is how the destination of a PostgreSQL rule proves that it owns the name.
func (c *session) pgTLS() *tls.Config {
	config := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: c.line.Name, RootCAs: c.gateway.cfg.Roots}
	if ca := c.grant.CA; ca != "" {
		config.RootCAs = x509.NewCertPool()
		config.RootCAs.AppendCertsFromPEM([]byte(ca)) // Open has looked
	}
	return config
}

// loginPostgres logs in over a connection to the destination.
func (c *session) loginPostgres(ctx context.Context, up net.Conn, wants startup, g grant) (*loggedIn, error) {
	ctx, cancel := c.gateway.soon(ctx)
	defer cancel()
	config, err := pgconn.ParseConfig("host=destination user=job sslmode=disable passfile=/dev/null")
	if err != nil {
		return nil, fmt.Errorf("PostgreSQL with %s: %w; the agent's environment has variables of PostgreSQL: remove them", c.line.Name, err)
	}
	var notices []pgproto3.BackendMessage
	// Nothing of the agent's environment counts.
	config.Host, config.Port = c.line.Name, c.line.Port
	config.User, config.Database, config.Password = wants.user, wants.database, g.inject.Value.Reveal()
	config.TLSConfig, config.RuntimeParams, config.Fallbacks = c.pgTLS(), wants.settings, nil
	config.RequireAuth, config.ChannelBinding = "scram-sha-256", "prefer"
	config.SSLNegotiation, config.SSLCertMode, config.KerberosSrvName, config.KerberosSpn = "", "", "", ""
	config.MinProtocolVersion, config.MaxProtocolVersion = "3.0", "3.0"
	config.ValidateConnect, config.AfterConnect, config.ConnectTimeout = nil, nil, 0
	config.MaxProtocolMessageBodyLen = bufferSize
	config.LookupFunc = func(context.Context, string) ([]string, error) { return []string{"127.0.0.1"}, nil } // it is dialled already
	config.DialFunc = func(context.Context, string, string) (net.Conn, error) { return up, nil }
	config.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) { notices = append(notices, notice(n)) }
	conn, err := pgconn.ConnectConfig(ctx, config)
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("PostgreSQL with %s: %w", c.line.Name, err)
	}
	h, err := conn.Hijack()
	if err != nil {
		return nil, err
	}
	in := &loggedIn{conn: h.Conn, secret: string(binary.BigEndian.AppendUint32(nil, h.PID)) + string(h.SecretKey)}
	in.greeting, err = greeting(h, notices)
	return in, err
}

// greeting is what the destination said, in the order that a server says it.
func greeting(h *pgconn.HijackedConn, notices []pgproto3.BackendMessage) ([]byte, error) {
	var b bytes.Buffer
	err := encode(&b, append([]pgproto3.BackendMessage{&pgproto3.AuthenticationOk{}}, notices...)...)
	for _, name := range slices.Sorted(maps.Keys(h.ParameterStatuses)) {
		err = errors.Join(err, encode(&b, &pgproto3.ParameterStatus{Name: name, Value: h.ParameterStatuses[name]}))
	}
	err = errors.Join(err, encode(&b, &pgproto3.BackendKeyData{ProcessID: h.PID, SecretKey: h.SecretKey}, &pgproto3.ReadyForQuery{TxStatus: h.TxStatus}))
	for h.Frontend.ReadBufferLen() > 0 && err == nil { // a server may say more at once
		m, rerr := h.Frontend.Receive()
		if err = rerr; err == nil {
			err = encode(&b, m)
		}
	}
	h.Frontend.SetMaxBodyLen(0)
	return b.Bytes(), err
}

// notice is what the driver made of a message, as a message.
func notice(n *pgconn.Notice) pgproto3.BackendMessage {
	return &pgproto3.NoticeResponse{Severity: n.Severity, SeverityUnlocalized: n.SeverityUnlocalized, Code: n.Code, Message: n.Message, Detail: n.Detail, Hint: n.Hint}
}

// sendCancel sends a CancelRequest, and waits until the server has read it.
func (c *session) sendCancel(ctx context.Context, up net.Conn, body []byte) error {
	ctx, cancel := c.gateway.soon(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { reset(up) })
	defer stop()
	if _, err := up.Write(packet(codeTLS, nil)); err != nil {
		return err
	}
	answer := make([]byte, 1)
	if _, err := io.ReadFull(up, answer); err != nil {
		return err
	}
	if answer[0] != 'S' {
		return errors.New("the destination has no TLS")
	}
	t := tls.Client(up, c.pgTLS())
	if err := t.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("TLS with %s: %w", c.line.Name, err)
	}
	if _, err := t.Write(packet(codeCancel, body)); err != nil {
		return err
	}
	_, err := t.Read(answer) // the server says nothing, and hangs up
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// packet is one without a type.
func packet(code uint32, body []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(8+len(body)))
	return append(binary.BigEndian.AppendUint32(b, code), body...)
}
