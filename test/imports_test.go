package test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/mayfly-ci/mayfly"

// A row says which packages of this module a package may import. A name that
// ends in /... stands for everything below; of several rows that fit a package
// the longest name counts. ARCHITECTURE.md shows the same rows.
type row struct {
	pkg string
	may string // space between; "" is none, "..." is any
	why string
}

// In one sentence: contracts import nothing, implementations import their
// contract, the runner imports contracts, cmd imports everything.
func table() []row {
	return []row{
		{"creds", "", "a contract; Secret is needed everywhere"},
		{"creds/...", "creds creds/web", "an issuer knows its contract and its provider, and no other part"},
		{"creds/web", "", "how issuers speak HTTP; it knows no issuer"},
		{"providers", "creds", "a contract; a CI service puts secrets of its own into a job"},
		{"providers/...", "providers creds providers/workflow", "a service knows its contract and the workflow syntax, and no box"},
		{"sandbox", "creds", "a contract; an image is pulled with a secret"},
		{"sandbox/...", "sandbox creds sandbox/egress sandbox/netns sandbox/guest sandbox/wall", "a runtime builds boxes and their network, and knows neither jobs nor policy"},
		{"sandbox/kernel", "sandbox", "what runtimes on one kernel share; it knows no runtime"},
		{"sandbox/mountpoint", "", "linked into process 1"},
		{"sandbox/native", "sandbox creds sandbox/egress sandbox/netns sandbox/guest sandbox/kernel sandbox/gvisor sandbox/image sandbox/native/boxinit sandbox/mountpoint", "a runtime, and what it makes of the first process of a box"},
		{"sandbox/gvisor", "sandbox sandbox/gvisor/keeper", "a kernel of a box's own, whatever makes the box"},
		{"sandbox/gvisor/keeper", "sandbox/guest/serve", "linked into process 1, which it is in place of the guest"},
		{"sandbox/image", "sandbox", "a store of images; it knows no runtime"},
		{"sandbox/native/boxinit", "sandbox/netns sandbox/mountpoint sandbox/gvisor/keeper", "linked into process 1 of a box, which is small and starts fast: not even the contract"},
		{"sandbox/wall", "sandbox sandbox/egress", "looks at a box through both contracts, whatever made it"},
		{"sandbox/engine", "sandbox sandbox/egress sandbox/netns sandbox/guest sandbox/guest/wire sandbox/kernel sandbox/mountpoint sandbox/gvisor sandbox/gvisor/keeper", "what runtimes over a container engine share; it meets the guest at an address that the protocol knows"},
		{"sandbox/engine/enginetest", "sandbox sandbox/kernel sandbox/sandboxtest", "what the tests of those runtimes share"},
		{"sandbox/containerd", "sandbox creds sandbox/kernel sandbox/engine sandbox/gvisor", "a runtime; the box is finished by what engines share"},
		{"sandbox/docker", "sandbox creds sandbox/kernel sandbox/engine sandbox/gvisor", "a runtime; the box is finished by what engines share"},
		{"sandbox/guest", "sandbox sandbox/guest/wire", "the agent's end of the stream to a box"},
		{"sandbox/guest/wire", "", "linked into process 1"},
		{"sandbox/guest/serve", "sandbox/guest/wire", "linked into process 1"},
		{"sandbox/netns", "", "linked into process 1"},
		{"sandbox/netns/netnstest", "sandbox/netns sandbox/egress", "the inside of a box's network, for tests of gateways"},
		{"sandbox/egress", "creds", "a contract; rules carry credentials that the gateway adds"},
		{"sandbox/egress/...", "sandbox/egress creds", "a gateway serves sockets and does not care which runtime made them"},
		{"sandbox/egress/sigv4", "", "pure: requests and keys go in, signatures come out"},
		{"sandbox/egress/gateway", "sandbox/egress sandbox/egress/sigv4 creds creds/mask sandbox/netns", "a gateway, which dials into the network of a service's box, and hides in answers the credentials that it adds"},
		{"runner/audit", "", "a contract; an auditor reads the file without the agent"},
		{"runner/audit/...", "runner/audit", "the suite of the contract"},
		{"runner/monitor", "runner runner/audit", "looks at the agent and counts its audit; the agent does not know it"},
		{"runner/gitcache", "creds", "git objects on the agent's disk; it is told a repository and knows no provider"},
		{"runner/outbound", "creds runner/audit", "the agent's own way out; it is handed to implementations as functions, and knows none"},
		{"runner/policy", "providers sandbox sandbox/egress creds configs/strict configs/egress", "pure: types of the contracts, the decoder that refuses unknown keys, and the sets of rules that a policy names"},
		{"runner/internal/...", "runner/internal/... creds", "the journal knows names and handles, which do not print, and not what they stand for"},
		{"runner/console", "runner sandbox", "the socket of mayfly shell: what it carries is a runner.Shell"},
		{"runner", "providers providers/workflow sandbox sandbox/egress sandbox/wall creds creds/mask runner/policy runner/audit runner/gitcache runner/internal/...", "the life of a job is written against contracts: it knows no implementation"},
		{"configs/strict", "", "one way to read YAML, for configuration and policy"},
		{"configs/egress", "", "files of rules, and their names"},
		{"configs", "configs/strict creds", "splits a file into sections, which their owners decode; a secret is named by its file"},
		{"cmd/mayfly-guest", "sandbox/guest/serve sandbox/native/boxinit sandbox/gvisor/keeper", "process 1 of a box"},
		{"cmd/mayfly", "...", "the only place that knows implementations"},
		{"test/...", "...", "tests of the whole"},
	}
}

// A confinement says which packages may import a module of somebody else.
type confinement struct {
	module string
	pkgs   string // these packages
	tests  string // and the tests of these
	why    string
}

func confinements() []confinement {
	return []confinement{
		{"github.com/docker/docker", "sandbox/docker test/dockertest test/bench", "sandbox/docker test/...", "one runtime speaks to a Docker Engine"},
		{"github.com/containerd/errdefs", "sandbox/docker sandbox/containerd test/containerdtest", "sandbox/docker sandbox/containerd", "what the errors of both clients are made of"},
		{"github.com/containerd/errdefs/pkg", "sandbox/containerd", "", "what they are on the wire"},
		{"github.com/containerd/containerd/v2", "sandbox/containerd sandbox/image test/containerdtest test/bench", "sandbox/containerd", "one runtime speaks to containerd; its archive package applies layers"},
		{"github.com/containerd/containerd/api", "sandbox/containerd test/containerdtest", "sandbox/containerd", "its messages about tasks, which the client wraps in more than a box needs"},
		{"github.com/containerd/typeurl/v2", "sandbox/containerd", "sandbox/containerd", "how containerd carries a specification"},
		{"github.com/containerd/log", "sandbox/containerd", "", "to silence it: implementations return errors and do not log"},
		{"github.com/containerd/platforms", "sandbox/containerd", "sandbox/containerd", "which image of an index is for this machine"},
		{"github.com/distribution/reference", "sandbox/engine", "sandbox/engine", "names of images as people write them"},
		{"github.com/opencontainers/go-digest", "sandbox/containerd", "sandbox/containerd", "digests, in that client's calls"},
		{"github.com/opencontainers/image-spec", "sandbox/containerd", "sandbox/containerd", "manifests, in that client's calls"},
		{"github.com/opencontainers/runtime-spec", "sandbox/containerd", "sandbox/containerd", "what an OCI runtime is told"},
		{"github.com/google/go-containerregistry", "sandbox/image test/imagetest", "sandbox/... test/...", "one package reads images; tests make them, and a registry"},
		{"github.com/klauspost/compress", "sandbox/image", "sandbox/image", "layers may be packed with zstd"},
		{"github.com/go-jose/go-jose/v4", "", "creds/oidc test/broker", "verifies our tokens as a provider does"},
		{"github.com/jackc/pgx/v5", "creds/postgres test/... sandbox/egress/gateway sandbox/egress/egresstest", "creds/postgres runner cmd/mayfly", "one issuer speaks PostgreSQL"},
		{"golang.org/x/crypto", "creds/ssh sandbox/egress/gateway sandbox/egress/egresstest test/...", "creds/ssh", "one issuer signs SSH certificates"},
		{"golang.org/x/oauth2", "creds/oauth2", "", "one issuer speaks OAuth 2.0"},
		{"github.com/aws/aws-sdk-go-v2", "creds/aws test/miniotest", "creds/aws", "signs requests; its clients are not taken"},
		{"github.com/google/cel-go", "runner/policy", "", "conditions of a policy, and of nothing else"},
		{"github.com/google/go-github/v60", "creds/githubapp", "", "one issuer speaks to GitHub"},
		{"github.com/jackc/pgx/v5", "creds/postgres test/...", "creds/postgres runner cmd/mayfly", "one issuer speaks PostgreSQL"},
		{"github.com/rhysd/actionlint", "providers/workflow", "providers/workflow", "a parser with types of its own: they end at the package that uses it"},
		{"go.yaml.in/yaml/v4", "configs/strict providers/workflow", "configs/strict", "one way to read YAML; providers/workflow counts aliases with it before it parses"},
		{"github.com/google/nftables", "", "sandbox/...", "checks the ruleset that the box is given as bytes"},
		{"github.com/mdlayher/netlink", "", "sandbox/...", "as nftables"},
		{"github.com/elastic/go-seccomp-bpf", "sandbox/kernel", "sandbox/kernel", "one package writes system call filters"},
		{"github.com/rs/zerolog", "cmd/mayfly runner test/...", "...", "implementations return errors and do not log"},
		{"github.com/prometheus/client_golang", "runner/monitor", "", "one package shows metrics"},
		{"google.golang.org/grpc", "", "sandbox/egress/gateway test/https", "a real gRPC client and server, to test the gateway between them"},
		{"google.golang.org/protobuf", "", "sandbox/egress/gateway test/https", "their messages"},
		{"github.com/rogpeppe/go-internal", "", "...", "test scripts"},
		{"golang.org/x/net", "sandbox/egress/... sandbox/wall sandbox/kernel sandbox/netns/... test/...", "...", "DNS messages and packet filters"},
		{"golang.org/x/sys", "sandbox/native/... sandbox/gvisor/... sandbox/engine/... sandbox/containerd sandbox/image sandbox/kernel sandbox/mountpoint sandbox/guest/... sandbox/netns/... sandbox/egress/... runner runner/console runner/gitcache runner/internal/... runner/monitor cmd/... test/... providers/local", "...", "system calls; the contracts name none"},
	}
}

// A listed package is what "go list -json" says of one.
type listed struct {
	ImportPath, Name                   string
	GoFiles                            []string
	Imports, TestImports, XTestImports []string
}

func (l listed) pkg() string {
	return strings.TrimPrefix(strings.TrimPrefix(l.ImportPath, module), "/")
}

func TestImports(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for _, tags := range []string{"", "failpoint"} {
		pkgs := list(t, tags)
		for _, finding := range slices.Concat(badImports(table(), pkgs), badModules(confinements(), pkgs)) {
			if !seen[finding] {
				t.Error(finding)
			}
			seen[finding] = true
		}
	}
}

// TestImportsCanFail gives the tables packages that break them.
func TestImportsCanFail(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ pkg, imp, want string }{
		{"creds", "sandbox", "creds must not import sandbox"},
		{"sandbox", "providers", "sandbox must not import providers"},
		{"providers/local", "sandbox", "providers/local must not import sandbox"},
		{"providers/local", "providers/github", "must not import providers/github"},
		{"sandbox/native", "runner/policy", "must not import runner/policy"},
		{"sandbox/guest/serve", "sandbox", "must not import sandbox"},
		{"sandbox/guest/serve", "sandbox/guest", "must not import sandbox/guest"},
		{"sandbox/netns", "sandbox/guest", "must not import sandbox/guest"},
		{"runner", "sandbox/native", "must not import sandbox/native"},
		{"runner", "creds/postgres", "must not import creds/postgres"},
		{"runner/policy", "runner", "must not import runner"},
		{"runner", "runner/monitor", "must not import runner/monitor"},
		{"runner/audit", "creds", "must not import creds"},
		{"configs", "runner", "must not import runner"},
		{"cmd/mayfly-guest", "sandbox", "must not import sandbox"},
		{"plugins", "creds", "no row for plugins"},
		{"cmd/mayfly", "sandbox/native", ""},
		{"runner", "creds/mask", ""},
		{"providers/github", "providers/workflow", ""},
		{"sandbox/native", "sandbox/native/boxinit", ""},
		{"test/crash", "runner", ""},
	} {
		got := badImports(table(), []listed{{ImportPath: module + "/" + c.pkg, Imports: []string{"fmt", module + "/" + c.imp}}})
		expect(t, fmt.Sprintf("%s imports %s", c.pkg, c.imp), got, c.want)
	}
	const pgx = "github.com/jackc/pgx/v5"
	for _, c := range []struct {
		pkg  listed
		want string
	}{
		{listed{Imports: []string{pgx}}, "must not import " + pgx},
		{listed{Imports: []string{pgx + "/pgconn"}}, "must not import " + pgx + "/pgconn"},
		{listed{XTestImports: []string{pgx}}, "the tests of creds/vault must not import " + pgx},
		{listed{Imports: []string{"example.com/x"}}, "no row for example.com/x"},
		{listed{TestImports: []string{"example.com/x"}}, "no row for example.com/x"},
		{listed{Imports: []string{"net/http", "encoding/json/v2", module + "/creds"}}, ""},
	} {
		c.pkg.ImportPath = module + "/creds/vault"
		expect(t, fmt.Sprintf("%+v", c.pkg), badModules(confinements(), []listed{c.pkg}), c.want)
	}
}

func expect(t *testing.T, what string, got []string, want string) {
	t.Helper()
	if (len(got) > 0) != (want != "") || !strings.Contains(strings.Join(got, "\n"), want) {
		t.Errorf("%s: the rule says %q, want %q", what, got, want)
	}
}

// badImports reports imports inside the module that the table does not allow.
func badImports(rows []row, pkgs []listed) []string {
	var found []string
	for _, p := range pkgs {
		r, ok := rowOf(rows, p.pkg())
		if !ok {
			if p.pkg() != "test" {
				found = append(found, fmt.Sprintf("no row for %s: say in imports_test.go what it may import, and why", p.pkg()))
			}
			continue
		}
		for _, imp := range p.Imports {
			in, ours := strings.CutPrefix(imp, module+"/")
			if ours && !matches(r.may, in) {
				found = append(found, fmt.Sprintf("%s must not import %s: %s", p.pkg(), in, r.why))
			}
		}
	}
	return found
}

// rowOf is the row with the longest name that fits pkg.
func rowOf(rows []row, pkg string) (row, bool) {
	var best row
	for _, r := range rows {
		if matches(r.pkg, pkg) && len(r.pkg) > len(best.pkg) {
			best = r
		}
	}
	return best, best.pkg != ""
}

// matches reports whether one of the patterns stands for pkg.
func matches(patterns, pkg string) bool {
	return slices.ContainsFunc(strings.Fields(patterns), func(p string) bool {
		below, ok := strings.CutSuffix(p, "...")
		return p == pkg || ok && (strings.HasPrefix(pkg, below) || pkg+"/" == below)
	})
}

// badModules reports imports of other modules that are not confined there.
func badModules(rows []confinement, pkgs []listed) []string {
	var found []string
	for _, p := range pkgs {
		for _, imp := range p.Imports {
			if c, ok := confined(rows, imp, &found); ok && !matches(c.pkgs, p.pkg()) {
				found = append(found, fmt.Sprintf("%s must not import %s: %s", p.pkg(), imp, c.why))
			}
		}
		for _, imp := range slices.Concat(p.TestImports, p.XTestImports) {
			if c, ok := confined(rows, imp, &found); ok && !matches(c.pkgs, p.pkg()) && !matches(c.tests, p.pkg()) {
				found = append(found, fmt.Sprintf("the tests of %s must not import %s: %s", p.pkg(), imp, c.why))
			}
		}
	}
	return found
}

// confined is the row of a package of somebody else. One without a row is a
// finding.
func confined(rows []confinement, imp string, found *[]string) (confinement, bool) {
	first, _, _ := strings.Cut(imp, "/")
	if !strings.Contains(first, ".") || imp == module || strings.HasPrefix(imp, module+"/") {
		return confinement{}, false
	}
	for _, c := range rows {
		if imp == c.module || strings.HasPrefix(imp, c.module+"/") {
			return c, true
		}
	}
	*found = append(*found, fmt.Sprintf("no row for %s: say in imports_test.go who may import it, and why", imp))
	return confinement{}, false
}

// list asks the go command for all packages of the module.
func list(t *testing.T, tags string) []listed {
	t.Helper()
	out := run(t, "go", "list", "-e", "-buildvcs=false", "-tags="+tags, "-json=ImportPath,Name,GoFiles,Imports,TestImports,XTestImports", "./...")
	var pkgs []listed
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("go list: %v", err)
		}
		pkgs = append(pkgs, p)
	}
	if len(pkgs) < 10 {
		t.Fatalf("go list names %d packages, want all of them", len(pkgs))
	}
	return pkgs
}

// run executes a command in the module's directory for what it prints.
func run(t *testing.T, name string, args ...string) []byte {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(cmd.Args, " "), err, &stderr)
	}
	return out
}

// read is a file of the repository.
func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
