package hostile_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/test/agenttest"
)

// memoryPeak is the largest resident size that the agent has had, in bytes.
func memoryPeak(t *testing.T, a *agenttest.Agent) int64 {
	t.Helper()
	b, err := os.ReadFile("/proc/" + strconv.Itoa(a.Pid()) + "/status")
	agenttest.Must(t, err)
	m := regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindSubmatch(b)
	if m == nil {
		t.Fatalf("no peak in %s", b)
	}
	n, err := strconv.ParseInt(string(m[1]), 10, 64)
	agenttest.Must(t, err)
	return n << 10
}

// most is what one job may add to the agent's memory, however much it prints.
const most = 48 << 20

func TestOutput(t *testing.T) {
	const roomy = `version: 1
rules:
  - name: line
    match: {trust: local, workflow: .github/workflows/line.yml}
    timeout: 3m
    limits: {memory: 512MiB, pids: 128, cpu: 2, disk: 64MiB, log: 256MiB}
  - name: all
    match: {trust: local}
    timeout: 3m
    limits: {memory: 512MiB, pids: 128, cpu: 2, disk: 64MiB, log: 1MiB}
`
	w := agenttest.New(t, agenttest.Config{Policy: roomy})
	a := w.Start(t)
	w.Good(t)
	for _, c := range []struct {
		name, run string
		least     int64 // bytes of the log
		largest   int64
		says      string
	}{
		{"flood", "yes 0123456789012345678901234567890123456789 | head -c 1073741824", 1 << 20, 1<<20 + 1000, "limits.log in the policy"},
		{"line", "head -c 104857600 /dev/zero | tr '\\0' a", 100 << 20, 100<<20 + 1000, "aaaa"},
	} {
		t.Run(c.name, func(t *testing.T) {
			before, begun := memoryPeak(t, a), time.Now()
			id := w.Submit(t, w.Workflow(t, c.name, "      - run: "+c.run+"\n      - run: echo after it\n"))
			r := w.Result(t, id, 2*time.Minute)
			if r.Conclusion != providers.Success {
				t.Errorf("%s (%s), want success", r.Conclusion, r.Reason)
			}
			grown := memoryPeak(t, a) - before
			t.Logf("%v, the agent grew by %d KiB to %d KiB", time.Since(begun).Round(time.Millisecond), grown>>10, (before+grown)>>10)
			if grown > most {
				t.Errorf("the agent grew by %d MiB, want at most %d", grown>>20, most>>20)
			}
			info, err := os.Stat(filepath.Join(w.Spool, "done", id, "log"))
			agenttest.Must(t, err)
			if info.Size() < c.least || info.Size() > c.largest {
				t.Errorf("the log has %d bytes, want %d to %d", info.Size(), c.least, c.largest)
			}
			if !strings.Contains(w.Log(t, id), c.says) {
				t.Errorf("the log does not have %q", c.says)
			}
			w.Good(t)
		})
	}
	a.Stop(t)
	owesNothing(t, w)
}
