package isolation

import (
	"errors"
	"net"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/sandbox"
)

// What is forbidden must not be what builds are made of.
func TestHonestBuild(t *testing.T) {
	t.Parallel()
	b := newBox(t, sandbox.Limits{Memory: 2 << 30, MilliCPU: 2000})
	refuseNames(t, b)
	for _, c := range []struct{ name, script, want string }{
		{"create, append and delete under /usr", `echo x > /usr/bin/new; f=$(ls /usr/share/perl5/*.pm | head -1); echo '# more' >> "$f"; tail -1 "$f"; rm -r /usr/share/doc/git; test ! -e /usr/share/doc/git; mv /usr/bin/new /usr/bin/newer; cat /usr/bin/newer`, "# more\nx\n"},
		{"tar as root with other owners", `mkdir a; echo x > a/f; chown 1234:4321 a/f; chmod 4750 a/f; tar cf a.tar a; rm -r a; tar xf a.tar; stat -c '%u:%g %a' a/f`, "1234:4321 4750\n"},
		{"install -o", `echo x > f; install -o nobody -g nogroup -m 640 f g; stat -c '%U %G %a' g`, "nobody nogroup 640\n"},
		{"su", `su nobody -s /bin/sh -c 'id -un; cat /root/x || echo no'`, "nobody\n"},
		{"users", `useradd -m builder; su builder -c 'cd; pwd; id -un'`, "/home/builder\nbuilder\n"},
		{"a local Debian package", `mkdir -p p/DEBIAN p/usr/bin
printf 'Package: greeting\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b>\nDescription: d\n' > p/DEBIAN/control
printf '#!/bin/sh\nset -e\nid -u > /var/lib/greeting\n' > p/DEBIAN/postinst; chmod 755 p/DEBIAN/postinst
printf '#!/bin/sh\necho greetings\n' > p/usr/bin/greeting; chmod 755 p/usr/bin/greeting
dpkg-deb --root-owner-group -b p p.deb; dpkg -i p.deb; greeting; cat /var/lib/greeting; dpkg -s greeting | grep Status; dpkg -r greeting`, "greetings\n0\nStatus: install ok installed\n"},
		{"a server on all addresses", `cat > s.py <<'P'
import http.server, threading, urllib.request, socket
s = http.server.HTTPServer(("0.0.0.0", 8080), http.server.SimpleHTTPRequestHandler)
threading.Thread(target=s.serve_forever, daemon=True).start()
for host in ("127.0.0.1", "localhost", socket.gethostname()):
    print(host != "", urllib.request.urlopen("http://%s:8080/s.py" % host, timeout=10).status)
P
/usr/bin/python3 s.py 2>/dev/null`, "True 200\nTrue 200\nTrue 200\n"},
		{"a port below 1024, and IPv6", `/usr/bin/python3 -c 'import socket
s = socket.create_server(("::1", 443), family=socket.AF_INET6); c = socket.create_connection(("::1", 443)); print("both")'`, "both\n"},
		{"the host's own name", `getent hosts $(hostname) | grep -c $(hostname)`, "1\n"},
		{"git", `git init -q r; cd r; echo x > f; git add f; git -c user.name=a -c user.email=a@b commit -qm first; git clone -q . ../c; git -C ../c log --format=%s`, "first\n"},
		{"gcc", `printf '#include <stdio.h>\nint main(){puts("compiled");}' > x.c; gcc -O2 x.c -o x; ./x`, "compiled\n"},
		{"make", `printf 'all: a b\n\t@cat a b\na b:\n\t@echo $@ > $@\n' > Makefile; make -j4`, "a\nb\n"},
		{"go", `mkdir m; cd m; printf 'module m\n\ngo 1.21\n' > go.mod; printf 'package main\n\nfunc main() { println("built") }\n' > main.go; go build -o m .; ./m`, "built\n"},
		{"node", `node -e 'require("child_process").exec("echo child", (e, o) => process.stdout.write(o))'`, "child\n"},
		{"python", `/usr/bin/python3 -c 'import multiprocessing as m
if __name__ == "__main__": print(m.Pool(2).map(abs, [-1, -2]))'`, "[1, 2]\n"},
		{"threads and processes that trace nothing", `timeout 5 sh -c 'sleep 0.1; echo in time'; nohup true; setsid true; nice -n 5 true; (ulimit -n 1024)`, "in time\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := b.run(t, "/bin/sh", "-c", "cd $(mktemp -d -p /workspace); set -e\n"+c.script)
			if !r.got() || !strings.Contains(r.out, c.want) {
				t.Errorf("got %+v, want success and %q", r, c.want)
			}
		})
	}
}

// refuseNames answers every question for a name as a gateway without rules
// does: getent asks for the IPv6 address of a name that /etc/hosts has none for,
// and waits for ten seconds if nobody is there.
func refuseNames(t *testing.T, b *box) {
	t.Helper()
	s, err := b.Attach(bounded(t))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.FilePacketConn(s.DNS)
	if err := errors.Join(err, s.TCP.Close(), s.DNS.Close(), s.Log.Close()); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() {
		conn.Close() // ends the goroutine
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
				p[2], p[3] = 0x81, 0x83 // a response: no such name (RFC 1035, 4.1.1)
				_, _ = conn.WriteTo(p[:n], from)
			}
		}
	}()
}
