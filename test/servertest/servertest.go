// Package servertest finds and runs the real programs that tests run against: those
// that test/scripts/server.sh builds once and keeps outside of the tree.
package servertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Prepare builds what is not there, and lets the tests that this process starts
// find it where the repository is out of sight. It is for TestMain.
func Prepare(names ...string) error {
	for _, name := range names {
		dir, err := Dir(context.Background(), name)
		if err == nil {
			err = os.Setenv(variable(name), dir)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func variable(name string) string { return "MAYFLY_SERVER_" + strings.ToUpper(name) }

// Dir is the directory of the programs of test/servers/NAME, which are built if
// they are not there. Its caller stands in a directory of the module. What cannot
// be built is an error, and never a reason to leave a test out.
func Dir(ctx context.Context, name string) (string, error) {
	if dir := os.Getenv(variable(name)); dir != "" {
		return dir, nil
	}
	root, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("server %s: %w", name, err)
	}
	for {
		script := filepath.Join(root, "test/scripts/server.sh")
		if _, err := os.Stat(script); err == nil {
			return build(ctx, script, name)
		}
		if root == filepath.Dir(root) {
			return "", errors.New("server " + name + ": not inside of the repository")
		}
		root = filepath.Dir(root)
	}
}

func build(ctx context.Context, script, name string) (string, error) {
	cmd := exec.CommandContext(ctx, script, name)
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("server %s: %w: %s", name, err, complaint.String())
	}
	return strings.TrimSpace(out.String()), nil
}

// Runsc is gVisor's program.
func Runsc(ctx context.Context) (string, error) {
	dir, err := Dir(ctx, "runsc")
	return filepath.Join(dir, "runsc"), err
}
