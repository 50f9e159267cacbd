package postgrestest

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// templateVersion changes when initdb is called in another way.
const templateVersion = 1

// An install is a PostgreSQL of Debian's layout.
type install struct {
	version string // "15"
	bin     string
}

func findInstall() (install, error) {
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if err != nil {
		return install{}, err
	}
	var newest install
	major := 0
	for _, path := range found {
		bin := filepath.Dir(path)
		version := filepath.Base(filepath.Dir(bin))
		if n, err := strconv.Atoi(version); err == nil && n > major {
			newest, major = install{version, bin}, n
		}
	}
	if major == 0 {
		return install{}, errors.New("no PostgreSQL in /usr/lib/postgresql: apt-get install postgresql")
	}
	return newest, nil
}

// An account is who the server runs as.
type account struct {
	name     string
	uid, gid int
}

// serverAccount is the caller's, except for root, as whom PostgreSQL refuses
// to run.
func serverAccount() (account, error) {
	if os.Geteuid() != 0 {
		return account{"self", os.Geteuid(), os.Getegid()}, nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, uidErr := strconv.Atoi(u.Uid)
		gid, gidErr := strconv.Atoi(u.Gid)
		if err := errors.Join(uidErr, gidErr); err != nil {
			return account{}, fmt.Errorf("account %s: %w", name, err)
		}
		return account{name, uid, gid}, nil
	}
	return account{}, errors.New("PostgreSQL does not run as root and there is neither a user postgres nor nobody: apt-get install postgresql")
}

func (a account) attributes() *syscall.SysProcAttr {
	if os.Geteuid() != 0 {
		return &syscall.SysProcAttr{}
	}
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(a.uid), Gid: uint32(a.gid)}}
}

// template is the directory with an initialised cluster ("data") and the
// administrator's password ("password"). Whoever is first makes it; renaming
// makes it appear whole.
func (in install) template(ctx context.Context, acc account) (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	parent := filepath.Join(cache, "mayfly-test")
	dir := filepath.Join(parent, fmt.Sprintf("pg-%s-%s-%d", in.version, acc.name, templateVersion))
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return dir, err
	}
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return "", err
	}
	unfinished, err := os.MkdirTemp(parent, "making-")
	if err != nil {
		return "", err
	}
	defer func() { _ = os.RemoveAll(unfinished) }() // gone already if all went well
	if err := in.initialise(ctx, acc, unfinished); err != nil {
		return "", fmt.Errorf("initdb: %w", err)
	}
	if err := os.Rename(unfinished, dir); err != nil {
		if _, other := os.Stat(dir); other != nil {
			return "", err
		}
	}
	return dir, nil
}

func (in install) initialise(ctx context.Context, acc account, dir string) (err error) {
	// The cache is usually closed to the server's account: make it elsewhere.
	scratch, err := os.MkdirTemp("", "mayfly-initdb-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(scratch)) }()
	password, pwfile := rand.Text(), filepath.Join(scratch, "password")
	if err := os.WriteFile(pwfile, []byte(password), 0o600); err != nil {
		return err
	}
	if err := errors.Join(os.Chown(scratch, acc.uid, acc.gid), os.Chown(pwfile, acc.uid, acc.gid)); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(in.bin, "initdb"), "-D", filepath.Join(scratch, "data"),
		"-U", User, "--pwfile", pwfile, "--auth=scram-sha-256", "--locale=C", "--encoding=UTF8",
		"--no-sync", "--wal-segsize=1")
	cmd.Dir, cmd.Env, cmd.SysProcAttr = scratch, []string{"TZ=UTC"}, acc.attributes()
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	self := account{uid: os.Geteuid(), gid: os.Getegid()}
	if err := copyTree(ctx, filepath.Join(scratch, "data"), filepath.Join(dir, "data"), self); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "password"), []byte(password), 0o600)
}

// copyTree copies the files and directories of from to a new directory to, for
// acc alone.
func copyTree(ctx context.Context, from, to string, acc account) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err := errors.Join(err, ctx.Err()); err != nil {
			return err
		}
		dst := filepath.Join(to, strings.TrimPrefix(path, from))
		if d.IsDir() {
			return errors.Join(os.Mkdir(dst, 0o700), os.Chown(dst, acc.uid, acc.gid))
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if err := os.WriteFile(dst, content, 0o600); err != nil {
			return err
		}
		return os.Chown(dst, acc.uid, acc.gid)
	})
}

// childrenOf lists the processes whose parent is pid.
func childrenOf(pid int) ([]int, error) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	var children []int
	for _, path := range stats {
		stat, err := os.ReadFile(path)
		if err != nil {
			continue // ended meanwhile
		}
		// pid (name, which may hold anything) state ppid ...
		_, rest, _ := bytes.Cut(stat[bytes.LastIndexByte(stat, ')')+1:], []byte(" "))
		fields := bytes.Fields(rest)
		if len(fields) < 2 || string(fields[1]) != strconv.Itoa(pid) {
			continue
		}
		child, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil {
			return nil, err
		}
		children = append(children, child)
	}
	return children, nil
}
