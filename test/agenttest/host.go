package agenttest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// A Host is what an agent could leave behind: for each kind, all that there is.
type Host map[string][]string

// Snapshot lists the host as far as it is this world's, which in the namespaces
// of Main is everything but control groups, of which it is those below
// w.Cgroup, and loop devices, of which it is those with a file below w.Dir.
func (w *World) Snapshot(tb testing.TB) Host {
	tb.Helper()
	h := Host{}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	Must(tb, err)
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 4 {
			h.add("mounts", strings.Join(f[2:], " ")) // without its id
		}
	}
	Must(tb, errors.Join(w.files(h), w.groups(h), w.processes(h), w.sockets(h), w.loops(h), w.roles(tb.Context(), h), w.engine(tb.Context(), h)))
	for _, items := range h {
		slices.Sort(items)
	}
	return h
}

func (h Host) add(kind, item string) { h[kind] = append(h[kind], item) }

// Diff is what is in one of two snapshots only, with its kind.
func Diff(before, after Host) []string {
	var diff []string
	kinds := maps.Clone(before)
	maps.Copy(kinds, after)
	for _, kind := range slices.Sorted(maps.Keys(kinds)) {
		for _, item := range without(after[kind], before[kind]) {
			diff = append(diff, kind+": + "+item)
		}
		for _, item := range without(before[kind], after[kind]) {
			diff = append(diff, kind+": - "+item)
		}
	}
	return diff
}

// without removes each of b from a once: two of the same are not one.
func without(a, b []string) []string {
	left := slices.Clone(a)
	for _, item := range b {
		if i := slices.Index(left, item); i >= 0 {
			left = slices.Delete(left, i, i+1)
		}
	}
	return left
}

// Unchanged compares the host with what it was. What the kernel and an engine do
// behind an agent that has ended, such as burying the dead, gets a moment.
func (w *World) Unchanged(tb testing.TB, before Host) {
	tb.Helper()
	var diff []string
	most := 30 * time.Second
	if w.Engine != nil {
		most = 2 * time.Minute // it lets go of a container long after it has said so
	}
	Within(most, func() bool {
		diff = Diff(before, w.Snapshot(tb))
		return len(diff) == 0
	})
	if len(diff) > 0 {
		tb.Errorf("the host is not what it was:\n%s", strings.Join(diff, "\n"))
	}
}

// files are names and types below all directories for temporary files, where
// the world is too. Left out is what is kept on purpose: results, the database
// and the repository.
func (w *World) files(h Host) error {
	kept := append([]string{filepath.Join(w.Spool, "done"), w.Repository}, w.Lazy...)
	if w.Database != nil {
		kept = append(kept, w.Database.Dir())
	}
	for _, root := range []string{"/tmp", "/var/tmp", "/dev/shm", "/run"} {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			if slices.Contains(kept, path) {
				return fs.SkipDir
			}
			h.add("files", path+" "+d.Type().String())
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (w *World) groupRoots() []string {
	roots, _ := filepath.Glob("/sys/fs/cgroup/*/" + w.Cgroup) // the pattern is good
	return append(roots, filepath.Join("/sys/fs/cgroup", w.Cgroup))
}

func (w *World) groups(h Host) error {
	for _, root := range w.groupRoots() {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				h.add("cgroups", path)
			}
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// removeGroups removes the parents that the agent keeps for its next life.
func (w *World) removeGroups(tb testing.TB) {
	h := Host{}
	if err := w.groups(h); err != nil {
		tb.Error(err)
	}
	slices.Sort(h["cgroups"])
	slices.Reverse(h["cgroups"])
	for _, dir := range h["cgroups"] {
		if err := os.Remove(dir); err != nil {
			tb.Errorf("a control group is left: %v", err)
		}
	}
}

// processes are all but the database's, which come and go, and the network
// namespaces that they are in.
func (w *World) processes(h Host) error {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		stat, err := os.ReadFile(filepath.Join(dir, "stat"))
		if err != nil {
			continue // ended
		}
		head, rest, _ := strings.Cut(string(stat), ") ")
		fields := strings.Fields(rest)
		if len(fields) < 20 || strings.HasSuffix(head, "(postgres") {
			continue
		}
		state := ""
		if fields[0] == "Z" {
			state = " dead"
		}
		h.add("processes", head+") begun at "+fields[19]+state)
		if net, err := os.Readlink(filepath.Join(dir, "ns/net")); err == nil && !slices.Contains(h["namespaces"], net) {
			h.add("namespaces", net)
		}
	}
	return nil
}

// sockets are those that listen, on the network or at a path.
func (w *World) sockets(h Host) error {
	for _, table := range []string{"tcp", "tcp6", "udp", "udp6", "raw", "unix"} {
		b, err := os.ReadFile("/proc/net/" + table)
		if errors.Is(err, fs.ErrNotExist) {
			continue // no IPv6 on this machine
		}
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			switch {
			case table == "unix" && len(f) > 7 && f[7] != "Path":
				if w.Database == nil || !strings.HasPrefix(f[7], w.Database.Dir()) {
					h.add("sockets", f[7])
				}
			case table != "unix" && len(f) > 3 && f[0] != "sl" && (f[3] == "0A" || f[3] == "07"):
				if w.Database == nil || !strings.HasSuffix(f[1], fmt.Sprintf(":%04X", w.Database.Port())) {
					h.add("sockets", table+" "+f[1])
				}
			}
		}
	}
	return nil
}

func (w *World) loops(h Host) error {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, f := range files {
		if backing, err := os.ReadFile(f); err == nil && strings.Contains(string(backing), w.Dir+"/") {
			h.add("loops", f+" "+strings.TrimSpace(string(backing)))
		}
	}
	return err
}

func (w *World) engine(ctx context.Context, h Host) error {
	if w.Engine == nil {
		return nil
	}
	left, err := w.Engine(ctx)
	for _, item := range left {
		h.add("engine", item)
	}
	return err
}

func (w *World) roles(ctx context.Context, h Host) (err error) {
	if w.Database == nil {
		return nil
	}
	names, err := Query(ctx, w, "select rolname from pg_roles where rolname !~ '^pg_' union all select 'schema ' || nspname from pg_namespace where nspname !~ '^pg_'")
	for _, name := range names {
		h.add("roles", name)
	}
	return err
}

// Query asks the database of the world, as its administrator, for one column of
// text.
func Query(ctx context.Context, w *World, sql string) ([]string, error) {
	c, err := pgx.ParseConfig("host=127.0.0.1 port=" + strconv.Itoa(w.Database.Port()) + " user=postgres dbname=postgres sslmode=disable")
	if err != nil {
		return nil, err
	}
	c.Password = w.Database.Password()
	db, err := pgx.ConnectConfig(ctx, c)
	if err != nil {
		return nil, err
	}
	rows, err := db.Query(ctx, sql)
	var found []string
	if err == nil {
		found, err = pgx.CollectRows(rows, pgx.RowTo[string])
	}
	return found, errors.Join(err, db.Close(context.WithoutCancel(ctx)))
}
