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
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// heap is where the memory of a Go program begins.
func heap() uintptr {
	if runtime.GOARCH == "arm64" {
		return 0x4000000000
	}
	return 0xc000000000
}

// heapSize is how much of it is looked at.
const heapSize = 1 << 20

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
	held := strings.Repeat(token+" ", 10)
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, unix.SIGTERM)
	fmt.Println("ready")
	<-ended
	runtime.KeepAlive(held)
	return nil
}

// initProcess is a process 1 without any of what hides a guest: it holds the
// token and calls an attack on itself. It is started in namespaces of its own.
func initProcess(a []string) error {
	held := strings.Repeat(a[2]+" ", 10)
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	cmd := exec.Command("/proc/self/exe", a...)
	cmd.Stdout = os.Stdout
	err := cmd.Run()
	runtime.KeepAlive(held)
	return err
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
	b := make([]byte, heapSize)
	n, err := f.ReadAt(b, int64(heap()))
	return holds(b[:n], token, err)
}

func holds(b []byte, token string, err error) error {
	switch {
	case len(b) == 0 && err != nil:
		return err
	case !bytes.Contains(b, []byte(token)):
		return errAbsent
	}
	return nil
}

func vmread(pid int, token string) error {
	b := make([]byte, heapSize)
	local := []unix.Iovec{{Base: &b[0]}}
	local[0].SetLen(len(b))
	n, err := unix.ProcessVMReadv(pid, local, []unix.RemoteIovec{{Base: heap(), Len: len(b)}}, 0)
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
