package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/mayfly-ci/mayfly/test/containerdtest"
	"github.com/mayfly-ci/mayfly/test/dockertest"
	"github.com/mayfly-ci/mayfly/test/imagetest"
	"github.com/mayfly-ci/mayfly/test/postgrestest"
)

// The command is this test's own binary.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"mayfly": func() { os.Exit(mainExit(os.Args[1:], os.Stdout, os.Stderr)) },
	})
}

// TestScript types what a user would. Boxes are real, so it needs root and the
// guest (make guest); what a script makes stays below $WORK.
//
// Beside the commands of testscript, scripts have: code, eventually, nobody,
// flip, database, freeport, canary, engine and containerd, each explained below.
func TestScript(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Fatal("not root: boxes with limits need it (make test runs as root)")
	}
	if _, err := os.Stat(defaultConfig); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("%s: got %v, want a machine without a configuration: exec and doctor would use it", defaultConfig, err)
	}
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup:               setup,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"code": code, "eventually": eventually, "nobody": nobody, "flip": flip, "database": database,
			"freeport": freeport, "canary": canary, "engine": startEngine, "containerd": startContainerd,
			"archived": archived,
			"runsc":    runsc,
		},
	})
}

func setup(e *testscript.Env) error {
	e.Setenv("HOME", filepath.Join(e.WorkDir, "home"))
	e.Setenv("GIT_CONFIG_COUNT", "3")
	for i, kv := range [][2]string{{"user.name", "a"}, {"user.email", "a@example.com"}, {"init.defaultBranch", "main"}} {
		e.Setenv(fmt.Sprint("GIT_CONFIG_KEY_", i), kv[0])
		e.Setenv(fmt.Sprint("GIT_CONFIG_VALUE_", i), kv[1])
	}
	e.Defer(func() { removeGroups(e.WorkDir) })
	return os.MkdirAll(filepath.Join(e.WorkDir, "home"), 0o755)
}

// removeGroups removes the parent control groups of the runtimes below dir,
// which outlive an agent. They are empty, or the box in them is what a test
// has to find.
func removeGroups(dir string) {
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && d.Name() == "boxes-native" {
			sum := sha256.Sum256([]byte(path))
			for _, pattern := range []string{"/sys/fs/cgroup/mayfly/%x", "/sys/fs/cgroup/*/mayfly/%x"} {
				groups, _ := filepath.Glob(fmt.Sprintf(pattern, sum[:6]))
				for _, g := range groups {
					_ = os.Remove(g)
				}
			}
		}
		return nil
	})
}

// code N COMMAND... wants the exit status N.
func code(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: code N COMMAND [ARGUMENT...]")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	var exit *exec.ExitError
	if err := ts.Exec(args[1], args[2:]...); errors.As(err, &exit) {
		got = exit.ExitCode()
	} else if err != nil {
		ts.Fatalf("%v", err)
	}
	if got != want {
		ts.Fatalf("%s: got exit status %d, want %d", strings.Join(args[1:], " "), got, want)
	}
}

// eventually PATTERN COMMAND... runs the command until its output matches.
func eventually(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: eventually PATTERN COMMAND [ARGUMENT...]")
	}
	re, err := regexp.Compile("(?m)" + args[0])
	ts.Check(err)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); <-tick.C {
		// Not ts.Exec, which puts every attempt into the log of the test.
		cmd := exec.Command(args[1], args[2:]...)
		cmd.Dir = ts.MkAbs(".")
		if out, err := cmd.Output(); err != nil || !re.Match(out) {
			continue
		}
		// What is seen on the way to something else may be over already.
		if ts.Exec(args[1], args[2:]...) == nil && re.MatchString(ts.ReadFile("stdout")) {
			return
		}
	}
	ts.Check(ts.Exec(args[1], args[2:]...))
	ts.Fatalf("got no line that matches %s in two minutes", args[0])
}

// nobody N ARGUMENT... runs mayfly as an ordinary user and wants the exit
// status N. The user owns $WORK from then on.
func nobody(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: nobody N ARGUMENT...")
	}
	const user = 65534
	work := ts.Getenv("WORK")
	program := filepath.Join(work, "mayfly")
	if _, err := os.Stat(program); err != nil {
		from, err := exec.LookPath("mayfly")
		ts.Check(err)
		// A child of another script could inherit our descriptor for writing,
		// and the program would be busy.
		ts.Check(ts.Exec("install", "-m", "755", from, program))
		ts.Check(filepath.WalkDir(work, func(path string, d fs.DirEntry, err error) error {
			return errors.Join(err, os.Lchown(path, user, user))
		}))
		for dir := work; dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
			ts.Check(os.Chmod(dir, 0o755))
		}
	}
	code(ts, false, append([]string{args[0], "setpriv", fmt.Sprint("--reuid=", user), fmt.Sprint("--regid=", user), "--clear-groups", program}, args[1:]...))
}

// flip WORD FILE... changes one byte: the first of the first WORD in the files.
func flip(ts *testscript.TestScript, neg bool, args []string) {
	for _, path := range args[1:] {
		text := ts.ReadFile(path)
		at := strings.Index(text, args[0])
		if at < 0 || neg {
			ts.Fatalf("%s: got no %q in it", path, args[0])
		}
		ts.Check(os.WriteFile(ts.MkAbs(path), []byte(text[:at]+string(text[at]^1)+text[at+1:]), 0o600))
	}
}

// startEngine starts a Docker daemon with the images of dockertest: its address is
// in $ENGINE.
func startEngine(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 {
		ts.Fatalf("usage: engine")
	}
	dir, err := os.MkdirTemp("", "mayfly-script-")
	ts.Check(err)
	ts.Defer(func() { ts.Check(os.RemoveAll(dir)) })
	d, err := dockertest.New(context.Background(), filepath.Join(dir, "docker"))
	ts.Check(err)
	ts.Defer(func() { ts.Check(d.Close()) })
	ts.Setenv("ENGINE", d.Host())
}

// startContainerd starts a containerd with the same images: its address is in $ENGINE.
func startContainerd(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 {
		ts.Fatalf("usage: containerd")
	}
	dir, err := os.MkdirTemp("", "mayfly-script-")
	ts.Check(err)
	ts.Defer(func() { ts.Check(os.RemoveAll(dir)) })
	ts.Check(os.Chmod(dir, 0o711)) // root of a user namespace goes through it
	d, err := containerdtest.New(context.Background(), filepath.Join(dir, "containerd"), containerdtest.Packaged)
	ts.Check(err)
	ts.Defer(func() { ts.Check(d.Close()) })
	ts.Setenv("ENGINE", d.Address())
}

// archived FILE makes an archive of an image of busybox, as an OCI layout.
func archived(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: archived FILE")
	}
	ts.Check(imagetest.BusyboxArchive(ts.MkAbs(args[0])))
}

// database starts a server: its port is in $PGPORT, and the administrator's
// password in $WORK/db.pass.
func database(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 {
		ts.Fatalf("usage: database")
	}
	dir, err := os.MkdirTemp("", "mayfly-script-")
	ts.Check(err)
	ts.Defer(func() { ts.Check(os.RemoveAll(dir)) })
	ts.Check(os.Chmod(dir, 0o711))
	s, err := postgrestest.New(context.Background(), filepath.Join(dir, "pg"))
	ts.Check(err)
	ts.Defer(func() { ts.Check(s.Close()) })
	ts.Setenv("PGPORT", strconv.Itoa(s.Port()))
	ts.Check(os.WriteFile(ts.MkAbs("db.pass"), []byte(s.Password()+"\n"), 0o600))
}
