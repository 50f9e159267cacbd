package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strconv"
)

// listenPlain is listenTLS without TLS.
func listenPlain() (*web, error) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	w := &web{server: &http.Server{Handler: http.HandlerFunc(download)}, done: make(chan error, 1), port: l.Addr().(*net.TCPAddr).Port}
	go func() { w.done <- w.server.Serve(l) }()
	return w, nil
}

// plainRule is the policy's, for workflows that start with http.
func (w *web) plainRule() string {
	return fmt.Sprintf(`  - name: plain
    match: {workflow: ["http-*.yml"], trust: [local]}
    timeout: 5m
    egress: [{name: plain.bench, port: %d, protocol: http, resolve: [127.0.0.1]}]
`, w.port)
}

// plain runs the same client over plain HTTP in a box, on the host through squid,
// and on the host, against the same server, one after the other.
func plain(ctx context.Context, w *world, t *table) error {
	a, err := w.start("http", capacity, w.path("tools"))
	if err != nil {
		return err
	}
	proxy, err := startSquid(ctx, w.path("squid-http"))
	if err != nil {
		return err
	}
	defer proxy.close()
	site, client := "http://"+net.JoinHostPort("127.0.0.1", strconv.Itoa(w.plain.port)), w.path("tools/client")
	ways := []struct {
		name string
		run  func(what, path string, n ...string) (string, error)
	}{
		{"through the gateway", func(what, _ string, _ ...string) (string, error) {
			file := map[string]string{"download": "http-stream.yml", "requests": "http-connect.yml"}[what]
			r, err := a.run(ctx, file)
			if err != nil {
				return "", err
			}
			return a.printed(r.ID)
		}},
		{"through squid", func(what, path string, n ...string) (string, error) {
			return output(ctx, "env", append([]string{"PROXY=" + proxy.address, client, what, site + path}, n...)...)
		}},
		{"direct", func(what, path string, n ...string) (string, error) {
			return output(ctx, client, append([]string{what, site + path}, n...)...)
		}},
	}
	rates, connects := make([][]float64, len(ways)), make([][]float64, len(ways))
	for i := range streams + 1 {
		for n, way := range ways {
			text, err := way.run("download", "/stream")
			if err != nil {
				return err
			}
			r, err := rate(text)
			if err != nil {
				return err
			}
			if i > 0 { // the first warms up
				rates[n] = append(rates[n], r)
			}
		}
	}
	for n, way := range ways {
		text, err := way.run("requests", "/", strconv.Itoa(connectsOfAJob))
		if err == nil {
			connects[n], err = millis(text)
		}
		if err != nil {
			return err
		}
	}
	t.info("gateway, one download over plain HTTP, of a direct one", "%", shares(rates[0], rates[2])...)
	t.info("squid, the same", "%", shares(rates[1], rates[2])...)
	for n, way := range ways {
		t.info("  "+way.name, "MB/s", rates[n]...)
	}
	for n, way := range ways {
		t.info("  connect and one request over plain HTTP, "+way.name, "ms", connects[n]...)
	}
	return a.stop()
}

// shares are what the ones are of the others, in percent, pair by pair.
func shares(ones, others []float64) []float64 {
	all := make([]float64, len(ones))
	for i := range ones {
		all[i] = 100 * ones[i] / others[i]
	}
	return all
}
