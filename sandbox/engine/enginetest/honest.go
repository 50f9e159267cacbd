package enginetest

import (
	"slices"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/sandbox"
)

// HonestSpec is of the box for HonestBuilds.
func HonestSpec() sandbox.Spec { return sandbox.Spec{Limits: sandbox.Limits{Memory: 1 << 30}} }

// HonestBuilds does in a box of Debian with HonestSpec what an ordinary build does
// as root, all of which must work but what is named.
func HonestBuilds(t *testing.T, b sandbox.Sandbox, but ...string) {
	for _, c := range []struct{ name, script, want string }{
		{"usr", `echo x > /usr/bin/new && rm -r /usr/share/git-core && test ! -e /usr/share/git-core && cat /usr/bin/new`, "x\n"},
		{"etc", `echo "a b" >> /etc/hosts && useradd builder && getent passwd builder`, "builder:x:"},
		{"tar", `mkdir a && touch a/f && chown 1234:4321 a/f && tar cf a.tar a && rm -r a && tar xf a.tar && stat -c %u:%g a/f`, "1234:4321"},
		{"install", `echo x > f && install -o nobody -g nogroup -m 640 f g && stat -c '%U %G %a' g`, "nobody nogroup 640"},
		{"su", `su nobody -s /bin/sh -c id`, "uid=65534(nobody)"},
		{"dpkg", `mkdir -p p/DEBIAN p/usr/bin && printf 'Package: hello-mayfly\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b>\nDescription: d\n' > p/DEBIAN/control && printf '#!/bin/sh\necho installed\n' > p/usr/bin/hello-mayfly && chmod 755 p/usr/bin/hello-mayfly && dpkg-deb -b p p.deb && dpkg -i p.deb && dpkg -s hello-mayfly && hello-mayfly && dpkg -r hello-mayfly`, "installed\n"},
		{"dpkg over a package of the image", `dpkg -r --force-depends make && test ! -e /usr/bin/make && dpkg -l | grep -c git`, "\n"},
		{"port below 1024", `python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 80)); print("bound")'`, "bound"},
		{"host name", `getent ahostsv4 $(hostname); hostname`, "192.0.2.1"},
		{"git", `git init -q r && cd r && echo x > f && git add f && git -c user.name=a -c user.email=a@b commit -qm m && git log --oneline`, " m"},
		{"gcc", `printf '#include <stdio.h>\n#include <pthread.h>\nvoid*f(void*a){puts("threaded");return 0;}int main(){pthread_t t;pthread_create(&t,0,f,0);pthread_join(t,0);}' > x.c && gcc -pthread x.c -o x && ./x`, "threaded"},
		{"pty", `python3 -c 'import pty; pty.spawn(["/bin/sh", "-c", "tty"])'`, "/dev/pts/0"},
		{"shared memory", `python3 -c 'from multiprocessing import Pool
if __name__ == "__main__":
    with Pool(2) as p: print(p.map(abs, [-1, -2]))'`, "[1, 2]"},
		{"fifo and links", `mkfifo p && ln -s a b && ln p c && ls -l p`, "prw"},
		{"temporary files", `f=$(mktemp) && d=$(mktemp -d -p /var/tmp) && su nobody -s /bin/sh -c "touch /tmp/nobodys" && ls /tmp/nobodys`, "/tmp/nobodys"},
		{"run", `echo s > /run/mayfly/secret && df --output=fstype /run/mayfly`, "tmpfs"},
		{"limits of the box seen by a runtime", `cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null`, "1073741824"},
	} {
		if slices.Contains(but, c.name) {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			out, exit := Script(t, b, "cd $(mktemp -d -p /workspace) && set -e; "+c.script)
			if exit.Code != 0 && !strings.HasPrefix(c.name, "limits") || !strings.Contains(out, c.want) {
				t.Errorf("got %+v and %q, want success and %q", exit, out, c.want)
			}
		})
	}
}
