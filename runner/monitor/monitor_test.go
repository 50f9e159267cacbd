package monitor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/audit"
)

var errDown = errors.New("down")

// sink takes events, or does not.
type sink struct{ err error }

func (s *sink) Append(context.Context, audit.Event) error { return s.err }

// fixture is an agent that is well, and works for one provider.
func fixture(t *testing.T) (*sink, *runner.Status, Config) {
	t.Helper()
	s := &sink{}
	status := &runner.Status{
		Policy: "sha256:1", Slots: 4, Busy: 2, Warm: 3,
		Providers: map[string]runner.ProviderStatus{"ci": {Waiting: 1, Working: 2, Polls: 7, Errors: 3, Doing: "ask", Since: time.Now()}},
	}
	return s, status, Config{
		Status: func() runner.Status { return *status }, Jobs: func() ([]runner.JobInfo, error) { return nil, nil },
		Dirs: map[string]string{"journal": t.TempDir()}, Record: NewRecord(s), Version: "1.2.3",
	}
}

func get(t *testing.T, h http.Handler, path string) (int, string) {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, nil))
	return w.Code, w.Body.String()
}

func append1(t *testing.T, r *Record, job, action, object, result string, detail ...string) {
	t.Helper()
	e := audit.Event{Time: time.Now(), Job: job, Action: action, Object: object, Result: result, Detail: map[string]string{}}
	for i := 0; i < len(detail); i += 2 {
		e.Detail[detail[i]] = detail[i+1]
	}
	_ = r.Append(t.Context(), e)
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	s, _, c := fixture(t)
	owed := func(state string) runner.DebtInfo {
		return runner.DebtInfo{Kind: "lease", By: "pg", Lease: runner.Lease{State: state}}
	}
	c.Jobs = func() ([]runner.JobInfo, error) {
		return []runner.JobInfo{{Owes: []runner.DebtInfo{owed("issued"), owed("stuck"), {Kind: "box"}}}, {Owes: []runner.DebtInfo{owed("stuck")}}}, nil
	}
	h, r := Handler(c), c.Record
	// One job, with a lease of its own and one that is stuck for two attempts.
	append1(t, r, "j1", "job.admit", "build", "ok", "repository", "acme/app")
	append1(t, r, "j1", "lease.issue", "j1-l-db", "ok", "issuer", "pg")
	append1(t, r, "j1", "lease.issue", "j1-l-key", "ok", "issuer", "pg")
	append1(t, r, "j1", "lease.issue", "j1-l-bad", "refused", "issuer", "pg")
	append1(t, r, "j1", "egress.dns", "x.example", "refused", "verdict", "refused")
	append1(t, r, "j1", "egress.tcp", "y.example", "ok", "verdict", "allowed")
	append1(t, r, "j1", "job.end", "j1", "ok", "conclusion", "success", "took_claim", "2ms", "took_admit", "1ms", "took_intend", "1ms",
		"took_gw", "1ms", "took_box", "20ms", "took_take", "1ms", "took_adopt", "2ms", "took_l-db", "30ms", "took_l-key", "40ms", "took_step-a", "2s", "took_r1", "1s", "took_step-b", "1s")
	append1(t, r, "j1", "lease.revoke", "j1-l-db", "ok", "issuer", "pg")
	for range 2 {
		append1(t, r, "j1", "lease.revoke", "j1-l-key", "down", "issuer", "pg")
	}
	for range 2 { // the report has to be made again
		append1(t, r, "j1", "job.complete", "j1", "ok", "provider", "ci", "conclusion", "success")
	}
	// One that an earlier life left, and one that is not over.
	append1(t, r, "j2", "job.recover", "j2", "ok")
	append1(t, r, "j2", "job.complete", "j2", "ok", "provider", "ci", "conclusion", "lost")
	append1(t, r, "j3", "lease.issue", "j3-l-db", "ok", "issuer", "pg")
	append1(t, r, "j3", "lease.unprovable", "j3-l-x", "ok", "issuer", "jwt", "until", time.Now().Add(time.Hour).UTC().Format(time.RFC3339Nano))
	append1(t, r, "j3", "lease.unprovable", "j3-l-y", "ok", "issuer", "jwt", "until", time.Now().Add(-time.Hour).UTC().Format(time.RFC3339Nano))
	append1(t, r, "", "policy.reload", "policy", "bad")
	append1(t, r, "j4", "reap", "j4-box", "ok", "kind", "box")
	append1(t, r, "j5", "release.stuck", "j5", "down")
	s.err = errDown
	append1(t, r, "j3", "lease.revoke", "j3-l-db", "ok", "issuer", "pg") // not written: not done

	code, page := get(t, h, "/metrics")
	if code != http.StatusOK {
		t.Fatalf("got %d: %s", code, page)
	}
	for _, want := range []string{
		`mayfly_build_info{go="go1.`, `version="1.2.3"} 1`, `mayfly_policy_info{digest="sha256:1"} 1`,
		`mayfly_slots 4`, `mayfly_slots_used 2`, `mayfly_boxes_stuck 0`, `mayfly_boxes_warm 3`,
		`mayfly_jobs{provider="ci",state="claimed"} 0`, `mayfly_jobs{provider="ci",state="waiting"} 1`, `mayfly_jobs{provider="ci",state="working"} 2`,
		`mayfly_polls_total{provider="ci"} 7`, `mayfly_poll_errors_total{provider="ci"} 3`, `mayfly_poll_failing{provider="ci"} 0`,
		`mayfly_jobs_total{conclusion="success",provider="ci"} 1`, `mayfly_jobs_total{conclusion="lost",provider="ci"} 1`,
		`mayfly_leases_total{event="issued",issuer="pg"} 3`, `mayfly_leases_total{event="failed",issuer="pg"} 1`,
		`mayfly_leases_total{event="revoked",issuer="pg"} 1`, `mayfly_leases_total{event="stuck",issuer="pg"} 1`,
		`mayfly_leases_total{event="unprovable",issuer="jwt"} 2`,
		`mayfly_leases{issuer="pg",state="issued"} 1`, `mayfly_leases{issuer="pg",state="stuck"} 2`,
		`mayfly_leases{issuer="jwt",state="unprovable"} 1`,
		`mayfly_egress_total{network="dns",verdict="refused"} 1`, `mayfly_egress_total{network="tcp",verdict="allowed"} 1`,
		`mayfly_job_stage_seconds_sum{stage="claim"} 0.002`, `mayfly_job_stage_seconds_sum{stage="admit"} 0.002`,
		`mayfly_job_stage_seconds_sum{stage="box"} 0.021`, `mayfly_job_stage_seconds_sum{stage="adopt"} 0.003`, `mayfly_job_stage_seconds_sum{stage="leases"} 0.07`,
		`mayfly_job_stage_seconds_sum{stage="steps"} 4`, `mayfly_job_stage_seconds_count{stage="steps"} 1`,
		`mayfly_job_stage_seconds_count{stage="release"} 1`, `mayfly_job_stage_seconds_bucket{stage="total",le="10"} 1`,
		`mayfly_job_stage_seconds_bucket{stage="total",le="3"} 0`,
		`mayfly_recovered_jobs_total 1`, `mayfly_releases_stuck_total 1`, `mayfly_reaped_total{kind="box"} 1`,
		`mayfly_policy_reloads_total{result="refused"} 1`, `mayfly_audit_errors_total 1`,
		"process_resident_memory_bytes ", "go_goroutines ",
	} {
		if !strings.Contains(page, want+"\n") && !(strings.HasSuffix(want, " ") || strings.HasSuffix(want, ".")) || !strings.Contains(page, want) {
			t.Errorf("no line %s", want)
		}
	}
	if strings.Contains(page, "acme/app") || strings.Contains(page, "example") {
		t.Error("the page names a repository or what a job reached for")
	}
	if len(r.ended) != 0 || len(r.leases) != 2 {
		t.Errorf("remembered: %v, %v; want the two leases that are stuck or unprovable", r.ended, r.leases)
	}
}

// A job cannot make series: what labels say comes from fixed lists.
func TestLabelsAreBounded(t *testing.T) {
	t.Parallel()
	_, _, c := fixture(t)
	for i := range 500 {
		odd := fmt.Sprint("odd", i)
		append1(t, c.Record, odd, "egress."+odd, odd, "ok", "verdict", odd)
		append1(t, c.Record, odd, "job.end", odd, "ok", "took_"+odd, "1s", "took_step-"+odd, "1s", "took_l-"+odd, "1s")
		append1(t, c.Record, odd, "job.complete", odd, "ok", "provider", "ci", "conclusion", odd)
		append1(t, c.Record, odd, "reap", odd, "ok", "kind", odd)
		append1(t, c.Record, odd, odd, odd, odd)
	}
	_, page := get(t, Handler(c), "/metrics")
	if strings.Contains(page, "odd") || !strings.Contains(page, `mayfly_egress_total{network="other",verdict="other"} 500`) {
		t.Error("a label has the value that an event brought")
	}
}

func TestHealth(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name   string
		change func(*sink, *runner.Status, *Config)
		alive  bool
		ready  bool
		what   string
		why    string
	}{
		{"well", func(*sink, *runner.Status, *Config) {}, true, true, "", ""},
		{"audit", func(s *sink, _ *runner.Status, _ *Config) { s.err = errDown }, false, false, "audit", "down"},
		{"journal gone", func(_ *sink, _ *runner.Status, c *Config) { c.Dirs["journal"] = "/nonexistent" }, false, false, "journal", "no such file"},
		{"journal read-only", func(_ *sink, _ *runner.Status, c *Config) { c.Dirs["journal"] = "/proc/self" }, false, false, "journal", "/proc/self"},
		{"debts", func(_ *sink, _ *runner.Status, c *Config) {
			c.Jobs = func() ([]runner.JobInfo, error) { return nil, errDown }
		}, false, false, "debts", "down"},
		{"boxes", func(_ *sink, s *runner.Status, _ *Config) { s.Jammed = 1 }, false, false, "boxes", "1 will not die"},
		{"claim", func(_ *sink, s *runner.Status, _ *Config) { s.Providers["ci"] = doing("claim", time.Hour) }, false, false, "provider ci", "not answered since 1h"},
		{"a claim", func(_ *sink, s *runner.Status, _ *Config) { s.Providers["ci"] = doing("claim", time.Minute) }, true, true, "", ""},
		{"quiet", func(_ *sink, s *runner.Status, _ *Config) { s.Providers["ci"] = doing("ask", time.Hour) }, true, true, "", ""},
		{"drains", func(_ *sink, s *runner.Status, _ *Config) { s.Providers["ci"] = doing("ended", time.Hour) }, true, false, "provider ci", "starts or drains"},
		{"service down", func(_ *sink, s *runner.Status, _ *Config) {
			s.Providers["ci"] = runner.ProviderStatus{Failing: errDown, Doing: "ask"}
		}, true, false, "provider ci", "down"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s, status, c := fixture(t)
			test.change(s, status, &c)
			append1(t, c.Record, "j", "job.admit", "build", "ok")
			for path, good := range map[string]bool{"/healthz": test.alive, "/readyz": test.ready} {
				code, body := get(t, Handler(c), path)
				var h Health
				if err := json.Unmarshal([]byte(body), &h); err != nil {
					t.Fatalf("%s: %v: %s", path, err, body)
				}
				if good != (code == http.StatusOK) || !good && code != http.StatusServiceUnavailable || good != (h.Status == "ok") {
					t.Errorf("%s: got %d %s, want good: %v", path, code, body, good)
				}
				if !good && (len(h.Problems) != 1 || h.Problems[0].What != test.what || !strings.Contains(h.Problems[0].Why, test.why)) {
					t.Errorf("%s: got %+v, want %s: %s", path, h.Problems, test.what, test.why)
				}
				if h.Policy != "sha256:1" || h.Version != "1.2.3" {
					t.Errorf("%s: got %+v, want the policy and the version", path, h)
				}
			}
			if left, err := os.ReadDir(c.Dirs["journal"]); test.alive && (err != nil || len(left) != 0) {
				t.Errorf("the look left %v in the journal (%v)", left, err)
			}
		})
	}
	// An audit that works again is well again.
	s, _, c := fixture(t)
	s.err = errDown
	append1(t, c.Record, "j", "job.admit", "", "ok")
	s.err = nil
	append1(t, c.Record, "j", "job.admit", "", "ok")
	if code, body := get(t, Handler(c), "/healthz"); code != http.StatusOK {
		t.Errorf("got %d %s", code, body)
	}
}

func doing(what runner.Doing, since time.Duration) runner.ProviderStatus {
	return runner.ProviderStatus{Doing: what, Since: time.Now().Add(-since)}
}

// The words of the agent are those that are judged here.
func TestDoing(t *testing.T) {
	t.Parallel()
	words := []runner.Doing{"claim", "ended", "ask", "wait for a slot"}
	if !slices.ContainsFunc(words, runner.Doing.Claiming) || !slices.ContainsFunc(words, runner.Doing.Ended) {
		t.Error("the words have changed: bring these tests up to date")
	}
}

func TestServe(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "monitor.sock")
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false) // as if it had been killed
	if err := stale.Close(); err != nil {
		t.Fatal(err)
	}
	_, _, c := fixture(t)
	for _, at := range [][2]string{{"unix", path}, {"tcp", "127.0.0.1:0"}} {
		l, err := Listen(at[0], at[1])
		if err != nil {
			t.Fatal(err)
		}
		network, address := l.Addr().Network(), l.Addr().String()
		stop := Serve(l, Handler(c))
		if _, err := Listen(network, address); err == nil {
			t.Errorf("%s: a second agent listens too", address)
		}
		client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, address)
		}}}
		for path, want := range map[string]int{"/healthz": 200, "/readyz": 200, "/metrics": 200, "/": 404, "/debug/pprof/": 404} {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://agent"+path, nil)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := client.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(resp.Body)
			if err := errors.Join(err, resp.Body.Close()); err != nil || resp.StatusCode != want {
				t.Errorf("%s%s: got %d %.100s, %v, want %d", address, path, resp.StatusCode, body, err, want)
			}
		}
		if info, err := os.Stat(path); network == "unix" && (err != nil || info.Mode().Perm() != 0o660) {
			t.Errorf("the socket: %v, %v, want mode 0660", info, err)
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(path); network == "unix" && err == nil {
			t.Error("the socket is left")
		}
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen("unix", path); err == nil {
		t.Error("a file that is no socket was replaced")
	}
}
