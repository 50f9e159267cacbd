package kernel

import (
	"fmt"

	"github.com/mayfly-ci/mayfly/sandbox"
)

// Limits puts the defaults where l is zero. What nobody can enforce is
// sandbox.ErrUnsupported.
//
// A disk that is smaller than the default, and for which nobody said how many
// files it may hold, gets no more than fit on it beside their content.
func Limits(l, defaults sandbox.Limits) (sandbox.Limits, error) {
	const fileBytes = 4096 // ext4's unit of allocation
	if l.Inodes == 0 && l.Disk > 0 && defaults.Inodes > 0 {
		l.Inodes = min(defaults.Inodes, l.Disk/fileBytes)
	}
	for _, p := range [][2]*int64{
		{&l.Memory, &defaults.Memory},
		{&l.Pids, &defaults.Pids},
		{&l.MilliCPU, &defaults.MilliCPU},
		{&l.Disk, &defaults.Disk},
		{&l.Inodes, &defaults.Inodes},
	} {
		if *p[0] == 0 {
			*p[0] = *p[1]
		}
	}
	if min(l.Memory, l.Pids, l.Disk, l.Inodes) < 0 || l.MilliCPU < 10 {
		return l, fmt.Errorf("limits %+v: none may be negative, and the CPU at least 10 thousandths: %w", l, sandbox.ErrUnsupported)
	}
	return l, nil
}
