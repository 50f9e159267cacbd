package gitea

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/gitea/fakegitea"
)

// patience bounds the wait for what must happen.
const patience = 2 * time.Minute

// memory is a store that outlives providers.
type memory struct {
	mu    sync.Mutex
	b     []byte
	saves int
}

func (m *memory) Load() ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.b, nil
}

func (m *memory) Save(b []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.b = bytes.Clone(b)
	m.saves++
	return nil
}

// instance starts a fake that must not have been used wrongly when the test
// ends.
func instance(t *testing.T) *fakegitea.Server {
	t.Helper()
	s, err := fakegitea.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(s.Close(), s.Violations()); err != nil {
			t.Errorf("the server was used wrongly: %v", err)
		}
	})
	return s
}

func config(s *fakegitea.Server) Config {
	return Config{
		URL: s.URL(), Runner: "agent", Labels: []string{"linux"}, Store: &memory{}, Timeout: time.Minute,
		Token: func() (creds.Secret, error) { return creds.NewSecret(fakegitea.RegistrationToken), nil },
	}
}

func open(t *testing.T, c Config) *Provider {
	t.Helper()
	p, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// flow is a workflow of steps that run commands.
func flow(commands ...string) string {
	w := "name: ci\non: push\njobs:\n  build:\n    runs-on: linux\n    steps:\n"
	for _, c := range commands {
		w += "      - run: " + c + "\n"
	}
	return w
}

func simple(commands ...string) fakegitea.Job {
	return fakegitea.Job{Workflow: flow(commands...), Steps: len(commands), RunsOn: []string{"linux"}}
}

// take polls and claims until there is a job. What Poll tells is collected.
func take(t *testing.T, p *Provider, name string) (job providers.Job, told error, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		o, perr := p.Poll(ctx)
		if perr != nil {
			if ctx.Err() != nil {
				return job, told, fmt.Errorf("no job came: %w", perr)
			}
			told = errors.Join(told, perr)
			continue
		}
		job, err = p.Claim(ctx, name, o)
		if !errors.Is(err, providers.ErrGone) {
			return job, told, err
		}
	}
}

// claimed submits a job and claims it.
func claimed(t *testing.T, s *fakegitea.Server, p *Provider, name string, j fakegitea.Job) (providers.Job, int64) {
	t.Helper()
	id := s.Submit(j)
	job, _, err := take(t, p, name)
	if err != nil {
		t.Fatalf("Claim = %v, want the job", err)
	}
	return job, id
}

func logOf(t *testing.T, p *Provider, name string, ref []byte) providers.Log {
	t.Helper()
	l, err := p.Log(t.Context(), name, ref)
	if err != nil {
		t.Fatalf("Log = %v", err)
	}
	return l
}

// eventually waits for what the server sees.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	late := time.NewTimer(patience)
	defer late.Stop()
	for !is() {
		select {
		case <-tick.C:
		case <-late.C:
			t.Fatalf("%s: not after %s", what, patience)
		}
	}
}

func number(t *testing.T, id string) int64 {
	t.Helper()
	n, err := strconv.ParseInt(id, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func text(rows []string) string {
	var b strings.Builder
	for _, r := range rows {
		b.WriteString(r + "\n")
	}
	return b.String()
}
