package workflow

import (
	"strings"

	"github.com/mayfly-ci/mayfly/providers"
)

// A Need is how a job ended that another one waited for, as the service says.
type Need struct {
	Result  string // success, failure, cancelled or skipped, in any case
	Outputs map[string]string
}

// needs gives the needs context, and refuses a job that waits for one of which
// the service says nothing: its condition and its outputs would be guesses.
func (b *builder) needs(f Facts) map[string]any {
	known := map[string]bool{}
	needs := map[string]any{}
	for id, n := range f.Needs {
		outputs := map[string]any{}
		for k, v := range n.Outputs {
			outputs[k] = v
		}
		needs[id] = map[string]any{"result": strings.ToLower(n.Result), "outputs": outputs}
		known[strings.ToLower(id)] = true
	}
	for _, id := range b.job.Needs {
		switch {
		case f.Needs == nil:
			b.add(id.Pos, `"needs" is not supported here: jobs of this provider do not wait for others`)
			return needs
		case !known[strings.ToLower(id.Value)]:
			b.add(id.Pos, "needs: the service does not say how %q ended", id.Value)
		}
	}
	return needs
}

// JobCondition evaluates the "if" of a job as Condition does. The status
// functions tell how the jobs ended that it waited for, which is what the
// context needs says: success() is true if all of them succeeded, failure() if
// one failed, cancelled() if one was cancelled and none failed. If one was
// skipped and nothing worse happened, none of the three is true, so that a job
// is skipped with what it waits for, as on GitHub.
func JobCondition(expr string, contexts map[string]any) (bool, error) {
	return Condition(expr, Scope{Contexts: contexts, Status: needsStatus(contexts["needs"])})
}

func needsStatus(needs any) providers.Conclusion {
	ids, _ := needs.(map[string]any)
	worst := providers.Success
	rank := map[providers.Conclusion]int{providers.Success: 0, providers.Skipped: 1, providers.Cancelled: 2, providers.Failure: 3}
	for _, n := range ids {
		need, _ := n.(map[string]any)
		result, _ := need["result"].(string)
		got := providers.Conclusion(result)
		if _, known := rank[got]; !known {
			got = providers.Failure
		}
		if rank[got] > rank[worst] {
			worst = got
		}
	}
	return worst
}
