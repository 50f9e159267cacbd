package https_test

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/websocket"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/mayfly-ci/mayfly/test/agenttest"
	"github.com/mayfly-ci/mayfly/test/servertest"
)

// registries are those that package tools ask, each with a package that the job
// may have (ours) and one that it may not (theirs), beside a gRPC service and
// WebSockets.
func registries(t *testing.T) http.Handler {
	t.Helper()
	mux := http.NewServeMux()
	wheel, module, tarball := map[string][]byte{}, map[string][]byte{}, map[string][]byte{}
	for _, name := range []string{"ours", "theirs"} {
		info := name + "-1.0.dist-info/"
		wheel[name] = zipped(t, name+".py", "print('pip "+name+"')\n", info+"METADATA", "Metadata-Version: 2.1\nName: "+name+"\nVersion: 1.0\n",
			info+"WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n", info+"RECORD", "")
		at := "corp.example/" + name + "@v1.0.0/"
		module[name] = zipped(t, at+"go.mod", "module corp.example/"+name+"\n", at+"say.go", "package say\n\nconst Word = \"go "+name+"\"\n")
		tarball[name] = tarred(t, "package/package.json", `{"name":"`+name+`","version":"1.0.0","main":"say.js"}`, "package/say.js", "console.log('npm "+name+"')\n")
	}
	mux.HandleFunc("GET /npm/{name}", func(w http.ResponseWriter, r *http.Request) {
		name := r.PathValue("name")
		sum := sha512.Sum512(tarball[name])
		dist := map[string]string{"tarball": fmt.Sprintf("https://%s/npm/%s/-/%s-1.0.0.tgz", r.Host, name, name), "integrity": "sha512-" + base64.StdEncoding.EncodeToString(sum[:])}
		version := map[string]any{"name": name, "version": "1.0.0", "dist": dist}
		_ = json.NewEncoder(w).Encode(map[string]any{"name": name, "dist-tags": map[string]string{"latest": "1.0.0"}, "versions": map[string]any{"1.0.0": version}}) // the client may be gone
	})
	mux.HandleFunc("GET /npm/{name}/-/{file}", func(w http.ResponseWriter, r *http.Request) { _, _ = w.Write(tarball[r.PathValue("name")]) })
	mux.HandleFunc("GET /pypi/simple/{name}/{$}", func(w http.ResponseWriter, r *http.Request) {
		name := r.PathValue("name")
		w.Header().Set("Content-Type", "text/html")
		fmt.Fprintf(w, "<!DOCTYPE html><a href=\"/pypi/files/%[1]s/%[1]s-1.0-py3-none-any.whl#sha256=%[2]x\">%[1]s-1.0-py3-none-any.whl</a>", name, sha256.Sum256(wheel[name]))
	})
	mux.HandleFunc("GET /pypi/files/{name}/{file}", func(w http.ResponseWriter, r *http.Request) { _, _ = w.Write(wheel[r.PathValue("name")]) })
	mux.HandleFunc("GET /go/corp.example/{name}/@v/{file}", func(w http.ResponseWriter, r *http.Request) {
		name := r.PathValue("name")
		switch r.PathValue("file") {
		case "v1.0.0.info":
			_, _ = io.WriteString(w, `{"Version":"v1.0.0","Time":"2026-01-01T00:00:00Z"}`)
		case "v1.0.0.mod":
			_, _ = io.WriteString(w, "module corp.example/"+name+"\n")
		case "v1.0.0.zip":
			_, _ = w.Write(module[name])
		default:
			http.NotFound(w, r)
		}
	})
	echo := websocket.Handler(func(c *websocket.Conn) { _, _ = io.Copy(c, c) })
	mux.Handle("/ws/", echo)
	mux.Handle("/test.Echo/", echoes())
	return mux
}

// echoes is a gRPC service that says what it is told.
func echoes() *grpc.Server {
	s := grpc.NewServer()
	say := func(_ any, stream grpc.ServerStream) error {
		m := new(wrapperspb.StringValue)
		if err := stream.RecvMsg(m); err != nil {
			return err
		}
		return stream.SendMsg(m)
	}
	s.RegisterService(&grpc.ServiceDesc{ServiceName: "test.Echo", HandlerType: (*any)(nil), Streams: []grpc.StreamDesc{
		{StreamName: "Ours", ServerStreams: true, Handler: say}, {StreamName: "Theirs", ServerStreams: true, Handler: say},
	}}, nil)
	return s
}

// zipped is an archive of files: name, content, and so on.
func zipped(t *testing.T, files ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	z := zip.NewWriter(&b)
	for f := range slices.Chunk(files, 2) {
		w, err := z.Create(f[0])
		agenttest.Must(t, err)
		_, err = io.WriteString(w, f[1])
		agenttest.Must(t, err)
	}
	agenttest.Must(t, z.Close())
	return b.Bytes()
}

func tarred(t *testing.T, files ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	for f := range slices.Chunk(files, 2) {
		agenttest.Must(t, w.WriteHeader(&tar.Header{Name: f[0], Mode: 0o644, Size: int64(len(f[1]))}))
		_, err := io.WriteString(w, f[1])
		agenttest.Must(t, err)
	}
	agenttest.Must(t, errors.Join(w.Close(), z.Close()))
	return b.Bytes()
}

const clientsPolicy = `version: 1
rules:
  - name: all
    match: {trust: local}
    timeout: 5m
    limits: {memory: 2GiB, pids: 512, disk: 1GiB, log: 1MiB}
    egress:
      - {name: files.corp, port: %[3]d, protocol: http, resolve: [127.0.0.1]}
      - name: web.corp
        port: %[1]d
        protocol: https
        resolve: [127.0.0.1]
        ca: |
          %[2]s
        requests:
          - {methods: [GET], path: /npm/ours}
          - {methods: [GET], path: /npm/ours/**}
          - {methods: [GET], path: /pypi/simple/ours/}
          - {methods: [GET], path: /pypi/files/ours/*}
          - {methods: [GET], path: /go/corp.example/ours/@v/*}
          - {methods: [POST], path: /test.Echo/Ours, content-types: [application/grpc]}
          - {methods: [GET], path: /ws/ours, websocket: true}
`

// tries are what each client does with the name of a package, a method or a path.
func tries() [][2]string {
	return [][2]string{
		{"npm", `mkdir npm-$1; cd npm-$1; npm install --no-audit --no-fund --no-update-notifier --fetch-retries=0 --registry=$U/npm/ $1 && node -e "require('$1')"`},
		{"pip", `python3 -m pip install -q --no-input --disable-pip-version-check --retries 0 --no-cache-dir --target pip-$1 --index-url $U/pypi/simple/ $1 && python3 pip-$1/$1.py`},
		{"requests", `python3 -c "from pip._vendor import requests; r = requests.get('$U/pypi/simple/$1/'); r.raise_for_status(); print('requests $1')"`},
		{"urllib", `python3 -c "import urllib.request as r; r.urlopen('$U/pypi/simple/$1/').read(); print('urllib $1')"`},
		{"go", `mkdir go-$1; cd go-$1; $GO mod init x && $GO get corp.example/$1@v1.0.0 && grep -h Word "$($GO list -m -f '{{.Dir}}' corp.example/$1)/say.go"`},
		{"grpc", `case $1 in ours) M=Ours;; *) M=Theirs;; esac; $CLIENTS grpc ${U#https://} /test.Echo/$M "grpc $1"`},
		{"websocket", `$CLIENTS websocket $U/ws/$1 "websocket $1"`},
	}
}

// TestClients: the tools that fetch packages, and the libraries that speak over
// HTTP, work by what the rules allow, trust the gateway without being told, and
// get nothing else.
func TestClients(t *testing.T) {
	for _, tool := range []string{"npm", "node", "python3", "go"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%v; make deps installs what is missing", err)
		}
	}
	root, err := exec.Command("go", "env", "GOROOT").Output()
	agenttest.Must(t, err)
	clients, err := servertest.Dir(t.Context(), "clients")
	agenttest.Must(t, err)
	files := httptest.NewServer(http.FileServer(http.Dir(clients)))
	t.Cleanup(files.Close)
	at := files.URL[strings.LastIndex(files.URL, ":")+1:]
	port, ca := serveHandler(t, registries(t))
	w := agenttest.New(t, agenttest.Config{Policy: strings.Replace(fmt.Sprintf(clientsPolicy, port, strings.ReplaceAll(strings.TrimSpace(ca), "\n", "\n          "), 0), "port: 0", "port: "+at, 1)})
	a := w.Start(t)
	var text strings.Builder
	fmt.Fprintf(&text, "      - run: |\n          curl -sS -o clients http://files.corp:%s/clients\n          chmod +x clients\n", at)
	fmt.Fprintf(&text, "          export U=https://web.corp:%d CLIENTS=$PWD/clients GO=%s GOPROXY=https://web.corp:%d/go GOSUMDB=off GOTOOLCHAIN=local GOFLAGS=-mod=mod GOPATH=$PWD/gopath GOCACHE=$PWD/gocache npm_config_cache=$PWD/npmcache\n",
		port, filepath.Join(strings.TrimSpace(string(root)), "bin/go"), port)
	for _, try := range tries() {
		fmt.Fprintf(&text, "          try() ( %s )\n          (try ours) 2>&1 && echo '%[2]s: allowed' || echo '%[2]s: lost'\n          (try theirs) 2>&1 && echo '%[2]s: open' || echo '%[2]s: refused'\n", try[1], try[0])
	}
	id := w.Submit(t, w.Workflow(t, "clients", text.String()))
	r := w.Result(t, id, 2*bound)
	log := w.Log(t, id)
	if r.Conclusion != "success" {
		t.Fatalf("%s (%s), want a success:\n%s", r.Conclusion, r.Reason, log)
	}
	for _, try := range tries() {
		for _, want := range []string{try[0] + ": allowed\n", try[0] + ": refused\n", try[0] + " ours"} {
			if !strings.Contains(log, want) {
				t.Errorf("the log lacks %q", want)
			}
		}
	}
	out, code := w.Run(t, "audit", "show", "--output", "json")
	for _, path := range []string{"/npm/theirs", "/pypi/simple/theirs/", "/go/corp.example/theirs/", "/test.Echo/Theirs", "/ws/theirs"} {
		if !slices.ContainsFunc(strings.Split(out, "\n"), func(line string) bool {
			return strings.Contains(line, `"refused"`) && strings.Contains(line, path)
		}) {
			t.Errorf("the audit (%d) has no refusal of %s", code, path)
		}
	}
	if t.Failed() {
		t.Logf("%s\n%s", log, out)
	}
	a.Stop(t)
}
