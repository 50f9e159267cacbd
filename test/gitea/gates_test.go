package gitea_test

import (
	"fmt"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/test/agenttest"
)

// gates are where jobs wait for the test, each at a path: a request is answered
// once the test has opened that path. The same server is the canary.
type gates struct {
	port int

	mu    sync.Mutex
	paths map[string]*gate
}

type gate struct{ asked, opened chan struct{} } // closed when it is so

func openGates(t *testing.T) *gates {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	agenttest.Must(t, err)
	g := &gates{port: l.Addr().(*net.TCPAddr).Port, paths: map[string]*gate{}}
	server := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		gate := g.at(r.URL.Path)
		g.once(gate.asked)
		select {
		case <-gate.opened:
			fmt.Fprintln(w, "open")
		case <-r.Context().Done():
		}
	})}
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(l) }) // until it is closed
	t.Cleanup(func() {
		agenttest.Must(t, server.Close())
		serving.Wait()
	})
	return g
}

func (g *gates) at(path string) *gate {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.paths[path] == nil {
		g.paths[path] = &gate{make(chan struct{}), make(chan struct{})}
	}
	return g.paths[path]
}

// once closes a channel that may be closed already.
func (g *gates) once(c chan struct{}) {
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case <-c:
	default:
		close(c)
	}
}

// pass is a command of a job that waits at a gate.
func (g *gates) pass(path string) string {
	return fmt.Sprintf("curl -sS --max-time 200 -o /dev/null http://gate.test:%d%s", g.port, path)
}

// open lets everybody pass who is at the gate, or comes later.
func (g *gates) open(path string) { g.once(g.at(path).opened) }

// reached waits until somebody is at the gate.
func (g *gates) reached(t *testing.T, path string) {
	t.Helper()
	select {
	case <-g.at(path).asked:
	case <-time.After(bound):
		t.Fatalf("no job came to %s within %v", path, bound)
	}
}

// seen reports whether anybody was at the gate.
func (g *gates) seen(path string) bool {
	select {
	case <-g.at(path).asked:
		return true
	default:
		return false
	}
}
