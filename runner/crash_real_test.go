//go:build failpoint

package runner_test

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"testing"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/postgres"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/internal/failpoint"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/egress/gateway"
	"github.com/mayfly-ci/mayfly/sandbox/guest"
	"github.com/mayfly-ci/mayfly/sandbox/native"
	"github.com/mayfly-ci/mayfly/test/postgrestest"
)

// realPostgres is where the server of the crash test listens. Its password is
// the test's own and lives in a file.
type realPostgres struct {
	Port         int
	PasswordFile string
}

// startPostgres starts one server for all lanes.
func startPostgres(t *testing.T) realPostgres {
	t.Helper()
	server := postgrestest.Start(t)
	file := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(file, []byte(server.Password()), 0o600); err != nil {
		t.Fatal(err)
	}
	return realPostgres{server.Port(), file}
}

func (s *scene) issuer(owner string) (*postgres.Issuer, error) {
	return postgres.New(postgres.Config{
		Host: "127.0.0.1", Port: s.Postgres.Port, Database: postgrestest.Database, User: postgrestest.User,
		PasswordFile: s.Postgres.PasswordFile, SSLMode: "disable", Owner: owner, Trace: failpoint.Here,
	})
}

// runtime is the native runtime of a lane: lanes run at the same time and must
// not share ids or control groups.
func (s *scene) runtime(owner string) (*native.Runtime, error) {
	program, err := guest.Binary()
	if err != nil {
		return nil, err
	}
	return native.New(native.Config{
		StateDir: filepath.Join(s.Dir, "native"), Owner: owner, Guest: program, Trace: failpoint.Here,
		FirstID: 1<<30 + uint32(s.Lane)<<20, Slots: 4, CgroupParent: s.cgroup(),
	})
}

// cgroup is the lane's alone, also of a test that runs from another checkout.
func (s *scene) cgroup() string {
	return fmt.Sprintf("mayfly-crash-%08x-%d", crc32.ChecksumIEEE([]byte(s.Dir)), s.Lane)
}

func (s *scene) real(cfg *runner.Config, state *runner.State) error {
	runtime, err := s.runtime(state.Owner)
	if err != nil {
		return err
	}
	issuer, err := s.issuer(state.Owner)
	if err != nil {
		return err
	}
	cfg.Runtimes = map[string]sandbox.Runtime{"native": runtime}
	cfg.Issuers = map[string]creds.Issuer{"pg": issuer}
	cfg.Gateway, err = gateway.New(gateway.Config{Trace: failpoint.Here})
	return err
}

// removeCgroups takes away the parents that the killed agents left, empty.
func (s *scene) removeCgroups(t *testing.T) {
	for _, pattern := range []string{"/sys/fs/cgroup/*/" + s.cgroup(), "/sys/fs/cgroup/" + s.cgroup()} {
		parents, err := filepath.Glob(pattern)
		if err != nil {
			t.Error(err)
		}
		for _, parent := range parents {
			entries, err := os.ReadDir(parent)
			for _, e := range entries {
				if e.IsDir() {
					err = errors.Join(err, os.Remove(filepath.Join(parent, e.Name())))
				}
			}
			if err := errors.Join(err, os.Remove(parent)); err != nil {
				t.Errorf("cgroup: %v", err)
			}
		}
	}
}

// realLeft names boxes, id ranges, control groups and roles that are still there.
func (s *scene) realLeft() ([]string, error) {
	state, err := runner.PeekState(filepath.Join(s.Dir, "state"))
	if err != nil {
		return nil, nil // killed before it had a name: nothing can be labelled with it
	}
	var left []string
	issuer, err := s.issuer(state.Owner)
	if err != nil {
		return nil, err
	}
	defer issuer.Close()
	leases, err := issuer.List(context.Background())
	if err != nil {
		return nil, err
	}
	for _, l := range leases {
		left = append(left, "role of "+l.Name)
	}
	boxes, err := s.boxesLeft()
	return append(left, boxes...), err
}

// boxesLeft is realLeft without the roles.
func (s *scene) boxesLeft() ([]string, error) {
	var left []string
	for _, pattern := range []string{
		filepath.Join(s.Dir, "native", "boxes", "*"), filepath.Join(s.Dir, "native", "ids", "*"),
		"/sys/fs/cgroup/*/" + s.cgroup() + "/*/*-box", "/sys/fs/cgroup/" + s.cgroup() + "/*/*-box",
	} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			return nil, err
		}
		left = append(left, found...)
	}
	return left, nil
}
