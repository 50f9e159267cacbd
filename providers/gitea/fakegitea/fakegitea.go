// Package fakegitea is the runner's side of a Gitea, for tests: it assigns tasks,
// takes logs and states, and fails as it is told to. What it answers is what
// routers/api/actions/runner and models/actions of code.gitea.io/gitea 1.27.3
// answer, their errors included, which Connect wraps as "unknown". Unlike them
// it complains about what it does not know: see Violations.
//
// It keeps its state when it is taken down and up again.
package fakegitea

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"
)

// RegistrationToken is what a runner registers with.
const RegistrationToken = "registration-token-of-the-fake"

// Results, as protobuf names them.
const (
	Success   = "RESULT_SUCCESS"
	Failure   = "RESULT_FAILURE"
	Cancelled = "RESULT_CANCELLED"
	Skipped   = "RESULT_SKIPPED"
)

// A Job is what a task is made of.
type Job struct {
	Workflow string // YAML with one job
	Steps    int    // how many that has: Gitea reads it, the fake is told
	RunsOn   []string
	Context  map[string]any // replaces keys of the default one
	Secrets  map[string]string
	Vars     map[string]string
	Needs    map[string]Need
}

// A Need is how a needed job ended.
type Need struct {
	Result  string            `json:"result"`
	Outputs map[string]string `json:"outputs,omitempty"`
}

// A Step is the state of a step, as Gitea shows it.
type Step struct {
	Status           string // waiting, running or a result
	Started, Stopped time.Time
	LogIndex         int64
	LogLength        int64
}

// A Task is what became of a job.
type Task struct {
	ID       int64
	Assigned bool
	Status   string // waiting, running, cancelling or a result
	Finals   int    // final states that took effect
	Ignored  int    // final states that came later
	Beats    int    // UpdateTask without a result
	Steps    []Step
	Rows     []string
	Times    []time.Time
	Sealed   bool
	// RowsAtEnd is how many rows the log had, and SealedAtEnd whether it was
	// sealed, when the final state came.
	RowsAtEnd   int
	SealedAtEnd bool
	Outputs     map[string]string

	job    Job
	runner string
}

// A Runner is what registered.
type Runner struct {
	UUID, Name, Version string
	Labels              []string
	Ephemeral           bool
	Cancelling          bool // it declared the capability
	Declared            int
	Deleted             bool

	token string
}

// A Server is one instance. Make one with New.
type Server struct {
	mu         sync.Mutex
	addr       string
	http       *http.Server
	served     sync.WaitGroup
	runners    []*Runner
	tasks      []*Task
	version    int64
	calls      map[string]int
	faults     map[string][]Fault
	violations []string
	released   chan struct{} // closed by Close: hangs end
	dropOutput int           // how many outputs are not stored, at first
}

// New starts an instance on a loopback address.
func New() (*Server, error) {
	s := &Server{
		version: 1, calls: map[string]int{}, faults: map[string][]Fault{}, released: make(chan struct{}),
	}
	return s, s.listen("127.0.0.1:0")
}

func (s *Server) listen(addr string) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return fmt.Errorf("fake gitea: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.addr = l.Addr().String()
	server := &http.Server{Handler: s, ReadHeaderTimeout: time.Minute}
	s.http = server
	s.served.Go(func() { _ = server.Serve(l) }) // until it is closed
	return nil
}

// URL is the address of the instance.
func (s *Server) URL() string { return "http://" + s.addr }

// Down cuts all connections and answers nobody. The state stays.
func (s *Server) Down() error {
	s.mu.Lock()
	server := s.http
	s.mu.Unlock()
	err := server.Close()
	s.served.Wait()
	return err
}

// Up answers again, at the same address.
func (s *Server) Up() error { return s.listen(s.addr) }

// Close ends the instance.
func (s *Server) Close() error {
	s.mu.Lock()
	select {
	case <-s.released:
	default:
		close(s.released)
	}
	s.mu.Unlock()
	return s.Down()
}

// Submit queues a job and returns the number of its task.
func (s *Server) Submit(j Job) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version++
	t := &Task{ID: int64(len(s.tasks) + 1), Status: "waiting", job: j, Outputs: map[string]string{}, Steps: make([]Step, j.Steps)}
	for i := range t.Steps {
		t.Steps[i].Status = "waiting"
	}
	s.tasks = append(s.tasks, t)
	return t.ID
}

// AssignAgain gives a task out once more, as a restored backup would.
func (s *Server) AssignAgain(id int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version++
	s.tasks[id-1].Assigned = false
}

// Cancel asks for a task to be stopped, as StopTask does: a runner that knows
// the state "cancelling" reports the end itself.
func (s *Server) Cancel(id int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.tasks[id-1]
	if done(t.Status) {
		return
	}
	t.Status = Cancelled
	if r := s.runner(t.runner); r != nil && r.Cancelling {
		t.Status = "cancelling"
	}
}

// End ends a task as the server does with one that it has not heard of: the log
// is sealed.
func (s *Server) End(id int64, result string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tasks[id-1].Status, s.tasks[id-1].Sealed = result, true
}

// Delete removes a task, as the deletion of its repository does.
func (s *Server) Delete(id int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tasks[id-1].runner = "deleted"
}

// DeleteRunners removes all runners, as an administrator would.
func (s *Server) DeleteRunners() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.runners {
		r.Deleted = true
	}
}

// LoseRows forgets all rows of a log behind the first n, as an old backup does.
func (s *Server) LoseRows(id int64, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tasks[id-1].Rows = s.tasks[id-1].Rows[:n]
}

// DropOutputs makes the instance store no output the next n times, which it
// tells by not naming it.
func (s *Server) DropOutputs(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dropOutput = n
}

// Task returns what became of a task.
func (s *Server) Task(id int64) Task {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := *s.tasks[id-1]
	t.Steps, t.Rows, t.Times = slices.Clone(t.Steps), slices.Clone(t.Rows), slices.Clone(t.Times)
	outputs := map[string]string{}
	for k, v := range t.Outputs {
		outputs[k] = v
	}
	t.Outputs = outputs
	return t
}

// Runners returns all that ever registered.
func (s *Server) Runners() []Runner {
	s.mu.Lock()
	defer s.mu.Unlock()
	var rs []Runner
	for _, r := range s.runners {
		rs = append(rs, *r)
	}
	return rs
}

// Calls returns how often a method was called, such as "FetchTask".
func (s *Server) Calls(method string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls[method]
}

// Violations returns what a real instance would have passed over: unknown paths
// and fields, wrong headers, rows with newlines or beyond the limit, states that
// turn a step back.
func (s *Server) Violations() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, v := range s.violations {
		errs = append(errs, errors.New(v))
	}
	return errors.Join(errs...)
}

func (s *Server) violation(format string, args ...any) {
	s.violations = append(s.violations, fmt.Sprintf(format, args...))
}

func (s *Server) runner(uuid string) *Runner {
	for _, r := range s.runners {
		if r.UUID == uuid && !r.Deleted {
			return r
		}
	}
	return nil
}

func done(status string) bool {
	return status == Success || status == Failure || status == Cancelled || status == Skipped
}

// A remote is an error as the Connect protocol carries it.
type remote struct {
	HTTP    int    `json:"-"`
	Code    string `json:"code"`
	Message string `json:"message"`
}

// grpc is an error as Gitea's handlers make them: a gRPC status in a Connect
// error of the code unknown.
func grpc(code, format string, args ...any) *remote {
	return &remote{http.StatusInternalServerError, "unknown", fmt.Sprintf("rpc error: code = %s desc = ", code) + fmt.Sprintf(format, args...)}
}

func unknown(text string) *remote { return &remote{http.StatusInternalServerError, "unknown", text} }

func (e *remote) write(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(e.HTTP)
	_ = json.NewEncoder(w).Encode(e) // the other end sees that it is cut off
}
