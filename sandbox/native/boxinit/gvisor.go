package boxinit

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox/gvisor/keeper"
)

// yard is where the keeper's root is built: an empty directory of the disk.
const yard = stage + "/empty"

// outside makes the root that runsc sees, with the box's at keeper.Root.
func (b *builder) outside() error {
	if err := mount("yard", yard, "tmpfs", plain, keeper.YardOptions); err != nil {
		return err
	}
	if err := keeper.Yard(yard, b.Bundle, 0, 0); err != nil {
		return err
	}
	if err := mount("proc", yard+"/proc", "proc", data, ""); err != nil {
		return err
	}
	for _, name := range []string{"null", "zero", "urandom"} {
		p := yard + "/dev/" + name
		if err := os.WriteFile(p, nil, 0o666); err != nil {
			return fmt.Errorf("yard: %w", err)
		}
		if err := mount("/dev/"+name, p, "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	return mount(newRoot, yard+keeper.Root, "", unix.MS_MOVE, "")
}

// inside takes steps while the root of the box is the root, so that links of its
// files lead to places in it.
func inside(steps ...func() error) error {
	yard, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("yard: %w", err)
	}
	err = errors.Join(unix.Chroot(keeper.Root), unix.Chdir("/"))
	for _, step := range steps {
		if err == nil {
			err = step()
		}
	}
	return errors.Join(err, unix.Fchdir(yard), unix.Chroot("."), unix.Close(yard))
}
