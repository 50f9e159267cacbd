package gitcache

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode"

	"golang.org/x/sys/unix"
)

// Descriptors of git and of all that it starts, beside 0, 1 and 2.
const (
	secretFD = 3 // configuration that holds the token, in memory
	lockFD   = 4 // of the entry
	wayFD    = 5 // configuration that says which way out, in memory
	caFD     = 6 // authorities, if there are some
)

// A git runs git in a bare repository.
type git struct {
	program, dir string
	user         int // and group; 0 is the agent's own
	files        []*os.File
}

// run returns what git prints. Its complaint is in the error, and is clipped; it
// holds no secret, since git is not told one in what it prints.
//
// git starts other programs, which must not outlive it, and neither must they
// outlive the agent: they are one process group, whose leader the kernel kills
// with the thread that started it. The others end with their pipes.
func (g git) run(ctx context.Context, args ...string) (string, error) {
	runtime.LockOSThread() // the thread's end would be the child's
	defer runtime.UnlockOSThread()
	cmd := exec.CommandContext(ctx, g.program, append([]string{"--git-dir=" + g.dir}, args...)...)
	cmd.Dir = "/"
	cmd.Env = g.environment()
	cmd.ExtraFiles = g.files
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if g.user != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(g.user), Gid: uint32(g.user)}
	}
	cmd.Cancel = func() error {
		if err := cmd.Process.Signal(syscall.Signal(0)); err != nil {
			return err // it has ended, and its number may be another's
		}
		return unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
	}
	cmd.WaitDelay = 5 * time.Second // for what keeps a pipe open and cannot be killed
	out, complaint := &limited{most: 4096}, &limited{most: 2048}
	cmd.Stdout, cmd.Stderr = out, complaint
	err := cmd.Run()
	if err != nil {
		return "", fmt.Errorf("git: %w: %s", err, tail(complaint.String()))
	}
	return out.String(), nil
}

// environment is all of it. GIT_ALLOC_LIMIT bounds each piece of memory that git
// asks for, so that a small pack which unpacks to much ends git and not the
// machine.
func (g git) environment() []string {
	return []string{
		"PATH=" + os.Getenv("PATH"),
		"HOME=/nonexistent",
		"LC_ALL=C",
		"GIT_CONFIG_NOSYSTEM=1",
		"GIT_CONFIG_GLOBAL=/proc/self/fd/" + strconv.Itoa(secretFD),
		"GIT_TERMINAL_PROMPT=0",
		"GIT_NO_REPLACE_OBJECTS=1",
		"GIT_NO_LAZY_FETCH=1",
		"GIT_ALLOC_LIMIT=1g",
	}
}

// fetch is the command that brings the ref into its slot.
func (w Want) fetch(ca bool) []string {
	u, _ := url.Parse(w.URL) // was parsed before
	settings := []string{
		"protocol.allow=never", "protocol." + u.Scheme + ".allow=always", "protocol.version=2",
		"http.followRedirects=false", // the token would follow
		"http.lowSpeedLimit=1000", "http.lowSpeedTime=60",
		"credential.helper=", "core.askPass=", "core.hooksPath=/dev/null",
		"transfer.bundleURI=false", "fetch.recurseSubmodules=false", "fetch.writeCommitGraph=false",
		"fetch.unpackLimit=1", // a pack is one file
		"fetch.fsckObjects=true",
		// What old, honest repositories have, and hurts nobody.
		"fetch.fsck.zeroPaddedFilemode=warn", "fetch.fsck.badTimezone=warn", "fetch.fsck.missingSpaceBeforeDate=warn",
		"gc.auto=0", "maintenance.auto=false", "pack.threads=1", "core.bigFileThreshold=32m",
	}
	if ca {
		settings = append(settings, "http.sslCAInfo=/proc/self/fd/"+strconv.Itoa(caFD))
	}
	var args []string
	for _, s := range settings {
		args = append(args, "-c", s)
	}
	return append(args, "fetch", "--quiet", "--no-tags", "--no-write-fetch-head", "--no-recurse-submodules", "--no-auto-maintenance", "--end-of-options",
		w.URL, "+"+w.Ref+":"+w.slot())
}

// file is the part of the configuration that holds the token, as a file in
// memory which git's user may read and not write. The repository of a provider on
// this machine may belong to anybody.
func (w Want) file() (*os.File, error) {
	text := "[safe]\n\tdirectory = *\n[include]\n\tpath = /proc/self/fd/" + strconv.Itoa(wayFD) + "\n"
	if !w.Token.IsZero() {
		basic := base64.StdEncoding.EncodeToString([]byte(w.User + ":" + w.Token.Reveal()))
		text += "[http \"" + w.URL + "\"]\n\textraHeader = \"Authorization: Basic " + basic + "\"\n"
	}
	return inMemory("git-configuration", []byte(text))
}

// blank takes the token out again, which the end of the job made worthless.
func (w Want) blank(f *os.File) {
	if !w.Token.IsZero() {
		_ = f.Truncate(0) // it fails if the file is closed, and so gone
	}
}

// address is whom git speaks to, HOST:PORT; "" is nobody but this machine's disk.
func (w Want) address() string {
	u, _ := url.Parse(w.URL) // was parsed before
	port := u.Port()
	switch {
	case u.Scheme == "file":
		return ""
	case port == "" && u.Scheme == "http":
		port = "80"
	case port == "":
		port = "443"
	}
	return net.JoinHostPort(u.Hostname(), port)
}

// way opens the way out for one filling, and says it in a file as file does. A
// proxy of the environment is never one.
func (c *Cache) way(ctx context.Context, w Want) (f *os.File, end func(), err error) {
	text, stop := "[http]\n\tproxy =\n", func() {}
	if address := w.address(); c.cfg.Out != nil && address != "" {
		proxy, end, err := c.cfg.Out(ctx, address)
		if err != nil {
			return nil, nil, fmt.Errorf("way out: %w", err)
		}
		text, stop = "[http]\n\tproxy = "+proxy.Reveal()+"\n\tproxyAuthMethod = basic\n", end
	}
	if f, err = inMemory("git-way", []byte(text)); err != nil {
		stop()
		return nil, nil, err
	}
	return f, func() { stop(); _ = f.Close() }, nil
}

// authorities are Want.RootCA, or those of the agent, for git's user.
func (c *Cache) authorities(w Want) (*os.File, error) {
	if w.RootCA == "" && c.cfg.Authorities == "" {
		return nil, nil
	}
	if w.RootCA == "" {
		return inMemory("git-authorities", []byte(c.cfg.Authorities))
	}
	b, err := os.ReadFile(w.RootCA)
	if err != nil {
		return nil, fmt.Errorf("authorities: %w", err)
	}
	return inMemory("git-authorities", b)
}

func inMemory(name string, b []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3
		fd, err = unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	}
	if err != nil {
		return nil, fmt.Errorf("file in memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	_, err = f.Write(b)
	if err = errors.Join(err, f.Chmod(0o444)); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// tail is the end of a complaint, on one line. Parts of it are the server's.
func tail(s string) string {
	s = s[max(0, len(s)-400):]
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	return strings.Join(strings.Fields(s), " ")
}

// limited keeps the beginning of what is written to it.
type limited struct {
	bytes.Buffer
	most int
}

func (l *limited) Write(b []byte) (int, error) {
	_, _ = l.Buffer.Write(b[:max(0, min(len(b), l.most-l.Len()))])
	return len(b), nil
}
