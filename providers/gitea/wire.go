package gitea

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// The messages of runner.v1 in the JSON that the Connect protocol gives them
// (code.gitea.io/actions-proto-go, runner/v1/messages.proto; protobuf's JSON
// mapping): names in lowerCamelCase, 64-bit integers as strings, bytes in
// base64, absent what is zero.

type registerRequest struct {
	Name         string   `json:"name"`
	Token        string   `json:"token"`
	Version      string   `json:"version,omitempty"`
	Labels       []string `json:"labels,omitempty"`
	Ephemeral    bool     `json:"ephemeral,omitempty"`
	Capabilities []string `json:"capabilities,omitempty"` // since Gitea 1.27
}

type declareRequest struct {
	Version      string   `json:"version,omitempty"`
	Labels       []string `json:"labels,omitempty"`
	Capabilities []string `json:"capabilities,omitempty"`
}

// A runnerResponse answers Register and Declare.
type runnerResponse struct {
	Runner struct {
		UUID  string `json:"uuid"`
		Token string `json:"token"`
		Name  string `json:"name"`
	} `json:"runner"`
}

type fetchRequest struct {
	TasksVersion integer `json:"tasksVersion,omitempty"`
}

type fetchResponse struct {
	Task         *task   `json:"task"`
	TasksVersion integer `json:"tasksVersion"`
}

type task struct {
	ID              integer           `json:"id"`
	WorkflowPayload []byte            `json:"workflowPayload"`
	Context         map[string]any    `json:"context"`
	Secrets         map[string]string `json:"secrets"`
	Needs           map[string]need   `json:"needs"`
	Vars            map[string]string `json:"vars"`
}

type need struct {
	Outputs map[string]string `json:"outputs"`
	Result  result            `json:"result"`
}

type updateTaskRequest struct {
	State   taskState         `json:"state"`
	Outputs map[string]string `json:"outputs,omitempty"`
}

type updateTaskResponse struct {
	State       taskState `json:"state"`
	SentOutputs []string  `json:"sentOutputs"`
}

type taskState struct {
	ID        integer     `json:"id"`
	Result    result      `json:"result,omitempty"`
	StartedAt time.Time   `json:"startedAt,omitzero"`
	StoppedAt time.Time   `json:"stoppedAt,omitzero"`
	Steps     []stepState `json:"steps,omitempty"`
}

// A stepState is shown as a range of rows of the one log that a task has.
type stepState struct {
	ID        integer   `json:"id"` // index among the job's steps
	Result    result    `json:"result,omitempty"`
	StartedAt time.Time `json:"startedAt,omitzero"`
	StoppedAt time.Time `json:"stoppedAt,omitzero"`
	LogIndex  integer   `json:"logIndex,omitempty"`
	LogLength integer   `json:"logLength,omitempty"`
}

type updateLogRequest struct {
	TaskID integer  `json:"taskId"`
	Index  integer  `json:"index,omitempty"` // of the first row, in the whole log
	Rows   []logRow `json:"rows,omitempty"`
	NoMore bool     `json:"noMore,omitempty"`
}

type updateLogResponse struct {
	AckIndex integer `json:"ackIndex"` // rows that the server has
}

type logRow struct {
	Time    time.Time `json:"time"`
	Content string    `json:"content,omitempty"`
}

type pingRequest struct {
	Data string `json:"data"`
}

type pingResponse struct {
	Data string `json:"data"`
}

// An integer is a 64-bit number, which protobuf writes as a string and reads
// in both forms.
type integer int64

// MarshalText implements encoding.TextMarshaler.
func (i integer) MarshalText() ([]byte, error) { return strconv.AppendInt(nil, int64(i), 10), nil }

// UnmarshalJSON implements json.Unmarshaler.
func (i *integer) UnmarshalJSON(b []byte) error {
	n, err := strconv.ParseInt(strings.Trim(string(b), `"`), 10, 64)
	if err != nil && string(b) != "null" {
		return fmt.Errorf("%.40q is not a number", b)
	}
	*i = integer(n)
	return nil
}

// A result is how a task, a job or a step ended; "" stands for unspecified.
type result string

const (
	resultSuccess   result = "RESULT_SUCCESS"
	resultFailure   result = "RESULT_FAILURE"
	resultCancelled result = "RESULT_CANCELLED"
	resultSkipped   result = "RESULT_SKIPPED"

	resultUnspecified = "RESULT_UNSPECIFIED"
)

// UnmarshalJSON implements json.Unmarshaler: enums are names, and numbers if the
// sender knows a name that we do not.
func (r *result) UnmarshalJSON(b []byte) error {
	var s string
	if json.Unmarshal(b, &s) != nil {
		s = string(b) // a number: decided somehow
	}
	if s == resultUnspecified || s == "0" || s == "null" {
		s = ""
	}
	*r = result(s)
	return nil
}
