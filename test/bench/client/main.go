// Command client is what the benchmark runs in a box, and outside of it for
// comparison, to measure a network.
//
//	client stream ADDRESS     bytes and nanoseconds from connect to the end of the stream
//	client download URL       the same of an answer
//	client requests URL N     nanoseconds of each of N requests, each with a connection of its own
//	client connect ADDRESS N  nanoseconds of each of N connects with a byte there and back
//
// PROXY in the environment is the HOST:PORT of a forward proxy to go through.
package main

import (
	"bufio"
	"cmp"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	neturl "net/url"
	"os"
	"strconv"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "client:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 2 && args[0] == "stream" {
		return stream(args[1])
	}
	if len(args) == 3 && args[0] == "connect" {
		n, err := strconv.Atoi(args[2])
		if err != nil {
			return err
		}
		return connect(args[1], n)
	}
	if len(args) == 2 && args[0] == "download" {
		return download(args[1])
	}
	if len(args) == 3 && args[0] == "requests" {
		n, err := strconv.Atoi(args[2])
		if err != nil {
			return err
		}
		for range n {
			if err := request(args[1]); err != nil {
				return err
			}
		}
		return nil
	}
	return fmt.Errorf("arguments %q", args)
}

func stream(address string) error {
	start := time.Now()
	conn, err := dial(address, "s")
	if err != nil {
		return err
	}
	var total int64
	for buf := make([]byte, 256<<10); ; {
		n, err := conn.Read(buf)
		total += int64(n)
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
	}
	fmt.Println(total, time.Since(start).Nanoseconds())
	return conn.Close()
}

func connect(address string, n int) error {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return err
	}
	found, err := net.LookupHost(host) // not part of the figure
	if err != nil {
		return err
	}
	for range n {
		start := time.Now()
		conn, err := dial(net.JoinHostPort(found[0], port), "c")
		if err != nil {
			return err
		}
		if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
			return err
		}
		fmt.Println(time.Since(start).Nanoseconds())
		if err := conn.Close(); err != nil {
			return err
		}
	}
	return nil
}

// get asks for an answer, at ADDRESS if that is set and not where the name leads.
// HTTP/1 is what most programs that download speak, and the faster one.
func get(url string) (int64, error) {
	t := &http.Transport{DisableKeepAlives: true, Protocols: new(http.Protocols)}
	t.Protocols.SetHTTP1(true)
	if to := os.Getenv("ADDRESS"); to != "" {
		t.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, to)
		}
	}
	if proxy := os.Getenv("PROXY"); proxy != "" {
		t.Proxy = http.ProxyURL(&neturl.URL{Scheme: "http", Host: proxy})
	}
	resp, err := (&http.Client{Transport: t}).Get(url)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return 0, fmt.Errorf("%s: %s", url, resp.Status)
	}
	return io.CopyBuffer(struct{ io.Writer }{io.Discard}, resp.Body, make([]byte, 256<<10))
}

func download(url string) error {
	start := time.Now()
	n, err := get(url)
	if err != nil {
		return err
	}
	fmt.Println(n, time.Since(start).Nanoseconds())
	return nil
}

func request(url string) error {
	start := time.Now()
	if _, err := get(url); err != nil {
		return err
	}
	fmt.Println(time.Since(start).Nanoseconds())
	return nil
}

// dial connects and says what is wanted.
func dial(address, what string) (net.Conn, error) {
	to := cmp.Or(os.Getenv("PROXY"), address)
	conn, err := net.Dial("tcp", to)
	if err != nil {
		return nil, err
	}
	if to != address {
		if err := tunnel(conn, address); err != nil {
			return nil, err
		}
	}
	if _, err := io.WriteString(conn, what); err != nil {
		return nil, err
	}
	return conn, nil
}

// tunnel asks a proxy for a connection. The server speaks when it is asked to, so
// that nothing of it comes with the answer.
func tunnel(conn net.Conn, address string) error {
	if _, err := fmt.Fprintf(conn, "CONNECT %[1]s HTTP/1.1\r\nHost: %[1]s\r\n\r\n", address); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: http.MethodConnect})
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("proxy: %s", resp.Status)
	}
	return nil
}
