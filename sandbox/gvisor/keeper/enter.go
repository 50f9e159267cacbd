package keeper

import (
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// FilterVariable is where Enter finds struct sock_filter array, as hexadecimal
// digits.
const FilterVariable = "MAYFLY_FILTER"

// Enter is what the guest does in a kernel of its own before it serves: there it
// gives up what a step must not have, beyond what runsc left. The filter comes
// in the environment, which nobody but the guest reads.
func Enter() error {
	unix.Umask(0o022)
	if err := unix.Unlink(tmpMark); err != nil && !absent(err) {
		return fmt.Errorf("temporary directory: %w", err)
	}
	program, err := hex.DecodeString(os.Getenv(FilterVariable))
	if err != nil {
		return fmt.Errorf("system call filter: %w", err)
	}
	os.Clearenv()
	return Filter(program, unix.SECCOMP_FILTER_FLAG_TSYNC)
}

// Filter installs a system call filter, struct sock_filter array, and no_new_privs,
// which it needs. The flags are those of seccomp(2).
func Filter(program []byte, flags uintptr) error {
	const size = int(unsafe.Sizeof(unix.SockFilter{}))
	if len(program) == 0 || len(program)%size != 0 {
		return errors.New("system call filter: malformed")
	}
	if err := NoNewPrivileges(); err != nil {
		return err
	}
	instructions := make([]unix.SockFilter, len(program)/size)
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&instructions[0])), len(program)), program)
	fprog := unix.SockFprog{Len: uint16(len(instructions)), Filter: &instructions[0]}
	_, _, e := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&fprog)))
	if e != 0 {
		return fmt.Errorf("system call filter: %w", e)
	}
	return nil
}

// NoNewPrivileges keeps the calling thread and what it executes from gaining any.
func NoNewPrivileges() error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	return nil
}
