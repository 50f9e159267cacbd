package main

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"

	"github.com/mayfly-ci/mayfly/configs"
)

// rotate is "mayfly seal --rotate" and "--forget".
func (c *call) rotate(o *options, rotate, forget bool) error {
	w, err := wire(o.config, c.stderr)
	if err != nil {
		return err
	}
	defer w.close()
	if rotate {
		if err := w.state.Rotate(); err != nil {
			return err
		}
	}
	// Before old keys go: a file that no key opens is not forgotten silently.
	for _, path := range slices.Sorted(maps.Keys(w.sealedFiles)) {
		again, err := w.reseal(path)
		if err != nil {
			return err
		}
		if again {
			fmt.Fprintf(c.stdout, "%s: sealed again\n", path)
		}
	}
	if forget {
		if err := w.state.Forget(); err != nil {
			return err
		}
		_, err = fmt.Fprintln(c.stdout, "one key is left")
		return err
	}
	n, given := w.state.Keys()
	text := "a new key seals from now on"
	if given {
		text = "the key of the service manager seals from now on"
	}
	_, err = fmt.Fprintf(c.stdout, "%s, and %d open; \"mayfly seal --forget\" removes those before it\n", text, n)
	return err
}

// reseal seals the secret of an issuer again, if it is sealed.
func (w *wiring) reseal(path string) (bool, error) {
	text, err := configs.ReadSecret(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	sealed, again, err := w.state.Reseal(w.sealedFiles[path], text)
	if err != nil {
		return false, fmt.Errorf("%s: %w", path, err)
	}
	if !again {
		return false, nil
	}
	return true, writeSealed(path, sealed)
}

// examineKeys says what seals what the agent keeps.
func (w *wiring) examineKeys() finding {
	n, given := w.state.Keys()
	f := finding{"state", "sealing key", stateOK, "in the state directory"}
	switch {
	case n == 0:
		f.Detail = "the service manager gives it to the agent alone: what it sealed cannot be looked at from here"
	case given:
		f.Detail = "from the service manager"
	}
	if n > 1 {
		f.Detail += fmt.Sprintf("; %d older ones open what they sealed (mayfly seal --forget)", n-1)
	}
	return f
}
