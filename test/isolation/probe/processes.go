package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// A victim has its token at this address, a page that nobody else has (Linux
// keeps programs and their heaps elsewhere).
const (
	heldAt   = 0x500000000000
	heldSize = 4096
)

// processes are the ways into a process, and the process to try them on.
func processes() map[string]probe {
	pid := func(f func(pid int, token string) error) func([]string) error {
		return func(a []string) error { return f(number(a[0]), a[1]) }
	}
	return map[string]probe{
		"victim":  {1, func(a []string) error { return victim(a[0]) }},
		"init":    {3, initProcess},
		"command": {1, func(a []string) error { return commandLine(a[0]) }},
		"kill":    {2, pid(func(pid int, _ string) error { return unix.Kill(pid, 0) })},
		"environ": {2, pid(func(pid int, token string) error { return read(fmt.Sprintf("/proc/%d/environ", pid), token) })},
		"mem":     {2, pid(memory)},
		"vmread":  {2, pid(vmread)},
		"ptrace":  {2, pid(ptrace)},
		"pidfd":   {2, pid(pidfd)},
		"exe":     {2, pid(func(pid int, _ string) error { return readable(fmt.Sprintf("/proc/%d/exe", pid)) })},
	}
}

// victim has a token in its memory, its environment and its arguments, and
// waits for its end.
func victim(token string) error {
	if os.Getenv("TOKEN") == "" {
		return fmt.Errorf("no TOKEN in the environment: %w", errUsage)
	}
	if err := hold(token); err != nil {
		return err
	}
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, unix.SIGTERM)
	fmt.Println("ready")
	<-ended
	return nil
}

// hold puts token where the attacks look.
func hold(token string) error {
	_, _, e := unix.Syscall6(unix.SYS_MMAP, heldAt, heldSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED_NOREPLACE, ^uintptr(0), 0)
	if e != 0 {
		return fmt.Errorf("memory: %w", e)
	}
	f, err := os.OpenFile("/proc/self/mem", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt([]byte(token), heldAt)
	return errors.Join(err, f.Close())
}

// initProcess is a process 1 without any of what hides a guest: it holds the
// token and calls an attack on itself. It is started in namespaces of its own.
func initProcess(a []string) error {
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	if err := hold(a[2]); err != nil {
		return err
	}
	cmd := exec.Command("/proc/self/exe", a...)
	cmd.Stdout = os.Stdout
	return cmd.Run()
}

// commandLine looks for token among the arguments and environments of all
// processes but this one.
func commandLine(token string) error {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		if dir == "/proc/"+strconv.Itoa(os.Getpid()) {
			continue
		}
		for _, name := range []string{"cmdline", "environ"} {
			if read(dir+"/"+name, token) == nil {
				return nil
			}
		}
	}
	return fmt.Errorf("%d processes: %w", len(dirs), errAbsent)
}

func memory(pid int, token string) error {
	f, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, heldSize)
	n, err := f.ReadAt(b, heldAt)
	return holds(b[:n], token, err)
}

func holds(b []byte, token string, err error) error {
	switch {
	case errors.Is(err, unix.EIO) || errors.Is(err, unix.EFAULT):
		fmt.Println("granted, but nothing is there")
		return nil
	case len(b) == 0 && err != nil:
		return err
	case !bytes.Contains(b, []byte(token)):
		return errAbsent
	}
	return nil
}

func vmread(pid int, token string) error {
	b := make([]byte, heldSize)
	local := []unix.Iovec{{Base: &b[0]}}
	local[0].SetLen(len(b))
	n, err := unix.ProcessVMReadv(pid, local, []unix.RemoteIovec{{Base: heldAt, Len: len(b)}}, 0)
	return holds(b[:max(n, 0)], token, err)
}

func ptrace(pid int, _ string) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.PtraceAttach(pid); err != nil {
		return err
	}
	var status unix.WaitStatus
	if _, err := unix.Wait4(pid, &status, 0, nil); err != nil && !errors.Is(err, unix.ECHILD) {
		return err
	}
	return unix.PtraceDetach(pid)
}

// pidfd takes a descriptor out of a process.
func pidfd(pid int, _ string) error {
	process, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return fmt.Errorf("pidfd_open: %w", err)
	}
	defer unix.Close(process)
	fd, err := unix.PidfdGetfd(process, 1, 0)
	if err != nil {
		return fmt.Errorf("pidfd_getfd: %w", err)
	}
	return unix.Close(fd)
}

// child starts this program again with the flags of clone(2).
func child(flags uintptr) error {
	cmd := exec.Command("/proc/self/exe", "status", "self")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags}
	return cmd.Run()
}
