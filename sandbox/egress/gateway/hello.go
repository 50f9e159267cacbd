package gateway

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"time"
)

const (
	// helloLimit bounds what is read while a ClientHello is awaited. Those
	// with post-quantum shares and a session ticket take 2 to 3 KiB.
	helloLimit = 64 << 10
	// extensionECH is encrypted_client_hello (RFC 9849 section 5).
	extensionECH = 0xfe0d
)

// errPeeked ends the handshake in which crypto/tls only parses the ClientHello.
var errPeeked = errors.New("ClientHello read")

// hello reads the ClientHello and returns the bytes read, which go to the
// destination, if it names the rule's name. A client whose hello is refused
// gets an alert, so that it can say why it failed.
func (c *session) hello() ([]byte, error) {
	_ = c.job.SetReadDeadline(time.Now().Add(c.gateway.cfg.Hello)) // fails on a closed connection, as the read then does
	peek := &peeked{Conn: c.job}
	err := parseHello(peek, c.line.Name)
	if r := (*refusal)(nil); errors.As(err, &r) && len(peek.read) > 0 && peek.read[0] == 22 {
		// A fatal access_denied (RFC 8446 section 6). The reset follows.
		_, _ = c.job.Write([]byte{21, 3, 3, 0, 2, 2, 49})
	}
	return peek.read, err
}

// parseHello reads a ClientHello from conn and compares its server name.
func parseHello(conn *peeked, name string) error {
	ech := refused("the ClientHello has an encrypted part, which may hide another name; turn ECH off in the client")
	verdict := error(nil)
	server := tls.Server(conn, &tls.Config{
		MinVersion: tls.VersionTLS12,
		GetEncryptedClientHelloKeys: func(*tls.ClientHelloInfo) ([]tls.EncryptedClientHelloKey, error) {
			verdict = ech
			return nil, errPeeked
		},
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			switch {
			case slices.Contains(hello.Extensions, extensionECH):
				verdict = ech
			case hello.ServerName == "":
				verdict = refused("the ClientHello has no server name; the client must send %s", name)
			case !strings.EqualFold(hello.ServerName, name):
				verdict = refused("the ClientHello asks for %s on a connection to %s", printable(hello.ServerName), name)
			}
			return nil, errPeeked
		},
	})
	err := server.HandshakeContext(context.Background()) // ends by the deadline, or when the session does
	switch {
	case errors.Is(err, errPeeked):
		return verdict
	case errors.Is(err, os.ErrDeadlineExceeded):
		return refused("no ClientHello came in time")
	case errors.Is(err, errTooLong):
		return refused("the ClientHello is longer than %d bytes", helloLimit)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return refused("the connection ended before a ClientHello")
	}
	return refused("not a ClientHello; if the protocol is not TLS, or starts without it, the rule needs protocol: tcp")
}

var errTooLong = errors.New("too long")

// peeked is a connection that keeps what is read and sends nothing.
type peeked struct {
	net.Conn
	read []byte
}

func (p *peeked) Read(b []byte) (int, error) {
	room := helloLimit - len(p.read)
	if room <= 0 {
		return 0, errTooLong
	}
	n, err := p.Conn.Read(b[:min(len(b), room)])
	p.read = append(p.read, b[:n]...)
	return n, err
}

func (p *peeked) Write(b []byte) (int, error) { return len(b), nil }
