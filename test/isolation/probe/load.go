package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// load are the ways to use up a machine. All are bounded. They print how far
// they got and fail if that was not as far as was asked.
func load() map[string]probe {
	n := func(f func(n int) error) probe { return probe{1, func(a []string) error { return f(number(a[0])) }} }
	return map[string]probe{
		"sleep":   n(func(n int) error { <-time.After(time.Duration(n) * time.Millisecond); return nil }),
		"memory":  n(hog),
		"forks":   n(forks),
		"threads": n(threads),
		"files":   n(openFiles),
		"spin":    n(spin),
		"flood":   n(flood),
		"fill":    {2, func(a []string) error { return fill(a[0], number(a[1])) }},
		"inodes":  {2, func(a []string) error { return inodes(a[0], number(a[1])) }},
		"killall": {0, func([]string) error { return unix.Kill(-1, unix.SIGKILL) }},
	}
}

// hog uses n bytes of memory.
func hog(n int) error {
	b := make([]byte, n)
	for i := 0; i < len(b); i += 4096 {
		b[i] = 1
	}
	fmt.Println(len(b))
	return nil
}

// forks has n children at once.
func forks(n int) (err error) {
	var pids []int
	for range n {
		pid, e := syscall.ForkExec("/proc/self/exe", []string{"probe", "sleep", "60000"}, &syscall.ProcAttr{})
		if e != nil {
			err = e
			break
		}
		pids = append(pids, pid)
	}
	fmt.Println(len(pids))
	for _, pid := range pids {
		err = errors.Join(err, unix.Kill(pid, unix.SIGKILL))
		_, e := unix.Wait4(pid, nil, 0, nil)
		err = errors.Join(err, e)
	}
	return err
}

// threads has n threads at once. The Go runtime ends the process if it cannot
// have one.
func threads(n int) error {
	debug.SetMaxThreads(n + 100)
	running, stop := make(chan bool), make(chan bool)
	for i := range n {
		go func() {
			runtime.LockOSThread()
			running <- true
			<-stop
		}()
		<-running
		if i%50 == 49 {
			fmt.Println(i + 1)
		}
	}
	close(stop)
	return nil
}

// openFiles opens n files at once.
func openFiles(n int) error {
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1 << 16, Max: 1 << 16}); err != nil {
		fmt.Println("limit:", err)
	}
	for i := range n {
		if _, err := unix.Open("/dev/null", unix.O_RDONLY, 0); err != nil {
			fmt.Println(i)
			return err
		}
	}
	fmt.Println(n)
	return nil
}

// spin computes for n milliseconds on two processors and prints how many
// milliseconds of them it had.
func spin(n int) error {
	end := time.Now().Add(time.Duration(n) * time.Millisecond)
	go func() {
		for time.Now().Before(end) {
		}
	}()
	for time.Now().Before(end) {
	}
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return err
	}
	fmt.Println((u.Utime.Nano() + u.Stime.Nano()) / 1e6)
	return nil
}

// flood prints n bytes.
func flood(n int) error {
	b := make([]byte, 64<<10)
	for i := range b {
		b[i] = 'x'
	}
	for n > 0 {
		m, err := os.Stdout.Write(b[:min(n, len(b))])
		if err != nil {
			return err
		}
		n -= m
	}
	return nil
}

// fill writes n bytes to a file and prints how many it could.
func fill(file string, n int) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	b := make([]byte, 1<<20)
	written := 0
	for written < n && err == nil {
		var m int
		m, err = f.Write(b[:min(n-written, len(b))])
		written += m
	}
	err = errors.Join(err, f.Sync(), f.Close())
	fmt.Println(written)
	return err
}

// inodes makes n files below dir and prints how many it could.
func inodes(dir string, n int) error {
	for i := range n {
		f, err := os.Create(filepath.Join(dir, strconv.Itoa(i)))
		if err != nil {
			fmt.Println(i)
			return err
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
	fmt.Println(n)
	return nil
}
