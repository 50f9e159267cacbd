package chaos_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/test/agenttest"
	"github.com/mayfly-ci/mayfly/test/containerdtest"
	"github.com/mayfly-ci/mayfly/test/dockertest"
)

func TestMain(m *testing.M) {
	agenttest.Main(m, func(string) error { return errors.Join(dockertest.Prepare(), containerdtest.Prepare()) })
}

// A setting is what the agent that is killed runs its boxes with.
type setting struct {
	runtime     string
	jobs, kills int           // CHAOS_JOBS and CHAOS_KILLS change them
	life        time.Duration // of an agent that is killed, at most
	warm        int           // boxes that are ready before there is a job
	use         string        // a shell's line that uses the role of a job

	engine func(*testing.T) engine // starts it; nil is none
}

// An engine is one that the agent has boxes in.
type engine struct {
	lines string // of agent.yaml
	lazy  string // directory of its files that it removes in its own time
	left  func(ctx context.Context, state string) ([]string, error)
	// leaks make something each that left must see, and what removes it again.
	leaks []func(context.Context) (undo func() error, err error)
}

// Lines that use a role. There is no psql in the image of the engines, so a job
// there only looks that it has the role and is led to the database, which says N
// to the question for TLS.
const (
	insert  = `psql -qAt -h db.test -d postgres -c "insert into runs values ('${{ github.run_id }}')"`
	connect = `test -n "$PGPASSWORD" && exec 3<>/dev/tcp/db.test/$PGPORT && printf '\0\0\0\10\4\322\26\57' >&3 && test "$(head -c 1 <&3)" = N`
)

// settings are all of them. A box of an engine takes ten to thirty times as long
// as a native one, so those have fewer jobs. An agent lives from its first
// instruction to the middle of its second round of jobs.
func settings() []setting {
	return []setting{
		{runtime: "native", jobs: 200, kills: 30, life: 1500 * time.Millisecond, warm: slots / 2, use: insert},
		{runtime: "docker", jobs: 40, kills: 10, life: 3 * time.Second, use: connect, engine: docker},
		{runtime: "containerd", jobs: 40, kills: 10, life: 3 * time.Second, warm: slots / 2, use: connect, engine: containerd},
	}
}

func docker(t *testing.T) engine {
	d := dockertest.Start(t)
	return engine{
		fmt.Sprintf("  docker: {image: %q, host: %q}\n", dockertest.Debian, d.Host()),
		filepath.Join(d.Dir(), "exec", "netns"), // where namespaces were mounted, once a minute
		func(ctx context.Context, _ string) ([]string, error) { return d.Left(ctx) },
		d.Leaks(),
	}
}

func containerd(t *testing.T) engine {
	d := containerdtest.Start(t, containerdtest.Packaged)
	return engine{
		fmt.Sprintf("  containerd: {image: %q, address: %q}\n", containerdtest.Debian, d.Address()),
		"",
		func(ctx context.Context, state string) ([]string, error) {
			sum := sha256.Sum256([]byte(filepath.Join(state, "boxes-containerd"))) // begins the names of its control groups
			if err := d.Collect(ctx); err != nil {
				return nil, err
			}
			return d.Left(ctx, hex.EncodeToString(sum[:6]))
		},
		d.Leaks(),
	}
}
