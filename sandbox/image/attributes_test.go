package image

import (
	"os"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// attributes are the names of a file's extended attributes.
func attributes(t *testing.T, file string) string {
	t.Helper()
	b := make([]byte, 4096)
	n, err := unix.Llistxattr(file, b)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSuffix(strings.ReplaceAll(string(b[:n]), "\x00", " "), " ")
}

func owner(t *testing.T, file string) (uid, gid uint32) {
	t.Helper()
	st, err := os.Lstat(file)
	if err != nil {
		t.Fatal(err)
	}
	sys := st.Sys().(*syscall.Stat_t)
	return sys.Uid, sys.Gid
}
