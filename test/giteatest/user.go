package giteatest

import (
	"context"
	"net/http"
	"syscall"

	"github.com/mayfly-ci/mayfly/test/servertest"
)

// NewUser makes an ordinary user with that password.
func (s *Server) NewUser(ctx context.Context, name, password string) error {
	return s.API(ctx, http.MethodPost, "/admin/users", map[string]any{
		"username": name, "password": password, "email": name + "@example.invalid", "must_change_password": false,
	}, nil)
}

// Pause freezes the server: the kernel still accepts connections, nobody
// answers. Resume, Kill and Close undo it.
func (s *Server) Pause() error { return servertest.Freeze(s.cmd.Process.Pid) }

// Resume lets a paused server go on.
func (s *Server) Resume() error { return s.cmd.Process.Signal(syscall.SIGCONT) }
