package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
)

// A squid is a forward proxy of Debian on the host's loopback, as others put one
// between their jobs and the world. It asks for no password, keeps no cache and
// writes no log, which is less than the gateway does.
type squid struct {
	address string // HOST:PORT
	cmd     *exec.Cmd
	said    bytes.Buffer
	ended   chan struct{}
}

const squidSettings = `http_port %[2]s
visible_hostname proxy.bench
pid_filename none
pinger_enable off
cache deny all
cache_mem 0
memory_cache_shared off
cache_effective_user proxy
shutdown_lifetime 0 seconds
access_log none
cache_log %[1]s/cache.log
coredump_dir %[1]s
http_access allow localhost
http_access deny all
`

// startSquid starts one with its files in dir.
func startSquid(ctx context.Context, dir string) (*squid, error) {
	who, err := user.Lookup("proxy")
	if err != nil {
		return nil, fmt.Errorf("squid: %w", err)
	}
	uid, err := strconv.Atoi(who.Uid)
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp4", "127.0.0.1:0") // it cannot choose a port itself
	if err != nil {
		return nil, err
	}
	s := &squid{address: l.Addr().String(), ended: make(chan struct{})}
	config := filepath.Join(dir, "squid.conf")
	err = errors.Join(l.Close(), os.Mkdir(dir, 0o755), os.Chown(dir, uid, -1),
		os.WriteFile(config, fmt.Appendf(nil, squidSettings, dir, s.address), 0o644))
	if err != nil {
		return nil, err
	}
	s.cmd = exec.Command("squid", "-N", "-f", config, "-n", "mfbench"+strconv.Itoa(os.Getpid()))
	s.cmd.Stdout, s.cmd.Stderr = &s.said, &s.said
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := s.cmd.Start(); err != nil {
		return nil, fmt.Errorf("squid (package squid): %w", err)
	}
	go func() { // close waits for it
		_ = s.cmd.Wait()
		close(s.ended)
	}()
	err = until(ctx, "squid listens", func() (bool, error) {
		select {
		case <-s.ended:
			return false, fmt.Errorf("squid ended: %s", tail(s.said.String()))
		default:
		}
		conn, err := net.Dial("tcp", s.address)
		if err != nil {
			return false, nil
		}
		return true, conn.Close()
	})
	if err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// close kills it, and what it has started.
func (s *squid) close() {
	_ = syscall.Kill(-s.cmd.Process.Pid, syscall.SIGKILL) // it may have ended
	<-s.ended
}
