package test

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the golden files from what is there")

// TestGuestDependencies compares what process 1 of a box is linked from with a
// list that is kept here, so that one package more is a line of a review: it
// costs every job memory and time, and runs before the box is closed. Internal
// packages of the standard library are left out; they change with Go.
func TestGuestDependencies(t *testing.T) {
	t.Parallel()
	const golden = "testdata/guest-deps.txt"
	got := guestDeps(string(run(t, "go", "list", "-buildvcs=false", "-deps", "./cmd/mayfly-guest")))
	if *update {
		if err := os.MkdirAll(filepath.Dir(golden), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(golden, []byte(strings.Join(got, "\n")+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	for _, finding := range differences(got, strings.Fields(string(b))) {
		t.Errorf("%s; if it must be so: go test ./test -run GuestDependencies -update", finding)
	}
	expect(t, "one package more", differences([]string{"io", "net"}, []string{"io"}), "process 1 now links net")
	expect(t, "one package less", differences([]string{"io"}, []string{"io", "net"}), "process 1 no longer links net")
	expect(t, "no change", differences([]string{"io"}, []string{"io"}), "")
	if got := guestDeps("internal/abi\nio\nvendor/golang.org/x/net/dns\n" + module + "/runner/internal/seal\n"); len(got) != 2 {
		t.Errorf("of four packages, two of them internal to Go, %q are kept", got)
	}
}

// guestDeps are the packages of a list that are not internal to Go.
func guestDeps(out string) []string {
	return slices.DeleteFunc(strings.Fields(out), func(p string) bool {
		first, _, _ := strings.Cut(p, "/")
		return !strings.Contains(first, ".") && (first == "vendor" || strings.Contains("/"+p+"/", "/internal/"))
	})
}

func differences(got, want []string) []string {
	var found []string
	for _, p := range got {
		if !slices.Contains(want, p) {
			found = append(found, "process 1 now links "+p)
		}
	}
	for _, p := range want {
		if !slices.Contains(got, p) {
			found = append(found, "process 1 no longer links "+p)
		}
	}
	return found
}

// TestDependenciesAreDecided: each direct dependency is confined to some
// packages and has its line of reason among the decisions.
func TestDependenciesAreDecided(t *testing.T) {
	t.Parallel()
	var mod struct {
		Require []struct {
			Path     string
			Indirect bool
		}
	}
	if err := json.Unmarshal(run(t, "go", "mod", "edit", "-json"), &mod); err != nil {
		t.Fatal(err)
	}
	var direct []string
	for _, r := range mod.Require {
		if !r.Indirect {
			direct = append(direct, r.Path)
		}
	}
	paths, err := filepath.Glob(filepath.Join(root, "docs/adr/*.md"))
	if err != nil || len(paths) == 0 {
		t.Fatalf("docs/adr holds no decisions (%v)", err)
	}
	var decisions strings.Builder
	for _, p := range paths {
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		decisions.Write(b)
	}
	for _, finding := range undecided(direct, confinements(), decisions.String()) {
		t.Error(finding)
	}
	rows := []confinement{{module: "example.com/a"}}
	expect(t, "no decision", undecided([]string{"example.com/a"}, rows, "we use `example.com/ab`"), "docs/adr does not say why")
	expect(t, "no row", undecided([]string{"example.com/b"}, rows, "we use `example.com/b` and `example.com/a`"), "no row")
	expect(t, "row without use", undecided(nil, rows, ""), "no direct dependency")
	expect(t, "decided", undecided([]string{"example.com/a"}, rows, "we use `example.com/a`, for"), "")
}

func undecided(direct []string, rows []confinement, decisions string) []string {
	var found []string
	for _, m := range direct {
		named := regexp.MustCompile(`(^|[^\w/.-])` + regexp.QuoteMeta(m) + `($|[^\w/-])`)
		if !named.MatchString(decisions) {
			found = append(found, "docs/adr does not say why "+m+" is needed")
		}
		if !slices.ContainsFunc(rows, func(c confinement) bool { return c.module == m }) {
			found = append(found, "no row for "+m+": say in imports_test.go who may import it, and why")
		}
	}
	for _, c := range rows {
		if !slices.Contains(direct, c.module) {
			found = append(found, c.module+" has a row in imports_test.go and is no direct dependency (go mod tidy?)")
		}
	}
	return found
}

// TestArchitecture: the page that people read says what the test holds.
func TestArchitecture(t *testing.T) {
	t.Parallel()
	for _, finding := range undescribed(table(), read(t, "ARCHITECTURE.md")) {
		t.Error(finding)
	}
	rows := []row{{pkg: "creds/...", may: "creds a/b"}}
	expect(t, "a row is missing", undescribed(rows, "text"), "ARCHITECTURE.md lacks")
	expect(t, "a row differs", undescribed(rows, "| `creds/...` | issuers | `creds` |"), "ARCHITECTURE.md lacks")
	expect(t, "a row too many", undescribed(nil, "| `creds/...` | issuers | `creds` |"), "no row in imports_test.go")
	expect(t, "the same", undescribed(rows, "| `creds/...` | issuers | `creds` `a/b` |"), "")
}

// undescribed compares the rows with a table of package | meaning | may import.
func undescribed(rows []row, page string) []string {
	want := map[string]bool{}
	for _, r := range rows {
		may := "nothing"
		if r.may == "..." {
			may = "anything"
		} else if r.may != "" {
			may = "`" + strings.ReplaceAll(r.may, " ", "` `") + "`"
		}
		want["`"+r.pkg+"` may import "+may] = true
	}
	var found []string
	for line := range strings.Lines(page) {
		cells := strings.Split(strings.TrimSpace(line), " | ")
		if len(cells) != 3 || !strings.HasPrefix(cells[0], "| `") {
			continue
		}
		says := cells[0][2:] + " may import " + strings.TrimSuffix(cells[2], " |")
		if !want[says] {
			found = append(found, "ARCHITECTURE.md says "+says+": no row in imports_test.go does")
		}
		delete(want, says)
	}
	for says := range want {
		found = append(found, "ARCHITECTURE.md lacks: "+says)
	}
	slices.Sort(found)
	return found
}
