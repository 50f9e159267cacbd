package boxinit

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
)

// Skeleton makes the empty directories and links of a disk below dir, which
// exists: the box's root and, beside it, what the mounts are built from. The
// agent puts it on the disk's template, an unprivileged guest on its tmpfs.
func Skeleton(dir string) error {
	for _, d := range directories() {
		p := filepath.Join(dir, d.path)
		if err := os.MkdirAll(p, 0o755); err != nil {
			return fmt.Errorf("skeleton: %w", err)
		}
		if err := os.Chmod(p, d.mode); err != nil {
			return fmt.Errorf("skeleton: %w", err)
		}
	}
	for name, to := range map[string]string{
		"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64", "lib32": "usr/lib32", "libx32": "usr/libx32",
		"var/run": "/run", "var/lock": "/run/lock",
	} {
		if _, err := os.Lstat("/" + name); err != nil {
			continue // as on the host
		}
		if err := os.Symlink(to, filepath.Join(dir, "root", name)); err != nil {
			return fmt.Errorf("skeleton: %w", err)
		}
	}
	return nil
}

type directory struct {
	path string
	mode os.FileMode
}

func directories() []directory {
	out := []directory{{"empty", 0o555}}
	for _, kind := range []string{"lower", "upper", "work", "hide"} {
		for i := range Dirs {
			out = append(out, directory{kind + "/" + strconv.Itoa(i), 0o755})
		}
	}
	for _, p := range []string{
		"usr", "etc", "dev", "home", "mnt", "media", "opt", "srv", "run/lock", "run/mayfly",
		"var/cache/apt/archives/partial", "var/cache/debconf", "var/cache/ldconfig", "var/cache/man",
		"var/lib/dpkg", "var/lib/apt/lists/partial", "var/lib/misc", "var/lib/systemd",
		"var/log/apt", "var/mail", "var/opt", "var/spool", "workspace",
	} {
		out = append(out, directory{"root/" + p, 0o755})
	}
	const sticky = os.ModeSticky | 0o777
	return append(out, directory{"root", 0o755}, directory{"root/root", 0o700}, directory{"root/proc", 0o555},
		directory{"root/sys", 0o555}, directory{"root/tmp", sticky}, directory{"root/var/tmp", sticky})
}
