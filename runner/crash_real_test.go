//go:build failpoint

package runner_test

import (
	"errors"
	"testing"

	"github.com/mayfly-ci/mayfly/runner"
)

type realPostgres struct{ Port int }

func startPostgres(*testing.T) realPostgres { return realPostgres{} }

func (s *scene) real(*runner.Config, *runner.State) error { return errors.ErrUnsupported }

func (s *scene) realLeft() ([]string, error) { return nil, nil }
