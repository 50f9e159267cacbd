package serve

import (
	"fmt"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox/guest/wire"
)

// account is who the process of a command will be, nil for the guest's own user.
// Its outputs become his, because programs open /dev/stdout by name; and it gets
// his HOME.
func account(c *wire.Command, files [3]int) (*syscall.Credential, error) {
	if c.User == "" {
		return nil, nil
	}
	who, home, err := lookup(c.User)
	if err != nil {
		return nil, fmt.Errorf("user %s: %w", c.User, err)
	}
	for _, fd := range files[1:] {
		if err := unix.Fchown(fd, int(who.Uid), int(who.Gid)); err != nil {
			return nil, fmt.Errorf("user %s: output: %w", c.User, err)
		}
	}
	if !slices.ContainsFunc(c.Env, func(e string) bool { return strings.HasPrefix(e, "HOME=") }) {
		c.Env = append(slices.Clip(c.Env), "HOME="+home)
	}
	return who, nil
}

// lookup finds NAME, ID, or either with :GROUP, as engines do: an id that the
// files do not know is its own, with the group 0.
func lookup(name string) (who *syscall.Credential, home string, err error) {
	name, group, grouped := strings.Cut(name, ":")
	who, home = &syscall.Credential{}, "/"
	find := user.Lookup
	if _, err := strconv.ParseUint(name, 10, 32); err == nil {
		find = user.LookupId
	}
	u, err := find(name)
	switch {
	case err == nil:
		home = u.HomeDir
		if who.Uid, err = id(u.Uid); err == nil {
			who.Gid, err = id(u.Gid)
		}
	default:
		who.Uid, err = id(name)
	}
	if err != nil {
		return nil, "", fmt.Errorf("%q is not in the box's /etc/passwd", name)
	}
	if grouped {
		if who.Gid, err = groupID(group); err != nil {
			return nil, "", fmt.Errorf("group %q is not in the box's /etc/group", group)
		}
		return who, home, nil
	}
	if u != nil {
		others, _ := u.GroupIds() // a box without /etc/group has none
		for _, g := range others {
			if n, err := id(g); err == nil {
				who.Groups = append(who.Groups, n)
			}
		}
	}
	return who, home, nil
}

func groupID(name string) (uint32, error) {
	if n, err := id(name); err == nil {
		return n, nil
	}
	g, err := user.LookupGroup(name)
	if err != nil {
		return 0, err
	}
	return id(g.Gid)
}

func id(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 31)
	return uint32(n), err
}
