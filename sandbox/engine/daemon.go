package engine

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox/kernel"
)

// restart is how long a daemon may be away before a call that needs it gives
// up. Only Destroy waits for longer.
const restart = 30 * time.Second

// Patiently calls do again while away says of its error that the daemon at that
// address does not answer. It is for calls that may be repeated.
func Patiently(ctx context.Context, address string, away func(error) bool, do func() error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, restart, fmt.Errorf("the daemon at %s was away for %v", address, restart))
	defer cancel()
	var last error
	err := kernel.Poll(ctx, "wait for the daemon", func() (bool, error) {
		last = do()
		if away(last) {
			return false, nil
		}
		return true, last
	})
	if err != nil && last != nil && !errors.Is(err, last) {
		return errors.Join(err, last)
	}
	return err
}
