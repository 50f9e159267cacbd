package guest

import (
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"runtime"
)

//go:embed bin/*
var programs embed.FS

// Binary returns the guest program for the architecture of this machine, a
// static ELF file. The caller may change the bytes. A tree that was built
// without it gives an error that says what to run.
func Binary() ([]byte, error) {
	b, err := programs.ReadFile("bin/mayfly-guest-" + runtime.GOARCH)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("guest program for %s is not in this build: run `make build`", runtime.GOARCH)
	}
	return b, err
}
