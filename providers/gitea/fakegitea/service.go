package fakegitea

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

type number int64

func (n number) MarshalText() ([]byte, error) { return []byte(strconv.FormatInt(int64(n), 10)), nil }

func (n *number) UnmarshalJSON(b []byte) error {
	v, err := strconv.ParseInt(strings.Trim(string(b), `"`), 10, 64)
	*n = number(v)
	return err
}

type row struct {
	Time    time.Time `json:"time"`
	Content string    `json:"content"`
}

type state struct {
	ID        number    `json:"id"`
	Result    string    `json:"result,omitempty"`
	StartedAt time.Time `json:"startedAt,omitzero"`
	StoppedAt time.Time `json:"stoppedAt,omitzero"`
	Steps     []struct {
		ID        number    `json:"id"`
		Result    string    `json:"result"`
		StartedAt time.Time `json:"startedAt"`
		StoppedAt time.Time `json:"stoppedAt"`
		LogIndex  number    `json:"logIndex"`
		LogLength number    `json:"logLength"`
	} `json:"steps,omitempty"`
}

// ServeHTTP is the whole API. One call at a time is what SQLite gives too.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	method := r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]
	known := map[string]func(*Runner, []byte) (any, *remote){
		"/api/actions/runner.v1.RunnerService/Register":   s.register,
		"/api/actions/runner.v1.RunnerService/Declare":    s.declare,
		"/api/actions/runner.v1.RunnerService/FetchTask":  s.fetchTask,
		"/api/actions/runner.v1.RunnerService/UpdateTask": s.updateTask,
		"/api/actions/runner.v1.RunnerService/UpdateLog":  s.updateLog,
		"/api/actions/ping.v1.PingService/Ping":           s.ping,
	}
	body, err := io.ReadAll(r.Body)
	s.mu.Lock()
	s.calls[method]++
	handle := known[r.URL.Path]
	if handle == nil || r.Method != http.MethodPost || err != nil {
		s.violation("%s %s: no such path (%v)", r.Method, r.URL.Path, err)
		s.mu.Unlock()
		http.NotFound(w, r)
		return
	}
	if r.Header.Get("Content-Type") != "application/json" || r.Header.Get("Connect-Protocol-Version") != "1" || !strings.HasPrefix(r.UserAgent(), "mayfly/") {
		s.violation("%s: headers %v", method, r.Header)
	}
	fault := s.fault(method)
	if fault.before() {
		s.mu.Unlock()
		s.fail(w, r, fault, nil)
		return
	}
	answer, refused := s.answer(method, handle, r.Header, body)
	s.mu.Unlock()
	if refused != nil {
		refused.write(w)
		return
	}
	b, err := json.Marshal(answer)
	if err != nil {
		unknown(err.Error()).write(w)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if fault != (Fault{}) {
		s.fail(w, r, fault, b)
		return
	}
	_, _ = w.Write(b) // the other end sees that it is cut off
}

func (s *Server) answer(method string, handle func(*Runner, []byte) (any, *remote), h http.Header, body []byte) (any, *remote) {
	var who *Runner
	if method != "Register" && method != "Ping" {
		who = s.runner(h.Get("X-Runner-Uuid"))
		if who == nil || who.token != h.Get("X-Runner-Token") {
			return nil, grpc("Unauthenticated", "unregistered runner")
		}
	}
	return handle(who, body)
}

// read decodes a message and complains about fields that it does not know.
func (s *Server) read(body []byte, into any) {
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		s.violation("%T: %v in %.200q", into, err, body)
	}
}

func (s *Server) ping(_ *Runner, body []byte) (any, *remote) {
	var in struct {
		Data string `json:"data"`
	}
	s.read(body, &in)
	return map[string]string{"data": "Hello, " + in.Data + "!"}, nil
}

func (s *Server) register(_ *Runner, body []byte) (any, *remote) {
	var in struct {
		Name         string   `json:"name"`
		Token        string   `json:"token"`
		Version      string   `json:"version"`
		Labels       []string `json:"labels"`
		Ephemeral    bool     `json:"ephemeral"`
		Capabilities []string `json:"capabilities"`
	}
	s.read(body, &in)
	if in.Token == "" || in.Name == "" {
		return nil, unknown("missing runner token, name")
	}
	if in.Token != RegistrationToken && in.Token != RegistrationToken+"-new" {
		return nil, unknown("runner registration token not found")
	}
	n := len(s.runners) + 1
	r := &Runner{
		UUID: fmt.Sprintf("00000000-0000-4000-8000-%012d", n), token: fmt.Sprintf("%040x", 0xabc000+n), Name: in.Name, Version: in.Version,
		Labels: in.Labels, Ephemeral: in.Ephemeral, Cancelling: slices.Contains(in.Capabilities, "cancelling"),
	}
	s.runners = append(s.runners, r)
	return map[string]any{"runner": map[string]any{
		"id": number(n), "uuid": r.UUID, "token": r.token, "name": r.Name, "version": r.Version, "labels": r.Labels, "ephemeral": r.Ephemeral,
	}}, nil
}

func (s *Server) declare(who *Runner, body []byte) (any, *remote) {
	var in struct {
		Version      string   `json:"version"`
		Labels       []string `json:"labels"`
		Capabilities []string `json:"capabilities"`
	}
	s.read(body, &in)
	who.Labels, who.Version, who.Cancelling = in.Labels, in.Version, slices.Contains(in.Capabilities, "cancelling")
	who.Declared++
	return map[string]any{"runner": map[string]any{"uuid": who.UUID, "name": who.Name, "version": who.Version, "labels": who.Labels}}, nil
}

func (s *Server) fetchTask(who *Runner, body []byte) (any, *remote) {
	var in struct {
		TasksVersion number `json:"tasksVersion"`
	}
	s.read(body, &in)
	answer := map[string]any{"tasksVersion": number(s.version)}
	if int64(in.TasksVersion) == s.version {
		return answer, nil
	}
	if who.Ephemeral {
		for _, t := range s.tasks {
			if t.runner != who.UUID {
				continue
			}
			if !done(t.Status) {
				return answer, nil
			}
			who.Deleted = true
			return nil, grpc("Internal", "pick task: runner has been removed")
		}
	}
	for _, t := range s.tasks {
		if t.Assigned || t.Status == Cancelled || slices.ContainsFunc(t.job.RunsOn, func(l string) bool { return !slices.Contains(who.Labels, l) }) {
			continue
		}
		t.Assigned, t.runner = true, who.UUID
		if t.Status == "waiting" {
			t.Status = "running"
		}
		answer["task"] = message(t)
		return answer, nil
	}
	return answer, nil
}

// An assigned is the message Task, in the order in which protobuf writes it.
type assigned struct {
	ID              number            `json:"id"`
	WorkflowPayload []byte            `json:"workflowPayload"`
	Context         map[string]any    `json:"context"`
	Secrets         map[string]string `json:"secrets"`
	Needs           map[string]Need   `json:"needs,omitempty"`
	Vars            map[string]string `json:"vars,omitempty"`
}

// Token is the token of a task.
func Token(id int64) string { return fmt.Sprintf("%040x", 0xdef000+id) }

// RuntimeToken is the other token of a task, which is not among its secrets.
func RuntimeToken(id int64) string { return fmt.Sprintf("runtime.token.%d", id) }

func message(t *Task) assigned {
	context := map[string]any{
		"actor": "mona", "api_url": "http://gitea.test/api/v1", "base_ref": "", "head_ref": "", "event": map[string]any{}, "event_name": "push",
		"job": "build", "ref": "refs/heads/main", "ref_name": "main", "ref_protected": false, "ref_type": "branch",
		"repository": "acme/app", "repository_owner": "acme", "repositoryUrl": "http://gitea.test/acme/app", "retention_days": "",
		"run_attempt": "1", "run_id": strconv.FormatInt(t.ID, 10), "run_number": "1", "secret_source": "Actions", "server_url": "http://gitea.test/",
		"sha": strings.Repeat("ab", 20), "triggering_actor": "mona", "workflow": "ci.yml", "workspace": "",
		"gitea_default_actions_url": "https://github.com", "token": Token(t.ID), "gitea_runtime_token": RuntimeToken(t.ID),
	}
	maps.Copy(context, t.job.Context)
	secrets := map[string]string{"GITHUB_TOKEN": Token(t.ID), "GITEA_TOKEN": Token(t.ID)}
	maps.Copy(secrets, t.job.Secrets)
	return assigned{number(t.ID), []byte(t.job.Workflow), context, secrets, t.job.Needs, t.job.Vars}
}

// task is the task of a request, if it is the runner's.
func (s *Server) task(who *Runner, id number, doing string) (*Task, *remote) {
	if id < 1 || int(id) > len(s.tasks) || s.tasks[id-1].runner == "deleted" {
		return nil, grpc("Internal", "%s: resource does not exist", doing)
	}
	t := s.tasks[id-1]
	if t.runner != who.UUID {
		return nil, grpc("Internal", "%s: invalid runner for task", doing)
	}
	return t, nil
}

func (s *Server) updateTask(who *Runner, body []byte) (any, *remote) {
	var in struct {
		State   state             `json:"state"`
		Outputs map[string]string `json:"outputs"`
	}
	s.read(body, &in)
	t, refused := s.task(who, in.State.ID, "update task")
	if refused != nil {
		return nil, refused
	}
	if in.State.Result == "" {
		t.Beats++
	}
	s.apply(t, in.State)
	if done(t.Status) && who.Ephemeral {
		who.Deleted = true
	}
	for k, v := range in.Outputs {
		if len(k) > 255 || len(v) > 1<<20 {
			s.violation("output %.20q of %d bytes: it is dropped without a word", k, len(v))
			continue
		}
		if s.dropOutput > 0 {
			s.dropOutput--
		} else if _, ok := t.Outputs[k]; !ok {
			t.Outputs[k] = v
		}
	}
	result := t.Status
	switch result {
	case "cancelling":
		result = Cancelled
	case "running", "waiting":
		result = ""
	}
	return map[string]any{
		"state": map[string]any{"id": in.State.ID, "result": orUnspecified(result)}, "sentOutputs": slices.Sorted(maps.Keys(t.Outputs)),
	}, nil
}

func orUnspecified(result string) string {
	if result == "" {
		return "RESULT_UNSPECIFIED"
	}
	return result
}

// apply is UpdateTaskByState. Zero values change nothing (xorm leaves them out),
// and a step of which the state says nothing runs if it ever did.
func (s *Server) apply(t *Task, in state) {
	if done(t.Status) {
		if in.Result != "" {
			t.Ignored++
		}
		return
	}
	if in.Result != "" {
		t.Finals++
		t.RowsAtEnd, t.SealedAtEnd = len(t.Rows), t.Sealed
		if t.Status == "cancelling" {
			in.Result = Cancelled
		}
		t.Status = in.Result
	}
	told := map[int]bool{}
	for _, st := range in.Steps {
		if int(st.ID) >= len(t.Steps) {
			s.violation("state of step %d, the task has %d", st.ID, len(t.Steps))
			continue
		}
		told[int(st.ID)] = true
		step := &t.Steps[st.ID]
		step.LogIndex, step.LogLength = orOld(int64(st.LogIndex), step.LogIndex), orOld(int64(st.LogLength), step.LogLength)
		if !st.StartedAt.IsZero() {
			step.Started = st.StartedAt
		}
		if !st.StoppedAt.IsZero() {
			step.Stopped = st.StoppedAt
		}
		if st.Result != "" {
			step.Status = st.Result
		} else if !step.Started.IsZero() {
			if done(step.Status) {
				s.violation("step %d was %s and runs again", st.ID, step.Status)
			}
			step.Status = "running"
		}
	}
	for i := range t.Steps {
		if !told[i] && !t.Steps[i].Started.IsZero() {
			t.Steps[i].Status = "running"
		}
	}
}

func orOld(v, old int64) int64 {
	if v == 0 {
		return old
	}
	return v
}

func (s *Server) updateLog(who *Runner, body []byte) (any, *remote) {
	var in struct {
		TaskID number `json:"taskId"`
		Index  number `json:"index"`
		Rows   []row  `json:"rows"`
		NoMore bool   `json:"noMore"`
	}
	s.read(body, &in)
	t, refused := s.task(who, in.TaskID, "get task")
	if refused != nil {
		return nil, refused
	}
	for _, r := range in.Rows {
		if strings.Contains(r.Content, "\n") || len(r.Content) > 64<<10 || !utf8.ValidString(r.Content) || r.Time.IsZero() {
			s.violation("row of %d bytes at %v: newline, too long, no UTF-8 or no time", len(r.Content), r.Time)
		}
	}
	ack := len(t.Rows)
	var rows []row
	if int(in.Index) <= ack && len(in.Rows)+int(in.Index) > ack {
		rows = in.Rows[ack-int(in.Index):]
	}
	if t.Sealed && len(rows) > 0 {
		return nil, grpc("AlreadyExists", "log file has been archived")
	}
	if t.Sealed || len(rows) == 0 && (!in.NoMore || int(in.Index) > ack) {
		return map[string]any{"ackIndex": number(ack)}, nil
	}
	for _, r := range rows {
		t.Rows = append(t.Rows, r.Content)
		t.Times = append(t.Times, r.Time)
	}
	t.Sealed = in.NoMore
	return map[string]any{"ackIndex": number(len(t.Rows))}, nil
}
