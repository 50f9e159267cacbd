package gitea

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/web"
)

// pageSize is what Gitea gives at most by default (MAX_RESPONSE_ITEMS). The others
// bound a server that never ends, and one that is never still.
const (
	pageSize    = 50
	maxPages    = 200
	maxReadings = 5
)

// A complaint is Gitea's own error: what comes from a proxy before it is none.
type complaint struct {
	Message string `json:"message"`
}

// asBot calls the part of the API that makes and deletes tokens, for which Gitea
// wants basic authentication. Any answer but 2xx and 404 is an error.
func (i *Issuer) asBot(ctx context.Context, method, path string, in, out any) (int, error) {
	password, err := i.config.Password()
	if err != nil {
		return 0, fmt.Errorf("password_file: %w", err)
	}
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return 0, err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, i.config.URL+"/api/v1/users/"+i.config.User+"/tokens"+path, body)
	if err != nil {
		return 0, err
	}
	req.SetBasicAuth(i.config.User, password.Reveal())
	req.Header.Set("Content-Type", "application/json")
	status, answer, err := web.Do(i.client, req)
	if err != nil {
		return 0, err
	}
	what := method + " tokens of " + i.config.User
	if status/100 == 2 {
		if out == nil {
			return status, nil
		}
		if err := json.Unmarshal(answer, out); err != nil {
			return status, fmt.Errorf("%s: answer %d is not of Gitea's API", what, status) // its text may be a token
		}
		return status, nil
	}
	var c complaint
	if err := json.Unmarshal(answer, &c); err != nil {
		return status, fmt.Errorf("%s: answer %d is not of Gitea's API", what, status)
	}
	if status == http.StatusNotFound && method == http.MethodDelete {
		return status, nil
	}
	err = fmt.Errorf("%s: answer %d: %s", what, status, web.Words(c.Message, password.Reveal()))
	if status == http.StatusUnauthorized || status == http.StatusForbidden {
		err = fmt.Errorf("%w: see user and password_file, and that the bot may sign in with it", err)
	}
	return status, err
}

// use is what a job does with a token. It is creds.ErrStillValid if the server
// accepts it, and nil, with the refusal, if it is refused.
func (i *Issuer) use(ctx context.Context, token string) (refusal string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, i.config.URL+"/api/v1/user", nil)
	if err != nil {
		return "", err
	}
	req.Header.Set("Authorization", "token "+token)
	status, answer, err := web.Do(i.client, req)
	if err != nil {
		return "", err
	}
	var c complaint
	switch bad := json.Unmarshal(answer, &c); {
	case bad != nil:
		return "", fmt.Errorf("GET /api/v1/user: answer %d is not of Gitea's API", status)
	case status == http.StatusUnauthorized && c.Message != "":
		return fmt.Sprintf("%d: %s", status, web.Words(c.Message, token)), nil
	case status == http.StatusOK, status == http.StatusForbidden && strings.Contains(c.Message, "scope"):
		// Who is told that the token lacks a scope has a token.
		return "", creds.ErrStillValid
	}
	return "", fmt.Errorf("GET /api/v1/user: answer %d says nothing of the token: %s", status, web.Words(c.Message, token))
}

// A listedToken is one of the bot's.
type listedToken struct {
	ID   int64  `json:"id"`
	Name string `json:"name"`
}

func (i *Issuer) page(ctx context.Context, n int) ([]listedToken, error) {
	var some []listedToken
	status, err := i.asBot(ctx, http.MethodGet, fmt.Sprintf("?limit=%d&page=%d", pageSize, n), nil, &some)
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("tokens of %s: answer %d", i.config.User, status)
	}
	return some, err
}

// leases are all that this installation has at the server, by the names that
// issue gave. Pages move when a token comes or goes while they are read; then
// they are read again.
func (i *Issuer) leases(ctx context.Context) ([]string, error) {
	for range maxReadings {
		before, pages, err := i.pages(ctx)
		if err != nil {
			return nil, err
		}
		if pages <= 1 {
			return i.owned(before), nil
		}
		after, _, err := i.pages(ctx)
		if err != nil {
			return nil, err
		}
		if slices.Equal(before, after) {
			return i.owned(before), nil
		}
	}
	return nil, errors.New("tokens of the bot come and go too fast to be listed")
}

// pages reads to the first that is empty: how many a server gives at a time is
// its own choice.
func (i *Issuer) pages(ctx context.Context) (all []listedToken, pages int, _ error) {
	for n := 1; n <= maxPages; n++ {
		some, err := i.page(ctx, n)
		if err != nil {
			return nil, 0, err
		}
		if len(some) == 0 {
			return all, n - 1, nil
		}
		all = append(all, some...)
	}
	return nil, 0, fmt.Errorf("the bot has more than %d tokens", maxPages*pageSize)
}

func (i *Issuer) owned(all []listedToken) []string {
	var names []string
	for _, t := range all {
		if name, ok := strings.CutPrefix(t.Name, i.prefix()); ok && checkName(name) == nil {
			names = append(names, name)
		}
	}
	return names
}
