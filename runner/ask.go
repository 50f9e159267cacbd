package runner

import (
	"context"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/mayfly-ci/mayfly/creds"
)

// Where programs ask, at a lease's endpoint.
const (
	oidcPath = "/token"
	awsPath  = "/credentials"
)

// A door answers the programs of one lease. What they send was written by the job.
type door struct {
	path   string
	scheme string       // before the token; "" is none
	token  creds.Secret // that the job has to show
	give   giver
	// record writes down what was asked for. It may fail, and then nothing is given.
	record func(err error, detail []string) error
}

// A giver makes the answer, and what the record says of it.
type giver func(ctx context.Context, query url.Values) (answer any, detail []string, err error)

// A denial is why there is no answer, and the status for it.
type denial struct {
	status int
	error
}

// ServeHTTP implements http.Handler. Each request is an event of the audit, and one
// that cannot be written is not answered.
func (d *door) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	answer, detail, err := d.answer(r)
	if lost := d.record(err, detail); lost != nil {
		err = denial{http.StatusServiceUnavailable, errors.New("the record of it cannot be written")}
	}
	status := http.StatusOK
	if err != nil {
		status = http.StatusServiceUnavailable
		if why := (denial{}); errors.As(err, &why) {
			status = why.status
		}
		answer = map[string]string{"message": err.Error()}
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(answer) // the job may be gone
}

// answer decides on a request.
func (d *door) answer(r *http.Request) (any, []string, error) {
	query, err := url.ParseQuery(r.URL.RawQuery)
	switch {
	case r.URL.Path != d.path:
		return nil, nil, denial{http.StatusNotFound, errors.New("nothing is asked for here")}
	case r.Method != http.MethodGet:
		return nil, nil, denial{http.StatusMethodNotAllowed, errors.New("want GET")}
	case !d.shown(r.Header.Values("Authorization")):
		return nil, nil, denial{http.StatusUnauthorized, errors.New("the request token is not that of this lease")}
	case err != nil:
		return nil, nil, denial{http.StatusBadRequest, errors.New("the query is not one")}
	}
	return d.give(r.Context(), query)
}

// shown says whether the request has the token, once.
func (d *door) shown(all []string) bool {
	if len(all) != 1 {
		return false
	}
	token := all[0]
	if d.scheme != "" {
		scheme, rest, _ := strings.Cut(token, " ")
		if !strings.EqualFold(scheme, d.scheme) {
			return false
		}
		token = rest
	}
	return subtle.ConstantTimeCompare([]byte(token), []byte(d.token.Reveal())) == 1
}

// askFor gives a token for the audience that is asked for, as GitHub's service does.
// It is concealed before the job has it.
func askFor(asker creds.Asker, lease string, conceal func(creds.Secret), hide func(string) string) giver {
	return func(ctx context.Context, query url.Values) (any, []string, error) {
		for key, values := range query {
			if key != "audience" && key != "api-version" || len(values) != 1 {
				return nil, nil, denial{http.StatusBadRequest, errors.New("want audience, once")}
			}
		}
		audience := query.Get("audience")
		if query.Has("audience") && audience == "" {
			return nil, nil, denial{http.StatusBadRequest, errors.New("audience is empty")}
		}
		a, err := asker.Ask(ctx, lease, audience)
		if err != nil {
			detail := []string{"audience", hide(quoted(audience))}
			if errors.Is(err, creds.ErrBadScope) {
				err = denial{http.StatusForbidden, err}
			}
			return nil, detail, err
		}
		conceal(a.Value)
		return map[string]string{"value": a.Value.Reveal()}, []string{"audience", a.Audience, "jti", a.ID, "expires", stamp(a.ExpiresAt)}, nil
	}
}

// always gives the same.
func always(answer any) giver {
	return func(context.Context, url.Values) (any, []string, error) { return answer, nil, nil }
}

// quoted makes what a job sent fit for the record: ASCII, and bounded.
func quoted(s string) string {
	const limit = 256
	q := fmt.Sprintf("%+q", s[:min(len(s), limit)])
	return q[1 : len(q)-1]
}
