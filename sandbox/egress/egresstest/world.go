package egresstest

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// The types of DNS questions that the suite asks.
const (
	typeA     = dnsmessage.TypeA
	typeAAAA  = dnsmessage.TypeAAAA
	typeTXT   = dnsmessage.TypeTXT
	typeHTTPS = dnsmessage.TypeHTTPS
)

// public is an address that stands for the Internet.
const public = "93.184.216.34"

func readFull(r io.Reader, b []byte) (int, error) { return io.ReadFull(r, b) }

// serve makes a server of the suite answer for an address outside.
func (b *bench) serve(address string, handle func(net.Conn)) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				conn.SetDeadline(time.Now().Add(2 * b.patience))
				handle(conn)
			})
		}
	})
	b.tb.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	b.route(address, l.Addr().String())
	return nil
}

// route makes address outside mean a listener on loopback.
func (b *bench) route(address, real string) {
	b.outside.mu.Lock()
	defer b.outside.mu.Unlock()
	b.outside.servers[address] = real
}

// echoServer sends back what it gets and ends when the client has.
func echoServer(conn net.Conn) { _, _ = io.Copy(conn, conn) }

// web serves HTTP for an address, with TLS or without, and answers with the
// host that it was asked for.
func (b *bench) web(address string, withTLS bool) *httptest.Server {
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "host %s", r.Host)
	}))
	if withTLS {
		s.StartTLS()
	} else {
		s.Start()
	}
	b.tb.Cleanup(s.Close)
	b.route(address, s.Listener.Addr().String())
	return s
}

// An answer is what the gateway said to a DNS question.
type answer struct {
	code  dnsmessage.RCode
	addrs []netip.Addr
}

// ask asks the box's resolver.
func (j *job) ask(name string, kind dnsmessage.Type) (answer, error) {
	var a answer
	conn, err := j.net.Dial("udp", netip.AddrPortFrom(egress.Resolver, 53).String())
	if err != nil {
		return a, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(j.patience))
	asked, err := dnsmessage.NewName(name + ".")
	if err != nil {
		return a, err
	}
	q := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: 4711, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: asked, Type: kind, Class: dnsmessage.ClassINET}},
	}
	packet, err := q.Pack()
	if err != nil {
		return a, err
	}
	if _, err := conn.Write(packet); err != nil {
		return a, err
	}
	buf := make([]byte, 4096)
	n, err := conn.Read(buf)
	if err != nil {
		return a, fmt.Errorf("DNS question %v for %s: %w", kind, name, err)
	}
	var m dnsmessage.Message
	if err := m.Unpack(buf[:n]); err != nil {
		return a, fmt.Errorf("DNS answer for %s: %w", name, err)
	}
	if !m.Response || m.ID != q.ID || len(m.Questions) != 1 || m.Questions[0] != q.Questions[0] {
		return a, fmt.Errorf("DNS answer for %s: got %+v, which does not answer %+v", name, m, q)
	}
	a.code = m.RCode
	for _, r := range m.Answers {
		if body, ok := r.Body.(*dnsmessage.AResource); ok {
			a.addrs = append(a.addrs, netip.AddrFrom4(body.A))
		} else {
			return a, fmt.Errorf("DNS answer for %s: record %v", name, r.Header.Type)
		}
	}
	return a, nil
}
