package gitea

import (
	"bytes"
	"strconv"
	"testing"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/gitea/fakegitea"
	"github.com/mayfly-ci/mayfly/providers/providertest"
)

// shown is how Gitea shows what was written, by other code than the provider's.
func shown(b []byte) []byte {
	var out bytes.Buffer
	for _, r := range string(b) { // each byte that is none becomes U+FFFD
		out.WriteRune(r)
	}
	if n := out.Len(); n > 0 && out.Bytes()[n-1] != '\n' {
		out.WriteByte('\n')
	}
	return out.Bytes()
}

func conclusion(status string) providers.Conclusion {
	return map[string]providers.Conclusion{
		fakegitea.Success: providers.Success, fakegitea.Failure: providers.Failure,
		fakegitea.Cancelled: providers.Cancelled, fakegitea.Skipped: providers.Skipped,
	}[status]
}

func TestConformance(t *testing.T) {
	t.Parallel()
	for _, ephemeral := range []bool{false, true} {
		t.Run("ephemeral="+strconv.FormatBool(ephemeral), func(t *testing.T) {
			t.Parallel()
			providertest.Run(t, func(t *testing.T) providertest.Service { return service(t, ephemeral) })
		})
	}
}

func service(t *testing.T, ephemeral bool) providertest.Service {
	s := instance(t)
	return providertest.Service{
		Taking: true, Shown: shown, Words: map[providers.Conclusion]providers.Conclusion{providers.Lost: providers.Failure},
		New: func() (providers.Provider, error) {
			c := config(s)
			c.Ephemeral = ephemeral
			return New(c)
		},
		Submit: func(command string) (string, error) {
			j := simple(command)
			j.Steps = 2 // a clause tells of two
			return strconv.FormatInt(s.Submit(j), 10), nil
		},
		SubmitBad: func() (string, error) {
			return strconv.FormatInt(s.Submit(fakegitea.Job{Workflow: "on: push\njobs: {a: {runs-on: linux, steps: [{uses: 5}]}}", Steps: 1, RunsOn: []string{"linux"}}), 10), nil
		},
		Cancel: func(id string) error { s.Cancel(number(t, id)); return nil },
		Reports: func(id string) ([]providers.Result, error) {
			task := s.Task(number(t, id))
			var rs []providers.Result
			for range task.Finals {
				rs = append(rs, providers.Result{Conclusion: conclusion(task.Status), Outputs: task.Outputs})
			}
			return rs, nil
		},
		Log: func(id string) ([]byte, map[int]providers.StepState, error) {
			task := s.Task(number(t, id))
			states := map[int]providers.StepState{}
			for i, st := range task.Steps {
				states[i] = providers.StepState{Index: i, Started: st.Started, Ended: st.Stopped, Conclusion: conclusion(st.Status)}
			}
			return []byte(text(task.Rows)), states, nil
		},
	}
}
