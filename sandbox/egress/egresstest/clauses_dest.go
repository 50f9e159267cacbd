package egresstest

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

func unreachable(b *bench) error {
	b.outside.name("down.example", public)
	j, err := b.start("job-1", rule("down.example", 7, egress.TCP), rule("gone.example", 7, egress.TCP))
	if err != nil {
		return err
	}
	for _, name := range []string{"down.example", "gone.example"} { // refuses; does not resolve
		if err := isReset(j.connect(name, 7)); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		_, err = j.ledger.await(name+" failed", func(l egress.Line) bool {
			return l.Verdict == egress.Failed && l.Name == name && l.Rule != "" && l.Reason != ""
		})
		if err != nil {
			return err
		}
	}
	if n := j.ledger.count(is(egress.Allowed)); n != 0 {
		return fmt.Errorf("got %d lines of allowed attempts beside the failed ones, want none", n)
	}
	return nil
}

func halfClose(b *bench) error {
	b.outside.name("half.example", public)
	err := b.serve(public+":7", func(conn net.Conn) {
		all, _ := io.ReadAll(conn) // until the job has closed its half
		fmt.Fprintf(conn, "got %s", all)
	})
	if err != nil {
		return err
	}
	err = b.serve(public+":8", func(conn net.Conn) {
		fmt.Fprint(conn, "first")
		_ = conn.(*net.TCPConn).CloseWrite()
		all, _ := io.ReadAll(conn)
		b.outside.name("said."+string(all), public)
	})
	if err != nil {
		return err
	}
	j, err := b.start("job-1", rule("half.example", 7, egress.TCP), rule("half.example", 8, egress.TCP))
	if err != nil {
		return err
	}
	conn, err := j.connect("half.example", 7)
	if err != nil {
		return err
	}
	if _, err := conn.Write([]byte("all")); err != nil {
		return err
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	if got, err := io.ReadAll(conn); err != nil || string(got) != "got all" {
		return fmt.Errorf("after the job's half-close: got %q %v, want the answer", got, err)
	}
	if conn, err = j.connect("half.example", 8); err != nil {
		return err
	}
	if got, err := io.ReadAll(conn); err != nil || string(got) != "first" {
		return fmt.Errorf("until the destination's half-close: got %q %v, want %q", got, err, "first")
	}
	if _, err := conn.Write([]byte("after")); err != nil {
		return fmt.Errorf("write after the destination's half-close: %w", err)
	}
	conn.Close()
	last, err := j.ledger.await("ended", func(l egress.Line) bool { return l.Verdict == egress.Ended && l.Port == 8 })
	if err != nil {
		return err
	}
	if last.Sent != 5 {
		return fmt.Errorf("after the destination's half-close %d bytes were passed, want 5", last.Sent)
	}
	return nil
}

func serverName(b *bench) error {
	b.outside.name("tls.example", public)
	b.web(public+":443", true)
	j, err := b.start("job-1", rule("tls.example", 443, egress.TLS))
	if err != nil {
		return err
	}
	for _, tt := range []struct {
		name string
		talk func(net.Conn) error
		good bool
	}{
		{"the rule's name", shake("tls.example"), true},
		{"its other case", shake("TLS.example"), true},
		{"another name", shake("other.example"), false},
		{"a longer name", shake("tls.example.evil"), false},
		{"no name", shake(""), false},
		{"no TLS", func(c net.Conn) error {
			_, err := fmt.Fprint(c, "GET / HTTP/1.0\r\n\r\n")
			return errors.Join(err, silent(c))
		}, false},
	} {
		conn, err := j.connect("tls.example", 443)
		if err != nil {
			return err
		}
		if err := tt.talk(conn); (err == nil) != tt.good {
			return fmt.Errorf("%s: got %v, want allowed: %v", tt.name, err, tt.good)
		}
		conn.Close()
	}
	if dialled, _ := b.outside.seen(); len(dialled) != 2 {
		return fmt.Errorf("dialled %v, want the destination twice", dialled)
	}
	if err := j.close("job-1"); err != nil { // the lines are written when it returns
		return err
	}
	if n := j.ledger.count(on("tcp", egress.Refused)); n != 4 {
		return fmt.Errorf("got %d lines of refused connections, want 4", n)
	}
	return nil
}

// shake is a TLS handshake that asks for a server name.
func shake(name string) func(net.Conn) error {
	return func(conn net.Conn) error {
		// The certificate is the suite's own; the name is what is tested.
		return tls.Client(conn, &tls.Config{ServerName: name, InsecureSkipVerify: true}).Handshake()
	}
}

// silent reports a connection that sends nothing any more.
func silent(conn net.Conn) error {
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		return err
	}
	return nil
}

func hostName(b *bench) error {
	b.outside.name("web.example", public)
	b.web(public+":80", false)
	j, err := b.start("job-1", rule("web.example", 80, egress.HTTP))
	if err != nil {
		return err
	}
	conn, err := j.connect("web.example", 80)
	if err != nil {
		return err
	}
	r := bufio.NewReader(conn)
	for range 2 { // on one connection
		if err := get(conn, r, "GET / HTTP/1.1\r\nHost: web.example\r\n\r\n"); err != nil {
			return fmt.Errorf("request for the rule's name: %w", err)
		}
	}
	if err := get(conn, r, "GET http://web.example/ HTTP/1.1\r\nHost: web.example:80\r\n\r\n"); err != nil {
		return fmt.Errorf("request with the whole target: %w", err)
	}
	if err := get(conn, r, "GET / HTTP/1.1\r\nHost: other.example\r\n\r\n"); err == nil {
		return errors.New("a later request on the connection for another host was answered")
	}
	bad := []string{
		"GET / HTTP/1.1\r\nHost: other.example\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: web.example:81\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: web.example.\r\n\r\n",
		"GET http://other.example/ HTTP/1.1\r\nHost: web.example\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: web.example\r\nHost: other.example\r\n\r\n",
		"GET / HTTP/1.0\r\n\r\n",
		"CONNECT web.example:80 HTTP/1.1\r\nHost: web.example:80\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: web.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: web.example\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
	}
	for _, request := range bad {
		conn, err := j.connect("web.example", 80)
		if err != nil {
			return err
		}
		if err := get(conn, bufio.NewReader(conn), request); err == nil {
			return fmt.Errorf("request %q was answered", request)
		}
		conn.Close()
	}
	if err := j.close("job-1"); err != nil {
		return err
	}
	if got := j.ledger.count(is(egress.Allowed)); got != 3 {
		return fmt.Errorf("got %d lines of allowed requests, want 3", got)
	}
	if got := j.ledger.count(on("tcp", egress.Refused)); got != len(bad)+1 {
		return fmt.Errorf("got %d lines of refused requests, want %d", got, len(bad)+1)
	}
	return nil
}

// get sends a request and expects the suite's own answer.
func get(conn net.Conn, r *bufio.Reader, request string) error {
	if _, err := io.WriteString(conn, request); err != nil {
		return err
	}
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK || !strings.HasPrefix(string(body), "host web.example") {
		return fmt.Errorf("answer %s %q", resp.Status, body)
	}
	return nil
}
