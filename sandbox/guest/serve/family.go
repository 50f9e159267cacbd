package serve

import (
	"bytes"
	"errors"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// maxFreezes bounds how often /proc is read for one kill. Each round finds only
// what was forked before its parent was stopped in the round before, so a few
// are enough; a process that is not found in as many has outrun its limits.
const maxFreezes = 64

// clearTime is how long processes may take to die of a SIGKILL. It takes
// microseconds, and longer for one that waits for a disk.
const clearTime = 5 * time.Second

// errSurvivors is the end of a box in which a command is to be alone and cannot.
var errSurvivors = errors.New("processes of the box outlive a SIGKILL")

// clear kills every process of the box but the guest, and reports whether none
// is left. The kernel kills all of them at once (kill(2), -1), so that none can
// fork its way out. A guest that is not process 1 (a test) has no box to clear.
func (g *guest) clear() bool {
	if !g.children.init {
		return true
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(clearTime); time.Now().Before(end); {
		_ = unix.Kill(-1, unix.SIGKILL) // there is nobody to kill
		if len(processes()) == 0 {
			return true
		}
		select {
		case <-tick.C:
		case <-g.done:
			return false
		}
	}
	return false
}

// A process is a line of /proc. Its start time tells it from a later process
// with the same id.
type process struct {
	pid, parent, group, session int
	started                     uint64
}

// A family is a step's process and what descends from it. Membership is kept
// once seen: a child that made a session of its own and whose parent has ended
// is not to be recognised any more.
type family struct {
	leader   int
	children *children
	members  map[int]process
}

func newFamily(leader int, c *children) *family {
	return &family{leader: leader, children: c}
}

// signal asks the process group of the step, and notes who belongs to it.
func (f *family) signal(s unix.Signal) {
	f.children.mu.Lock()
	defer f.children.mu.Unlock()
	f.look()
	if f.children.runs(f.leader) { // else it has ended, and the id may be another's
		_ = unix.Kill(-f.leader, s) // a group that has gone needs no signal
	}
}

// kill ends every member. They are stopped first, until no new one is found, so
// that none can fork its way out between the look and the kill.
func (f *family) kill() {
	f.children.mu.Lock()
	defer f.children.mu.Unlock()
	stopped := make(map[int]bool)
	for range maxFreezes {
		f.look()
		found := false
		for pid := range f.members {
			if !stopped[pid] {
				stopped[pid], found = true, true
				_ = unix.Kill(pid, unix.SIGSTOP) // it has gone
			}
		}
		if !found {
			break
		}
	}
	for pid := range f.members {
		_ = unix.Kill(pid, unix.SIGKILL) // it has gone
	}
	if f.children.runs(f.leader) {
		_ = unix.Kill(-f.leader, unix.SIGKILL) // the same
	}
}

// look brings the members up to date with /proc.
func (f *family) look() {
	all := processes()
	members := make(map[int]process)
	for _, p := range all {
		known, ok := f.members[p.pid]
		if p.session == f.leader || p.group == f.leader || (ok && known.started == p.started) {
			members[p.pid] = p
		}
	}
	for grown := true; grown; {
		grown = false
		for _, p := range all {
			_, ok := members[p.pid]
			if _, child := members[p.parent]; child && !ok {
				members[p.pid] = p
				grown = true
			}
		}
	}
	f.members = members
}

// processes reads /proc. A process that ends meanwhile is left out. So is
// everything if there is no /proc, which no runtime may do.
func processes() []process {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer dir.Close() // only read from
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil
	}
	var all []process
	self := os.Getpid()
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil || pid == self || pid == 1 {
			continue
		}
		stat, err := os.ReadFile("/proc/" + name + "/stat")
		if err != nil {
			continue
		}
		if p, ok := parseStat(stat); ok && p.pid == pid {
			all = append(all, p)
		}
	}
	return all
}

// parseStat reads a line of proc_pid_stat(5). The name of the program stands in
// parentheses and may contain anything, parentheses included.
func parseStat(line []byte) (p process, ok bool) {
	open, end := bytes.IndexByte(line, ' '), bytes.LastIndexByte(line, ')')
	if open < 0 || end < open {
		return process{}, false
	}
	fields := bytes.Fields(line[end+1:])
	const parent, group, session, started = 4 - 3, 5 - 3, 6 - 3, 22 - 3 // of the manual, which counts from pid = 1
	if len(fields) <= started {
		return process{}, false
	}
	var err [5]error
	p.pid, err[0] = strconv.Atoi(string(line[:open]))
	p.parent, err[1] = strconv.Atoi(string(fields[parent]))
	p.group, err[2] = strconv.Atoi(string(fields[group]))
	p.session, err[3] = strconv.Atoi(string(fields[session]))
	p.started, err[4] = strconv.ParseUint(string(fields[started]), 10, 64)
	return p, err == [5]error{}
}
