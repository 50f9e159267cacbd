// Package monitor shows an operator how an agent is: whether it is alive and
// takes jobs, for whatever restarts or alerts, and figures for Prometheus.
//
// What the agent does, it writes to the audit: a [Record] stands between, and
// counts. How the agent is at this moment, it tells when asked. So the agent
// itself knows nothing of metrics.
//
// Nothing is shown that is a secret or the name of a repository, and labels
// have the values of the configuration and of fixed lists, so that a job cannot
// make series. Nobody is asked for a password: the listener is for this machine,
// unless the configuration says otherwise.
package monitor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/mayfly-ci/mayfly/runner"
)

// Config is what the pages are made from. All of it is required.
type Config struct {
	// Status looks at the agent.
	Status func() runner.Status
	// Jobs is what the journal says is owed; an error if it cannot be read.
	Jobs func() ([]runner.JobInfo, error)
	// Dirs must be writable, or no job can be taken: directories by what is
	// in them.
	Dirs    map[string]string
	Record  *Record
	Version string
}

// Handler serves /healthz, /readyz and /metrics.
//
// /healthz is 503 if something is wrong that an operator has to mend; a service
// that is down, and an agent that drains, are not. /readyz is 503 then too:
// whenever the agent would not take a job although a slot is free. Both say
// what and why in JSON, also when all is well.
func Handler(c Config) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, report(c, false))
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, report(c, true))
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry(c), promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	return mux
}

func answer(w http.ResponseWriter, h Health) {
	w.Header().Set("Content-Type", "application/json")
	if len(h.Problems) > 0 {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_ = json.NewEncoder(w).Encode(h) // who asked has gone
}

// Listen opens the listener: network is "tcp", or "unix" for a socket that
// only the agent's user and group can use. A socket that a dead agent left is
// replaced.
func Listen(network, address string) (net.Listener, error) {
	l, err := listen(network, address)
	if err != nil {
		return nil, fmt.Errorf("monitor: %w", err)
	}
	return l, nil
}

func listen(network, address string) (net.Listener, error) {
	if network != "unix" {
		return net.Listen(network, address)
	}
	if info, err := os.Lstat(address); err == nil && info.Mode().Type() == fs.ModeSocket {
		if conn, err := net.Dial(network, address); err == nil {
			return nil, errors.Join(fmt.Errorf("%s: another agent listens there", address), conn.Close())
		}
		if err := os.Remove(address); err != nil {
			return nil, err
		}
	}
	l, err := net.Listen(network, address)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(address, 0o660); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// The pages are small and made in milliseconds; who is slower than this must
// not hold a connection.
const patience = 10 * time.Second

// Serve answers on l until the function that it returns is called.
func Serve(l net.Listener, h http.Handler) (stop func() error) {
	s := &http.Server{
		Handler: h, ReadTimeout: patience, WriteTimeout: patience, IdleTimeout: time.Minute,
		MaxHeaderBytes: 16 << 10,
	}
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(l) }()
	return func() error {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		err := s.Shutdown(ctx)
		if err != nil {
			err = s.Close()
		}
		if served := <-ended; !errors.Is(served, http.ErrServerClosed) {
			err = errors.Join(err, served)
		}
		if err != nil {
			return fmt.Errorf("monitor: %w", err)
		}
		return nil
	}
}
