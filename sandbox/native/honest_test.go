package native

import (
	"errors"
	"net"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/sandbox"
)

// refuse answers every DNS query with NXDOMAIN, as a gateway without rules does.
func refuse(t *testing.T, b sandbox.Sandbox) {
	t.Helper()
	s, err := b.Attach(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.FilePacketConn(s.DNS)
	if err := errors.Join(err, closeAll([]*os.File{s.TCP, s.DNS, s.Log})); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() {
		_ = conn.Close() // ends the goroutine
		<-done
	})
	go func() {
		defer close(done)
		p := make([]byte, 512)
		for {
			n, from, err := conn.ReadFrom(p)
			if err != nil {
				return
			}
			if n > 3 {
				p[2], p[3] = 0x81, 0x83 // response, recursion, no such name (RFC 1035 4.1.1)
				_, _ = conn.WriteTo(p[:n], from)
			}
		}
	}()
}

// What an ordinary build does as root must work.
func TestHonestBuilds(t *testing.T) {
	t.Parallel()
	cfg := config(t)
	cfg.Limits.Memory = 2 << 30
	honest(t, create(t, newRuntime(t, cfg), "box", sandbox.Spec{}))
}

// honest runs what must work, but for what the kernel of the box cannot do.
func honest(t *testing.T, b sandbox.Sandbox, cannot ...string) {
	t.Helper()
	refuse(t, b)
	for _, c := range []struct{ name, script, want string }{
		{"usr", `echo x > /usr/bin/new && echo y >> /usr/share/perl5/Debconf/Db.pm && rm -r /usr/share/doc/git && test ! -e /usr/share/doc/git && cat /usr/bin/new && tail -1 /usr/share/perl5/Debconf/Db.pm`, "x\ny"},
		{"etc", `echo "a b" >> /etc/hosts && useradd builder && getent passwd builder`, "builder:x:"},
		{"tar", `mkdir a && touch a/f && chown 1234:4321 a/f && tar cf a.tar a && rm -r a && tar xf a.tar && stat -c %u:%g a/f`, "1234:4321"},
		{"install", `echo x > f && install -o nobody -g nogroup -m 640 f g && stat -c '%U %G %a' g`, "nobody nogroup 640"},
		{"su", `su nobody -s /bin/sh -c id`, "uid=65534(nobody)"},
		{"dpkg", `mkdir -p p/DEBIAN p/usr/bin && printf 'Package: hello-mayfly\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b>\nDescription: d\n' > p/DEBIAN/control && printf '#!/bin/sh\necho installed\n' > p/usr/bin/hello-mayfly && chmod 755 p/usr/bin/hello-mayfly && dpkg-deb -b p p.deb && dpkg -i p.deb && dpkg -s hello-mayfly && hello-mayfly && dpkg -r hello-mayfly`, "installed\n"},
		{"server", `/usr/bin/python3 -c '
import socket, threading
s = socket.socket(); s.bind(("0.0.0.0", 8080)); s.listen()
threading.Thread(target=lambda: s.accept()[0].sendall(b"served")).start()
print(socket.create_connection(("127.0.0.1", 8080)).recv(10))'`, "served"},
		{"port below 1024", `/usr/bin/python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 80)); print("bound")'`, "bound"},
		{"host name", `getent hosts $(hostname); getent ahostsv4 $(hostname); hostname`, "192.0.2.1"},
		{"git", `git init -q r && cd r && echo x > f && git add f && git -c user.name=a -c user.email=a@b commit -qm m && git log --oneline`, " m"},
		{"gcc", `printf '#include <stdio.h>\n#include <pthread.h>\nvoid*f(void*a){puts("threaded");return 0;}int main(){pthread_t t;pthread_create(&t,0,f,0);pthread_join(t,0);}' > x.c && gcc -pthread x.c -o x && ./x`, "threaded"},
		{"go", `mkdir -p m && cd m && printf 'module m\n\ngo 1.21\n' > go.mod && printf 'package main\n\nimport "os"\n\nfunc main() { os.Stdout.WriteString("compiled") }\n' > main.go && go build -o m . && ./m`, "compiled"},
		{"node", `node -e 'require("child_process").exec("echo from a child", (e, o) => console.log(o))'`, "from a child"},
		{"pty", `script -qc 'tty; echo in a terminal' /dev/null`, "/dev/pts/0"},
		{"shared memory", `/usr/bin/python3 -c 'from multiprocessing import Pool
if __name__ == "__main__":
    with Pool(2) as p: print(p.map(abs, [-1, -2]))'`, "[1, 2]"},
		{"fifo and links", `mkfifo p && ln -s a b && echo x > f && ln f c && ls -l p`, "prw"},
		{"hard link of a fifo", `mkfifo p && ln p c && ls -l c`, "prw"},
		{"temporary files", `f=$(mktemp) && d=$(mktemp -d -p /var/tmp) && su nobody -s /bin/sh -c "touch /tmp/nobodys" && ls /tmp/nobodys`, "/tmp/nobodys"},
		{"run", `echo s > /run/mayfly/secret && df --output=fstype /run/mayfly`, "tmpfs"},
		{"base", `head -c 0 /etc/os-release && openssl version && ls /etc/ssl/certs/ca-certificates.crt && dpkg -l gcc | grep -c ^ii`, "\n1\n"},
	} {
		if slices.Contains(cannot, c.name) {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			out, exit := script(t, b, "cd $(mktemp -d -p /workspace) && set -e; "+c.script)
			if exit.Code != 0 || !strings.Contains(out, c.want) {
				t.Errorf("got %+v and %q, want success and %q", exit, out, c.want)
			}
		})
	}
}
