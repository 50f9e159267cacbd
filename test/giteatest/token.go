package giteatest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
)

// NewToken makes an access token of the administrator.
func (s *Server) NewToken(ctx context.Context, name string, scopes ...string) (string, error) {
	var answer struct{ SHA1 string }
	status, err := s.tokens(ctx, http.MethodPost, "", map[string]any{"name": name, "scopes": scopes}, &answer)
	if err == nil && status != http.StatusCreated {
		err = fmt.Errorf("token %s: status %d", name, status)
	}
	return answer.SHA1, err
}

// DeleteToken takes it back. One that is not there is no error.
func (s *Server) DeleteToken(ctx context.Context, name string) error {
	status, err := s.tokens(ctx, http.MethodDelete, "/"+name, nil, nil)
	if err == nil && status != http.StatusNoContent && status != http.StatusNotFound {
		err = fmt.Errorf("token %s: status %d", name, status)
	}
	return err
}

// tokens calls the part of the API that wants the password.
func (s *Server) tokens(ctx context.Context, method, path string, in, out any) (int, error) {
	b, err := json.Marshal(in)
	if err != nil {
		return 0, err
	}
	req, err := http.NewRequestWithContext(ctx, method, s.URL()+"/api/v1/users/"+Admin+"/tokens"+path, bytes.NewReader(b))
	if err != nil {
		return 0, err
	}
	req.SetBasicAuth(Admin, adminPassword)
	req.Header.Set("Content-Type", "application/json")
	resp, err := s.client.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err == nil && out != nil {
		err = json.Unmarshal(answer, out)
	}
	return resp.StatusCode, err
}
