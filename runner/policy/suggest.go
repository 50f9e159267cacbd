package policy

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// A Use is something that a job reached, or tried to: what the record has of one
// line of the ledger.
type Use struct {
	Name       string
	Port       uint16
	Protocol   egress.Protocol // "" if it is not known
	Verdict    egress.Verdict
	Reason     string // why not
	Rule       string // that allowed it
	Step       string // that ran then
	Service    string // that it was, "" for the job
	Dialled    string // address and port, if anything was
	Executable string
	Method     string // of a request
	Path       string // its pattern
	WebSocket  bool
}

// What a suggestion has at most: more is no list that a person reads.
const (
	mostPaths = 40
	mostUses  = 100
)

// A way is what a job did with one port of a name.
type way struct {
	service, name string
	port          uint16
}

// seen is what is known of a way.
type seen struct {
	protocol  egress.Protocol
	steps     map[string]bool
	why       map[string]bool
	programs  map[string]bool
	resolve   map[string]bool            // what was dialled and is not public
	requests  map[string]map[string]bool // methods by path
	websocket map[string]bool            // by path
}

func newSeen() *seen {
	return &seen{
		steps: map[string]bool{}, why: map[string]bool{}, programs: map[string]bool{}, resolve: map[string]bool{},
		requests: map[string]map[string]bool{}, websocket: map[string]bool{},
	}
}

// Suggest writes a policy that lets a job do what it did, and what it was refused,
// for a person to read and to cut down. It is minimal: exact names, the steps that
// used them, the methods and paths that were asked for. Facts of the job in a path
// become variables. The text is a policy that Parse accepts.
func Suggest(j providers.Job, uses []Use) (string, error) {
	ways := map[way]*seen{}
	asked := map[way]*seen{}
	for _, u := range uses {
		if u.Port == 0 && u.Verdict != egress.Refused || u.Name == "" || u.Verdict == egress.Ended && !u.WebSocket {
			continue
		}
		into := ways
		if u.Port == 0 {
			into = asked // a question does not say what for
		}
		k := way{u.Service, u.Name, u.Port}
		if into[k] == nil {
			into[k] = newSeen()
		}
		into[k].add(j, u)
	}
	for k, s := range asked {
		known := slices.ContainsFunc(slices.Collect(maps.Keys(ways)), func(w way) bool { return w.service == k.service && w.name == k.name })
		if k.port = 443; !known {
			s.why["only asked for: the port is a guess"] = true
			ways[k] = s
		}
	}
	text := head(j)
	entries := 0
	for _, k := range slices.SortedFunc(maps.Keys(ways), compareWays) {
		entry := ways[k].entry(k)
		if _, err := Parse([]byte(head(j)+entry), "suggestion"); err != nil || entries == mostUses {
			text += comment(fmt.Sprintf("%s port %d: left out, no rule can say it, or there are too many", k.name, k.port))
			continue
		}
		text += entry
		entries++
	}
	if entries == 0 {
		text = strings.Replace(text, "    egress:\n", "", 1) + comment("the record has no attempt of this job to reach anything: it needs no egress")
	}
	if _, err := Parse([]byte(text), "suggestion"); err != nil {
		return "", fmt.Errorf("suggestion: %w", err)
	}
	return text, nil
}

func compareWays(a, b way) int {
	return cmp.Or(cmp.Compare(a.service, b.service), cmp.Compare(a.name, b.name), cmp.Compare(a.port, b.port))
}

// head is the rule without its egress. Facts that are no patterns are left out.
func head(j providers.Job) string {
	text := "version: 1\nrules:\n  - name: suggested\n    match:\n"
	for _, f := range []struct{ key, value string }{
		{"provider", j.Subject.Provider},
		{"repository", j.Subject.Repository},
		{"ref", j.Subject.Ref},
		{"event", j.Subject.Event},
		{"workflow", j.Subject.Workflow},
	} {
		var g glob
		if f.value != "" && !strings.Contains(f.value, "*") && g.UnmarshalText([]byte(f.value)) == nil {
			text += fmt.Sprintf("      %s: %s\n", f.key, strconv.QuoteToASCII(f.value))
		}
	}
	return text + fmt.Sprintf("      trust: %s\n    egress:\n", j.Trust)
}

// add takes one use.
func (s *seen) add(j providers.Job, u Use) {
	if s.protocol = cmp.Or(u.Protocol, s.protocol); u.Verdict == egress.Ended {
		s.websocket[template(j, u)] = true
		return
	}
	if a, err := netip.ParseAddrPort(u.Dialled); err == nil && (a.Addr().IsPrivate() || a.Addr().IsLoopback()) {
		s.resolve[a.Addr().String()] = true
	}
	s.steps[u.Step] = true
	switch u.Verdict {
	case egress.Allowed:
		s.why["allowed by "+u.Rule] = true
	case egress.Learned:
		s.why["learned"] = true
	default:
		s.why[string(u.Verdict)+": "+u.Reason] = true
	}
	if u.Executable != "" {
		s.programs[u.Executable] = true
	}
	if (egress.Request{Methods: []string{u.Method}, Path: "/"}).Check() != nil {
		return // there was no request, or one that no rule can allow
	}
	path := template(j, u)
	if s.requests[path] == nil {
		s.requests[path] = map[string]bool{}
	}
	s.requests[path][u.Method] = true
}

// entry is the rule of one way.
func (s *seen) entry(k way) string {
	text := ""
	for _, why := range slices.Sorted(maps.Keys(s.why))[:min(3, len(s.why))] {
		text += comment(why)
	}
	protocol := cmp.Or(s.protocol, map[uint16]egress.Protocol{80: egress.HTTP, 443: egress.TLS}[k.port], egress.TCP)
	text += fmt.Sprintf("      - name: %s\n        port: %d\n        protocol: %s\n", strconv.QuoteToASCII(k.name), k.port, protocol)
	if len(s.resolve) > 0 {
		text += fmt.Sprintf("        resolve: [%s]\n", strings.Join(slices.Sorted(maps.Keys(s.resolve)), ", "))
	}
	if step := s.step(); step != "" && k.service == "" {
		text += fmt.Sprintf("        step: %s\n", step)
	}
	if k.service != "" {
		text += fmt.Sprintf("        service: %s\n", strconv.QuoteToASCII(k.service))
	}
	purpose := "to be filled in"
	if len(s.programs) > 0 {
		purpose += "; used by " + strings.Join(slices.Sorted(maps.Keys(s.programs))[:min(3, len(s.programs))], ", ")
	}
	text += fmt.Sprintf("        purpose: %s\n", strconv.QuoteToASCII(purpose[:min(len(purpose), 180)]))
	if len(s.requests) == 0 || protocol != egress.HTTP && protocol != egress.HTTPS {
		return text
	}
	text += "        requests:\n"
	if len(s.requests) > mostPaths {
		return text + comment(fmt.Sprintf("  %d paths", len(s.requests))) + fmt.Sprintf("          - {methods: [%s], path: /**}\n", strings.Join(s.methods(), ", "))
	}
	for _, path := range slices.Sorted(maps.Keys(s.requests)) {
		web := ""
		if s.websocket[path] {
			web = ", websocket: true"
		}
		text += fmt.Sprintf("          - {methods: [%s], path: %s%s}\n",
			strings.Join(slices.Sorted(maps.Keys(s.requests[path])), ", "), strconv.QuoteToASCII(path), web)
	}
	return text
}

// methods are those of all paths.
func (s *seen) methods() []string {
	all := map[string]bool{}
	for _, methods := range s.requests {
		maps.Copy(all, methods)
	}
	return slices.Sorted(maps.Keys(all))
}

// step is the one step that used it, if it has an id that its author gave it.
func (s *seen) step() string {
	if len(s.steps) != 1 {
		return ""
	}
	for step := range s.steps {
		var id stepID
		if !strings.HasPrefix(step, "__") && id.UnmarshalText([]byte(step)) == nil {
			return step
		}
	}
	return ""
}

// template is the pattern of a request's path.
func template(j providers.Job, u Use) string {
	if (egress.Request{Methods: []string{"GET"}, Path: u.Path}).Check() != nil {
		return "/**" // no narrower pattern is the same to all servers
	}
	return variables(j, u.Path)
}

// variables puts the job's facts into a path where they stand as whole segments.
func variables(j providers.Job, path string) string {
	segments := strings.Split(path, "/")
	for _, name := range []string{"repository", "sha", "ref", "owner"} {
		value, err := safeFact(name, j)
		if err != nil || len(value) < 2 {
			continue
		}
		want := strings.Split(value, "/")
		for i := 0; i+len(want) <= len(segments); i++ {
			last := i + len(want) - 1
			rest, ok := strings.CutPrefix(segments[last], want[len(want)-1])
			if ok && (rest == "" || rest == ".git") && slices.Equal(segments[i:last], want[:len(want)-1]) {
				segments = slices.Replace(segments, i, last+1, "{"+name+"}"+rest)
			}
		}
	}
	return strings.Join(segments, "/")
}

// comment is a line that says something, whoever wrote what is in it.
func comment(text string) string {
	q := strconv.QuoteToASCII(text)
	return "      # " + q[1:min(len(q)-1, 200)] + "\n"
}
