package main

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// harden keeps what the program has in memory from the disk and from others: it
// leaves no core, nor does what it starts (setrlimit(2)), and no other process of
// its user attaches to it or reads its memory (PR_SET_DUMPABLE, prctl(2)). The
// superuser of the machine can. An ordinary user's agent must stay dumpable: the
// kernel would give the files of its children in /proc to root, and it could map
// no user ids for a box.
func harden() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("no core dumps: %w", err)
	}
	if os.Geteuid() != 0 {
		return nil
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("dumpable: %w", err)
	}
	return nil
}
