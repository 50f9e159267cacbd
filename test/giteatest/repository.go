package giteatest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// maxAnswer bounds what is read of one answer: a job's log is the largest.
const maxAnswer = 64 << 20

// A Runner is a registered runner, as the server's API describes it.
type Runner struct {
	ID        int64
	Name      string
	Status    string // "online", "offline"
	Busy      bool
	Ephemeral bool
}

// API calls the server's API below /api/v1 as the administrator. in and out are
// JSON, and may be nil; a *string takes the answer as it is. An answer that is
// no 2xx is an error.
func (s *Server) API(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, s.URL()+"/api/v1"+path, body)
	if err != nil {
		return err
	}
	if s.token != "" {
		req.Header.Set("Authorization", "token "+s.token)
	}
	req.Header.Set("Content-Type", "application/json")
	answer, err := s.do(s.client, req)
	if err != nil {
		return err
	}
	switch out := out.(type) {
	case nil:
		return nil
	case *string:
		*out = string(answer)
		return nil
	}
	if err := json.Unmarshal(answer, out); err != nil {
		return fmt.Errorf("%s %s: %w: %s", method, path, err, tail(string(answer)))
	}
	return nil
}

func (s *Server) do(client *http.Client, req *http.Request) ([]byte, error) {
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err = errors.Join(err, resp.Body.Close()); err != nil {
		return nil, err
	}
	if resp.StatusCode/100 != 2 {
		return nil, fmt.Errorf("%s %s: %s: %s", req.Method, req.URL.Path, resp.Status, tail(string(answer)))
	}
	return answer, nil
}

// RegistrationToken registers any number of runners for the whole server.
func (s *Server) RegistrationToken(ctx context.Context) (string, error) {
	var answer struct{ Token string }
	err := s.API(ctx, http.MethodPost, "/admin/actions/runners/registration-token", nil, &answer)
	return answer.Token, err
}

// Runners are those that are registered for the whole server.
func (s *Server) Runners(ctx context.Context) ([]Runner, error) {
	var answer struct{ Runners []Runner }
	err := s.API(ctx, http.MethodGet, "/admin/actions/runners", nil, &answer)
	return answer.Runners, err
}

// A Repository is the administrator's, with a clone on this machine. Its methods
// that change the clone may not be called at the same time.
type Repository struct {
	server *Server
	name   string
	clone  string
}

// NewRepository makes an empty repository with one commit on main.
func (s *Server) NewRepository(ctx context.Context, name string) (*Repository, error) {
	err := s.API(ctx, http.MethodPost, "/user/repos", map[string]any{"name": name, "auto_init": true, "default_branch": "main"}, nil)
	if err != nil {
		return nil, err
	}
	r := &Repository{server: s, name: name, clone: filepath.Join(s.dir, "clones", name)}
	_, err = r.git(ctx, "clone", "--quiet", s.URL()+"/"+r.Name()+".git", r.clone)
	return r, err
}

// Name is owner and name.
func (r *Repository) Name() string { return Admin + "/" + r.name }

func (r *Repository) path(format string, args ...any) string {
	return "/repos/" + r.Name() + fmt.Sprintf(format, args...)
}

// git runs git as the administrator. The token is in git's environment, where
// only this account can read it.
func (r *Repository) git(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "git", args...)
	cmd.Env = []string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + filepath.Join(r.server.dir, "home"), "GIT_CONFIG_NOSYSTEM=1", "GIT_TERMINAL_PROMPT=0",
		"GIT_AUTHOR_NAME=" + Admin, "GIT_AUTHOR_EMAIL=" + Admin + "@example.invalid",
		"GIT_COMMITTER_NAME=" + Admin, "GIT_COMMITTER_EMAIL=" + Admin + "@example.invalid",
		"GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=http.extraHeader", "GIT_CONFIG_VALUE_0=Authorization: token " + r.server.token,
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("git %s: %w: %s", strings.Join(args, " "), err, tail(string(out)))
	}
	return strings.TrimSpace(string(out)), nil
}

// Push commits the files (path → content) on main, pushes, and returns the
// commit. Runs of workflows that it starts appear a little later.
func (r *Repository) Push(ctx context.Context, files map[string]string) (string, error) {
	for name, content := range files {
		path := filepath.Join(r.clone, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644)); err != nil {
			return "", err
		}
	}
	for _, args := range [][]string{
		{"add", "--all"},
		{"commit", "--quiet", "--allow-empty", "--message", "change"},
		{"push", "--quiet", "origin", "HEAD:main"},
	} {
		if _, err := r.git(ctx, append([]string{"-C", r.clone}, args...)...); err != nil {
			return "", err
		}
	}
	return r.git(ctx, "-C", r.clone, "rev-parse", "HEAD")
}

// Tags are the names of the tags that the server has, and their commits.
func (r *Repository) Tags(ctx context.Context) (map[string]string, error) {
	var answer []struct {
		Name   string
		Commit struct{ SHA string }
	}
	err := r.server.API(ctx, http.MethodGet, r.path("/tags"), nil, &answer)
	tags := map[string]string{}
	for _, t := range answer {
		tags[t.Name] = t.Commit.SHA
	}
	return tags, err
}

// SetSecret sets a secret of the repository's jobs.
func (r *Repository) SetSecret(ctx context.Context, name, value string) error {
	return r.server.API(ctx, http.MethodPut, r.path("/actions/secrets/%s", name), map[string]string{"data": value}, nil)
}

// SetVariable sets a variable of the repository's jobs that is not there yet.
func (r *Repository) SetVariable(ctx context.Context, name, value string) error {
	return r.server.API(ctx, http.MethodPost, r.path("/actions/variables/%s", name), map[string]string{"value": value}, nil)
}

// Dispatch starts a workflow that has workflow_dispatch, on main, and returns
// the run. file is its name without directory.
func (r *Repository) Dispatch(ctx context.Context, file string) (int64, error) {
	var answer struct {
		ID int64 `json:"workflow_run_id"`
	}
	err := r.server.API(ctx, http.MethodPost, r.path("/actions/workflows/%s/dispatches?return_run_details=true", url.PathEscape(file)),
		map[string]any{"ref": "main"}, &answer)
	if err == nil && answer.ID == 0 {
		err = fmt.Errorf("dispatch of %s: the server names no run", file)
	}
	return answer.ID, err
}

// Cancel asks for the end of a run. The server has no API for it, only what its
// page does.
func (r *Repository) Cancel(ctx context.Context, run int64) error {
	jar, err := cookiejar.New(nil)
	if err != nil {
		return err
	}
	browser := &http.Client{Timeout: time.Minute, Jar: jar}
	login := url.Values{"user_name": {Admin}, "password": {adminPassword}}
	browser.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	resp, err := browser.PostForm(r.server.URL()+"/user/login", login)
	if err != nil {
		return err
	}
	if err := resp.Body.Close(); err != nil || resp.StatusCode != http.StatusSeeOther {
		return errors.Join(fmt.Errorf("login: %s", resp.Status), err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, fmt.Sprintf("%s/%s/actions/runs/%d/cancel", r.server.URL(), r.Name(), run), nil)
	if err == nil {
		_, err = r.server.do(browser, req)
	}
	return err
}
