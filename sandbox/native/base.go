package native

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/native/boxinit"
)

// carried names what of the host's /etc a box has. Nothing else is there, and
// of these only what every user of the host may read.
func carried() []string {
	return strings.Fields(`
adduser.conf alternatives apt/preferences.d apt/trusted.gpg.d apt/sources.list apt/sources.list.d
bash.bashrc ca-certificates ca-certificates.conf debconf.conf debian_version default/useradd default/locale
deluser.conf dpkg ethertypes fonts gai.conf groff host.conf inputrc issue ld.so.cache ld.so.conf ld.so.conf.d
libaudit.conf locale.alias locale.gen localtime login.defs lsb-release magic magic.mime mailcap manpath.config
mime.types mke2fs.conf networks os-release pam.conf pam.d perl profile profile.d protocols python3 python3.11
python3.12 python3.13 rpc security services sgml shells skel ssl terminfo timezone ucf.conf vim xattr.conf xml
java-8-openjdk java-11-openjdk java-17-openjdk java-21-openjdk java-25-openjdk maven crypto-policies pki
redhat-release rpm system-release`)
}

// withPassword finds a URL with credentials in it, as apt sources may have.
func withPassword(b []byte) bool {
	return regexp.MustCompile(`://[^/\s:@]+:[^/\s@]+@`).Match(b)
}

// baseEtc returns the directory that is every box's /etc, made anew when the
// host's has changed. It is below dir and named after what went into it.
func baseEtc(dir string) (string, error) {
	print, err := fingerprint()
	if err != nil {
		return "", err
	}
	p := filepath.Join(dir, "etc-"+version+"-"+print)
	if _, err := os.Stat(p); err == nil {
		return p, nil
	}
	work, err := os.MkdirTemp(dir, ".new-")
	if err != nil {
		return "", fmt.Errorf("base /etc: %w", err)
	}
	err = errors.Join(os.Chmod(work, 0o755), copyEtc(work), synthesise(work))
	if err == nil {
		err = os.Rename(work, p)
	}
	if errors.Is(err, fs.ErrExist) {
		err = nil // another process made the same
	}
	if err := errors.Join(err, os.RemoveAll(work)); err != nil {
		return "", fmt.Errorf("base /etc: %w", err)
	}
	return p, nil
}

// version names what boxes are built from; raise it when the skeleton of a disk
// or the files of /etc that are the box's own change.
const version = "2"

// baseAge is how long what boxes are built from is kept after it was made. It
// is longer than any job, since a box still reads the /etc that it began with;
// what is needed after all is made again.
const baseAge = 7 * 24 * time.Hour

// prune removes what is old from dir, current excepted, and what a crash has
// left half made.
func prune(dir, current string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("base: %w", err)
	}
	var all error
	for _, e := range entries {
		p := filepath.Join(dir, e.Name())
		st, err := e.Info()
		if err != nil || p == current || time.Since(st.ModTime()) < baseAge {
			continue // current, young, or gone since
		}
		if err := os.RemoveAll(p); err != nil {
			all = errors.Join(all, fmt.Errorf("base: %w", err))
		}
	}
	return all
}

// walk calls f for everything of the host's /etc that is carried.
func walk(f func(rel string, st fs.FileInfo) error) error {
	for _, name := range append(carried(), "passwd", "group") {
		err := filepath.WalkDir(filepath.Join("/etc", name), func(p string, e fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			st, err := e.Info()
			if err != nil {
				return err
			}
			if st.IsDir() && st.Mode()&0o005 != 0o005 {
				return filepath.SkipDir
			}
			rel, err := filepath.Rel("/etc", p)
			if err != nil {
				return err
			}
			return f(rel, st)
		})
		if err != nil {
			return fmt.Errorf("base /etc: %w", err)
		}
	}
	return nil
}

func fingerprint() (string, error) {
	sum := sha256.New()
	err := walk(func(rel string, st fs.FileInfo) error {
		_, err := fmt.Fprintln(sum, rel, st.Size(), st.ModTime().UnixNano(), st.Mode())
		return err
	})
	return hex.EncodeToString(sum.Sum(nil)[:8]), err
}

func copyEtc(dir string) error {
	return walk(func(rel string, st fs.FileInfo) error {
		from, to := filepath.Join("/etc", rel), filepath.Join(dir, rel)
		if rel == "passwd" || rel == "group" {
			return nil
		}
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		switch {
		case st.IsDir():
			return os.MkdirAll(to, 0o755)
		case st.Mode()&fs.ModeSymlink != 0:
			link, err := os.Readlink(from)
			if err != nil {
				return err
			}
			return os.Symlink(link, to)
		case st.Mode().IsRegular() && st.Mode()&0o004 != 0:
			b, err := os.ReadFile(from)
			if err != nil || withPassword(b) {
				return err
			}
			return os.WriteFile(to, b, st.Mode().Perm())
		}
		return nil // sockets, devices, and what not everybody may read
	})
}

// An ownEtc is what of /etc says who a box is and whom it asks for names.
type ownEtc struct{ hosts, hostname, resolv string }

func identity() ownEtc {
	return ownEtc{
		hosts: "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback " + boxinit.Host + "\n" +
			egress.Self.String() + " " + boxinit.Host + "\n",
		hostname: boxinit.Host + "\n",
		resolv:   "nameserver " + egress.Resolver.String() + "\noptions timeout:5 attempts:2 ndots:1\n",
	}
}

// synthesise writes what is the box's own.
func synthesise(dir string) error {
	users, shadow, err := accounts("/etc/passwd", 7)
	if err != nil {
		return err
	}
	groups, gshadow, err := accounts("/etc/group", 4)
	if err != nil {
		return err
	}
	own := identity()
	for name, file := range map[string]struct {
		mode    os.FileMode
		content string
	}{
		"passwd":        {0o644, users},
		"group":         {0o644, groups},
		"shadow":        {0o640, shadow},
		"gshadow":       {0o640, gshadow},
		"hosts":         {0o644, own.hosts},
		"hostname":      {0o644, own.hostname},
		"resolv.conf":   {0o644, own.resolv},
		"nsswitch.conf": {0o644, "passwd: files\ngroup: files\nshadow: files\ngshadow: files\nhosts: files dns\nnetworks: files\nprotocols: files\nservices: files\nethers: files\nrpc: files\n"},
		"machine-id":    {0o444, "uninitialized\n"},
		"fstab":         {0o644, ""},
		"environment":   {0o644, ""},
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(file.content), file.mode); err != nil {
			return err
		}
	}
	return os.Symlink("/proc/self/mounts", filepath.Join(dir, "mtab"))
}

// accounts keeps the system's own accounts of a passwd or group file, whose
// fields are counted, and locks each in the shadow file that goes with it.
// People of the host are left out.
func accounts(file string, fields int) (kept, shadow string, err error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return "", "", err
	}
	var k, s strings.Builder
	for line := range strings.Lines(string(b)) {
		f := strings.Split(strings.TrimSuffix(line, "\n"), ":")
		if len(f) != fields {
			continue
		}
		id, err := strconv.Atoi(f[2])
		if err != nil || (id >= 1000 && id != 65534) {
			continue
		}
		f[1] = "x"
		if fields == 4 {
			f[3] = "" // members may be people
			fmt.Fprintf(&s, "%s:!::\n", f[0])
		} else {
			f[4] = ""
			fmt.Fprintf(&s, "%s:!:19000:0:99999:7:::\n", f[0])
		}
		if f[0] == "root" && fields == 7 {
			f[5], f[6] = "/root", "/bin/bash"
		}
		k.WriteString(strings.Join(f, ":") + "\n")
	}
	return k.String(), s.String(), nil
}
