package configs

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/runner/policy"
)

func parse(t *testing.T, more string) (*Config, error) {
	t.Helper()
	return Parse([]byte("version: 1\npolicy: p.yaml\nproviders: {local: }\n"+more), "agent.yaml")
}

// What the example has as comments that begin without a space can be taken as
// it is.
func TestExampleComments(t *testing.T) {
	t.Parallel()
	src, err := os.ReadFile("agent.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	inside := false
	for line := range strings.Lines(string(src)) {
		switch text, comment := strings.CutPrefix(line, "#"); {
		case comment && text[0] >= 'a' && text[0] <= 'z':
			inside, line = true, text
		case comment && inside:
			line = text
		default:
			inside = false
		}
		lines = append(lines, line)
	}
	c, err := Parse([]byte(strings.Join(lines, "")), "agent.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if c.Quotas.Jobs != 2 || len(c.Quotas.Repositories) != 1 || c.Monitor != (Monitor{"tcp", "127.0.0.1:9464"}) {
		t.Errorf("got %+v and %+v", c.Quotas, c.Monitor)
	}
	if c.Warm.Boxes != 2 || c.Warm.Age != 10*time.Minute {
		t.Errorf("got %+v", c.Warm)
	}
	if c.GitCache != (GitCache{DefaultGitDir, 10 << 30, 720 * time.Hour, 15 * time.Minute}) {
		t.Errorf("got %+v", c.GitCache)
	}
}

// TestExamplesNamed: each example is one that the README shows, and each of its
// links leads to a file.
func TestExamplesNamed(t *testing.T) {
	t.Parallel()
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	linked := map[string]bool{}
	for _, m := range regexp.MustCompile(`\]\(([^):#]+)\)`).FindAllStringSubmatch(string(readme), -1) {
		linked[m[1]] = true
		if _, err := os.Stat(filepath.Join("..", m[1])); err != nil {
			t.Errorf("README.md: %v", err)
		}
	}
	examples, err := filepath.Glob("agent*.yaml")
	if err != nil || len(examples) < 6 {
		t.Fatalf("got %v, %v, want the examples", examples, err)
	}
	for _, file := range examples {
		if !linked["configs/"+file] {
			t.Errorf("%s: README.md does not name it", file)
		}
		c, err := Load(file)
		if err != nil {
			t.Errorf("Load: %v", err)
			continue
		}
		src, err := os.ReadFile(c.Policy)
		if err != nil {
			t.Errorf("%s: %v", file, err)
			continue
		}
		if _, err := policy.Parse(src, c.Policy); err != nil {
			t.Errorf("%s: %v", file, err)
		}
	}
}

func TestWarm(t *testing.T) {
	t.Parallel()
	c, err := parse(t, "warm: {boxes: 3, age: 1h}\n")
	if err != nil || c.Warm.Boxes != 3 || c.Warm.Age != time.Hour {
		t.Fatalf("got %+v, %v", c, err)
	}
	if err := c.Warm.Errorf("bad"); err.Error() != "agent.yaml:4:15: bad" {
		t.Errorf("got %v, want the place of the number", err)
	}
	for _, more := range []string{"", "slots: 2\n"} {
		if c, err := parse(t, more); err != nil || c.Warm.Boxes != 0 {
			t.Errorf("%q: got %+v, %v, want none", more, c, err)
		}
	}
	_, err = parse(t, "warm: {boxes: 0, age: 1s, box: 3}\n")
	want := `agent.yaml:4:15: 0 is out of range: write 1 or more, or remove the key warm to have none
agent.yaml:4:23: 1s is out of range: 1m to 24h
agent.yaml:4:27: unknown key "box" (known: boxes, age)`
	if err == nil || err.Error() != want {
		t.Errorf("got\n%v\nwant\n%s", err, want)
	}
	if _, err := parse(t, "warm: {age: 1h}\n"); err == nil {
		t.Error("without a number: got nil")
	}
}

func TestQuotas(t *testing.T) {
	t.Parallel()
	c, err := parse(t, `quotas:
  jobs: 2
  waiting: 3
  patience: 30m
  repositories: [{match: "acme/*", jobs: 4}, {match: "x/y"}]
`)
	if err != nil {
		t.Fatal(err)
	}
	q := c.Quotas
	if q.Jobs != 2 || q.Waiting != 3 || q.Patience != 30*time.Minute || len(q.Repositories) != 2 ||
		q.Repositories[0].Match != "acme/*" || q.Repositories[0].Jobs != 4 || q.Repositories[1].Jobs != 0 {
		t.Errorf("got %+v", q)
	}
	if err := q.Repositories[1].Errorf("bad"); err.Error() != "agent.yaml:8:54: bad" {
		t.Errorf("got %v, want the place of the pattern", err)
	}
	for _, more := range []string{"", "quotas:\n"} {
		if c, err := parse(t, more); err != nil || !reflect.DeepEqual(c.Quotas, Quotas{}) {
			t.Errorf("%q: got %+v, %v, want no quotas", more, c, err)
		}
	}
	_, err = parse(t, "quotas: {jobs: 0, waiting: -1, patience: 0s, repositories: [{jobs: 0}], job: 3}\n")
	want := `agent.yaml:4:16: 0 is out of range: write 1 or more, or remove the key to have no limit
agent.yaml:4:28: -1 is out of range: write 1 or more, or remove the key for the default
agent.yaml:4:42: 0s is out of range: write more than 0s, or remove the key for the default
agent.yaml:4:61: key "match" is missing
agent.yaml:4:68: 0 is out of range: write 1 or more, or remove the key to have no limit
agent.yaml:4:73: unknown key "job" (known: jobs, waiting, patience, repositories)`
	if err == nil || err.Error() != want {
		t.Errorf("got\n%v\nwant\n%s", err, want)
	}
}

func TestMonitor(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ more, network, address, err string }{
		{"", "", "", ""},
		{"monitor: {listen: \"127.0.0.1:9464\"}", "tcp", "127.0.0.1:9464", ""},
		{"monitor: {listen: \"[::1]:9464\"}", "tcp", "[::1]:9464", ""},
		{"monitor: {listen: /run/mayfly/monitor.sock}", "unix", "/run/mayfly/monitor.sock", ""},
		{"monitor: {listen: \"0.0.0.0:9464\", expose: true}", "tcp", "0.0.0.0:9464", ""},
		{"monitor: {listen: \"0.0.0.0:9464\"}", "", "", "4:19: 0.0.0.0:9464 can be reached from other machines"},
		{"monitor: {listen: \"[::]:9464\", expose: false}", "", "", "4:19: [::]:9464 can be reached from other machines"},
		{"monitor: {listen: \"10.0.0.1:9464\"}", "", "", "write 127.0.0.1:9464, or expose: true"},
		{"monitor: {listen: \":9464\"}", "", "", "want an address and a port"},
		{"monitor: {listen: \"localhost:9464\"}", "", "", "want an address and a port"},
		{"monitor: {listen: \"127.0.0.1:0\"}", "", "", "want an address and a port"},
		{"monitor: {listen: monitor.sock}", "", "", "or the absolute path of a socket"},
		{"monitor: {expose: true}", "", "", `key "listen" is missing`},
		{"monitor: {listen: \"127.0.0.1:9464\", tls: true}", "", "", `unknown key "tls"`},
	} {
		got, err := parse(t, c.more+"\n")
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%s: got %v, want %s", c.more, err, c.err)
			}
			continue
		}
		if err != nil || got.Monitor != (Monitor{c.network, c.address}) {
			t.Errorf("%s: got %+v, %v", c.more, got, err)
			continue
		}
		if a, ok := got.Monitor.AddrPort(); ok != (c.network == "tcp") || ok && a.String() != c.address {
			t.Errorf("%s: AddrPort: got %v, %v", c.more, a, ok)
		}
	}
}

// unit reads a systemd unit: the values of each key of the section Service.
func unit(t *testing.T) map[string][]string {
	t.Helper()
	b, err := os.ReadFile("mayfly.service")
	if err != nil {
		t.Fatal(err)
	}
	keys, section := map[string][]string{}, ""
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSpace(line)
		key, value, ok := strings.Cut(line, "=")
		switch {
		case strings.HasPrefix(line, "["):
			section = line
		case ok && section == "[Service]" && !strings.HasPrefix(line, "#"):
			keys[key] = append(keys[key], value)
		}
	}
	return keys
}

func TestUnit(t *testing.T) {
	t.Parallel()
	keys := unit(t)
	for key, want := range map[string]string{
		"Type": "notify", "Delegate": "yes", "OOMPolicy": "continue", "LimitCORE": "0", "NoNewPrivileges": "yes",
		"KillMode":   "mixed", // SIGTERM to the agent alone: it drains
		"ExecReload": "/bin/kill -HUP $MAINPID", "Restart": "on-failure",
		"StateDirectory": filepath.Base(DefaultState),
	} {
		if got := keys[key]; len(got) != 1 || got[0] != want {
			t.Errorf("%s: got %q, want %s", key, got, want)
		}
	}
	// A Go program that crashed, or was aborted by the watchdog, exits with 2.
	if prevented := keys["RestartPreventExitStatus"]; prevented != nil {
		t.Errorf("RestartPreventExitStatus: got %q, want an agent that crashed to start again", prevented)
	}
	if signals := slices.Concat(keys["KillSignal"], keys["SendSIGHUP"]); len(signals) != 0 {
		t.Errorf("got %q, want the signals that the agent knows", signals)
	}
	// Each of these was seen to keep boxes from working, or does so by its
	// description: devices, a /proc that is not whole, control groups, and
	// filters that the boxes inherit.
	for _, key := range []string{
		"PrivateDevices", "ProtectClock", "DeviceAllow", "DevicePolicy", "ProtectProc", "ProcSubset", "ProtectKernelTunables",
		"ProtectKernelLogs", "ProtectControlGroups", "RestrictNamespaces", "RestrictSUIDSGID", "MemoryDenyWriteExecute",
		"ProtectHostname", "SystemCallFilter", "PrivateUsers", "PrivateNetwork", "DynamicUser",
	} {
		if got := keys[key]; got != nil {
			t.Errorf("%s=%s: boxes do not work with it", key, got)
		}
	}
	c, err := Load("agent.yaml")
	if err != nil {
		t.Fatal(err)
	}
	stop, err := time.ParseDuration(strings.Replace(strings.Join(keys["TimeoutStopSec"], ""), "min", "m", 1))
	if err != nil || stop < c.Drain+3*time.Minute {
		t.Errorf("TimeoutStopSec: got %v, %v, want longer than the drain of agent.yaml (%v) and the release", stop, err, c.Drain)
	}
}

// systemd itself finds nothing to say about the unit, and would.
func TestUnitIsUnderstood(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile("mayfly.service")
	if err != nil {
		t.Fatal(err)
	}
	good := b
	for _, program := range []string{"/usr/local/bin/mayfly", "/bin/kill"} { // need not be installed
		good = bytes.ReplaceAll(good, []byte(program), []byte("/bin/true"))
	}
	for name, text := range map[string][]byte{
		"good.service": good,
		"typo.service": bytes.Replace(good, []byte("Delegate="), []byte("Delgate="), 1),
		"word.service": bytes.Replace(good, []byte("KillMode=mixed"), []byte("KillMode=gently"), 1),
	} {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.CommandContext(t.Context(), "systemd-analyze", "verify", "--man=no", path).CombinedOutput()
		if said := err != nil || len(out) > 0; said != (name != "good.service") {
			t.Errorf("%s: got %v %s", name, err, out)
		}
	}
}
