// Command floor is the least that a box can be: what the kernel asks for
// namespaces, a copy-on-write /usr and a new root, and nothing else. The
// benchmark starts it in the namespaces, and it becomes /bin/true.
package main

import (
	"errors"
	"os"
	"syscall"
)

func main() {
	err := box(os.Args[1])
	if err == nil {
		err = syscall.Exec("/usr/bin/true", []string{"true"}, nil)
	}
	_, _ = os.Stderr.WriteString("floor: " + err.Error() + "\n")
	os.Exit(1)
}

// box makes dir, an empty directory, the root: a tmpfs with /usr over the
// host's.
func box(dir string) error {
	if err := errors.Join(
		syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""),
		syscall.Mount("floor", dir, "tmpfs", 0, "mode=755"),
	); err != nil {
		return err
	}
	for _, d := range []string{"usr", "upper", "work", "old"} {
		if err := syscall.Mkdir(dir+"/"+d, 0o755); err != nil {
			return err
		}
	}
	options := "userxattr,lowerdir=/usr,upperdir=" + dir + "/upper,workdir=" + dir + "/work"
	return errors.Join(
		syscall.Mount("overlay", dir+"/usr", "overlay", 0, options),
		syscall.Symlink("usr/lib", dir+"/lib"),
		syscall.Symlink("usr/lib64", dir+"/lib64"),
		syscall.PivotRoot(dir, dir+"/old"),
		syscall.Chdir("/"),
		syscall.Unmount("/old", syscall.MNT_DETACH),
	)
}
