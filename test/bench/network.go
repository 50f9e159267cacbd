package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
)

// streamBytes is how much one stream carries: a second or less.
const streamBytes = 1 << 30

// A server is the destination on the host's loopback. The first byte of a
// connection says what it wants: a stream, or a byte back.
type server struct {
	listener net.Listener
	port     int
	serving  sync.WaitGroup
}

func listen() (*server, error) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s := &server{listener: l, port: l.Addr().(*net.TCPAddr).Port}
	s.serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return // closed
			}
			s.serving.Go(func() { serve(conn) })
		}
	})
	return s, nil
}

func serve(conn net.Conn) {
	defer conn.Close() // the client counts what arrives
	want := make([]byte, 1)
	if _, err := io.ReadFull(conn, want); err != nil {
		return
	}
	if want[0] != 's' {
		_, _ = conn.Write(want)
		return
	}
	block := make([]byte, 256<<10)
	for range streamBytes / len(block) {
		if _, err := conn.Write(block); err != nil {
			return
		}
	}
}

func (s *server) close() error {
	err := s.listener.Close()
	s.serving.Wait()
	return err
}

// throughGateway runs the same client in a box, on the host through squid, and on
// the host, against the same server, one after the other.
func throughGateway(ctx context.Context, w *world, t *table) error {
	a, err := w.start("net", capacity, w.path("tools"))
	if err != nil {
		return err
	}
	proxy, err := startSquid(ctx, w.path("squid"))
	if err != nil {
		return err
	}
	defer proxy.close()
	client, address := w.path("tools/client"), net.JoinHostPort("127.0.0.1", strconv.Itoa(w.server.port))
	var box, squids, direct []float64
	for i := range streams + 1 {
		inside, err := a.rate(ctx)
		if err != nil {
			return err
		}
		text, err := output(ctx, client, "stream", address)
		if err != nil {
			return err
		}
		tunnelled, err := output(ctx, "env", "PROXY="+proxy.address, client, "stream", address)
		if err != nil {
			return err
		}
		outside, oerr := rate(text)
		through, terr := rate(tunnelled)
		if err := errors.Join(oerr, terr); err != nil {
			return err
		}
		if i > 0 { // the first warms up
			box, squids, direct = append(box, inside), append(squids, through), append(direct, outside)
		}
	}
	r, err := a.run(ctx, "connect.yml")
	if err != nil {
		return err
	}
	inside, err := a.printed(r.ID)
	if err != nil {
		return err
	}
	outside, err := output(ctx, client, "connect", address, strconv.Itoa(connectsOfAJob))
	if err != nil {
		return err
	}
	tunnelled, err := output(ctx, "env", "PROXY="+proxy.address, client, "connect", address, strconv.Itoa(connectsOfAJob))
	if err != nil {
		return err
	}
	boxConnect, berr := millis(inside)
	squidConnect, serr := millis(tunnelled)
	directConnect, derr := millis(outside)
	if err := errors.Join(berr, serr, derr); err != nil {
		return err
	}
	peak, err := field(fmt.Sprintf("/proc/%d/status", a.cmd.Process.Pid), "VmHWM:")
	if err != nil {
		return err
	}
	t.least(60, "gateway, one stream passed through, of a direct one", "%", shares(box, direct)...)
	t.info("squid, the same by CONNECT", "%", shares(squids, direct)...)
	t.info("  through the gateway", "MB/s", box...)
	t.info("  through squid", "MB/s", squids...)
	t.info("  direct", "MB/s", direct...)
	t.info("  connect and one byte there and back, through the gateway", "ms", boxConnect...)
	t.info("  connect and one byte there and back, through squid", "ms", squidConnect...)
	t.info("  connect and one byte there and back, direct", "ms", directConnect...)
	t.info(fmt.Sprintf("  the agent's RSS at most, after %d GiB", (streams+1)*streamBytes>>30), "MiB", peak)
	return a.stop()
}

func (a *agent) rate(ctx context.Context) (float64, error) {
	r, err := a.run(ctx, "stream.yml")
	if err != nil {
		return 0, err
	}
	text, err := a.printed(r.ID)
	if err != nil {
		return 0, err
	}
	return rate(text)
}

// rate reads what the client says of a stream, in MB/s.
func rate(text string) (float64, error) {
	var bytes, nanos int64
	if _, err := fmt.Sscan(text, &bytes, &nanos); err != nil || bytes != streamBytes {
		return 0, fmt.Errorf("stream %q: want %d bytes: %w", text, streamBytes, err)
	}
	return float64(bytes) / 1e6 / (float64(nanos) / 1e9), nil
}

// millis reads lines of nanoseconds.
func millis(text string) ([]float64, error) {
	var all []float64
	for _, word := range strings.Fields(text) {
		n, err := strconv.ParseFloat(word, 64)
		if err != nil {
			return nil, err
		}
		all = append(all, n/1e6)
	}
	if len(all) != connectsOfAJob {
		return nil, fmt.Errorf("%d connects, want %d", len(all), connectsOfAJob)
	}
	return all, nil
}
