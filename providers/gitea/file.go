package gitea

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"github.com/mayfly-ci/mayfly/providers"
)

// maxFile bounds a file that is read, in bytes, and maxFileAnswer the JSON that it
// comes in: base64 makes four bytes of three, and there are a dozen fields more.
const (
	maxFile       = 64 << 10
	maxFileAnswer = 128 << 10
)

// DefaultFile implements providers.Reader, by the API of Gitea and with the job's
// own token. The branch is asked for its commit, and the file is read at that.
func (p *Provider) DefaultFile(ctx context.Context, j providers.Job, path string) (providers.File, error) {
	f, err := p.defaultFile(ctx, j, path)
	if err != nil {
		return f, fmt.Errorf("gitea: %s of %s: %w", path, clip(j.Subject.Repository), err)
	}
	return f, nil
}

func (p *Provider) defaultFile(ctx context.Context, j providers.Job, path string) (f providers.File, err error) {
	if !isRepository(j.Subject.Repository) {
		return f, errors.New("the repository is none")
	}
	repository := "/repos/" + j.Subject.Repository
	var about struct {
		Branch string `json:"default_branch"`
		Name   string `json:"full_name"`
	}
	if err := p.get(ctx, j, repository, &about); err != nil {
		return f, err
	}
	if !strings.EqualFold(about.Name, j.Subject.Repository) || about.Branch == "" {
		return f, errors.New("the server speaks of another repository, or of no default branch")
	}
	var branch struct {
		Name      string `json:"name"`
		Protected bool   `json:"protected"`
		Commit    struct {
			ID string `json:"id"`
		} `json:"commit"`
	}
	if err := p.get(ctx, j, repository+"/branches/"+url.PathEscape(about.Branch), &branch); err != nil {
		return f, fmt.Errorf("default branch: %w", err)
	}
	if branch.Name != about.Branch || branch.Commit.ID == "" {
		return f, errors.New("default branch: the server speaks of another one, or of no commit")
	}
	f = providers.File{Branch: branch.Name, Commit: branch.Commit.ID, Protected: branch.Protected}
	var content struct {
		Type     string `json:"type"`
		Encoding string `json:"encoding"`
		Content  string `json:"content"`
	}
	err = p.get(ctx, j, repository+"/contents/"+(&url.URL{Path: path}).EscapedPath()+"?ref="+url.QueryEscape(f.Commit), &content)
	if errors.Is(err, errAbsent) {
		return f, nil
	}
	if err != nil {
		return f, err
	}
	if content.Type != "file" || content.Encoding != "base64" {
		return f, fmt.Errorf("it is a %q and not a file", clip(content.Type))
	}
	if f.Content, err = base64.StdEncoding.DecodeString(content.Content); err != nil {
		return f, errors.New("its content is not understood")
	}
	if len(f.Content) > maxFile {
		return f, fmt.Errorf("it has more than %d bytes", maxFile)
	}
	f.Present = true
	return f, nil
}

// errAbsent: the server says that there is no such thing.
var errAbsent = errors.New("HTTP 404: not found")

// get asks the API until it is answered, or ctx ends.
func (p *Provider) get(ctx context.Context, j providers.Job, path string, out any) error {
	for wait := retryFirst; ; wait = min(2*wait, retryLast) {
		again, err := p.getOnce(ctx, j, path, out)
		if !again || !pause(ctx, jitter(wait)) {
			return err
		}
	}
}

func (p *Provider) getOnce(ctx context.Context, j providers.Job, path string, out any) (again bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, p.client.timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(p.client.base, "/actions")+"/v1"+path, nil)
	if err != nil {
		return false, errors.New("the address is not one")
	}
	req.Header.Set("User-Agent", p.client.agent)
	req.Header.Set("Accept", "application/json")
	token := j.Secrets["GITEA_TOKEN"]
	if token.IsZero() {
		return false, errors.New("the job has no token to read it with")
	}
	req.Header.Set("Authorization", "token "+token.Reveal())
	resp, err := p.client.http.Do(req)
	if err != nil {
		return true, plain(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxFileAnswer+1))
	switch {
	case resp.StatusCode == http.StatusNotFound:
		return false, errAbsent
	case resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode >= 500:
		return true, fmt.Errorf("HTTP %d", resp.StatusCode)
	case resp.StatusCode != http.StatusOK:
		return false, fmt.Errorf("HTTP %d", resp.StatusCode)
	case err != nil:
		return true, fmt.Errorf("the answer was cut off: %w", plain(err))
	case len(b) > maxFileAnswer:
		return false, fmt.Errorf("the answer has more than %d bytes", maxFileAnswer)
	}
	if json.Unmarshal(b, out) != nil {
		return false, errors.New("the answer is not understood")
	}
	return false, nil
}
