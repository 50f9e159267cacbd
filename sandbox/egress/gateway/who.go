package gateway

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

const (
	// looks bounds what one search in /proc may read: a descriptor, a list of
	// children. A job that has more must not hold the gateway up.
	looks = 2048
	// childrenLimit bounds what is read of one such list, in bytes.
	childrenLimit = 32 << 10
	// executableLimit bounds what a line says of a program, in bytes.
	executableLimit = 200
	// diagTimeout bounds the wait for the kernel's answer, in microseconds. It is
	// given before sendto returns.
	diagTimeout = 100_000
)

// A who tells which process of a box has the other end of a connection. The
// kernel is asked for the socket's number, inside of the network of the box, and
// /proc for who has it, among the descendants of the box's first process. What
// it says decides nothing: an attempt is not refused for want of a name.
type who struct {
	init    int    // the box's first process, as this machine counts; 0 is not known
	unknown string // why it never knows

	mu   sync.Mutex
	diag int // netlink socket in the network of the box; -1: none
	last int // who it was the last time
	at   int // and the number that the socket had there
}

// newWho makes one for the network of a box. The caller closes it.
func newWho(init int, net *os.File) *who {
	w := &who{init: init, diag: -1}
	if init <= 0 {
		w.unknown = "the runtime of the box does not show its processes"
		return w
	}
	if net == nil {
		w.unknown = "the agent may not enter the network of the box"
		return w
	}
	err := within(net, func() (err error) {
		w.diag, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_INET_DIAG)
		return err
	})
	if err == nil {
		err = unix.SetsockoptTimeval(w.diag, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: diagTimeout})
	}
	if err != nil {
		w.close()
		w.unknown = "the kernel does not tell: " + err.Error()
	}
	return w
}

func (w *who) close() {
	if w == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.diag >= 0 {
		_ = unix.Close(w.diag) // nothing was written
	}
	w.diag, w.unknown = -1, "the box is closing"
}

// ask begins to look for the process that made the connection to an address,
// while the destination is dialled.
func (c *session) ask(to netip.AddrPort) {
	c.box.mu.Lock()
	w := c.box.who
	c.box.mu.Unlock()
	c.asked = make(chan egress.Process, 1)
	from := addrPort(c.job.RemoteAddr())
	asked := c.asked
	go func() { asked <- w.of(unix.IPPROTO_TCP, from, to) }() // known waits for it
}

// known puts the process into the line of the connection, which is written next.
func (c *session) known() {
	if c.asked != nil {
		c.line.Process, c.asked = <-c.asked, nil
	}
}

// addrPort is that of a TCP socket, with IPv4 as such.
func addrPort(a net.Addr) netip.AddrPort {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	to := tcp.AddrPort()
	return netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
}

// of is the process whose socket is at local and sends to remote, both as the
// box sees them.
func (w *who) of(protocol uint8, local, remote netip.AddrPort) egress.Process {
	if w == nil {
		return egress.Process{Unknown: "the box has no network yet"}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.unknown != "" {
		return egress.Process{Unknown: w.unknown}
	}
	inode, err := w.inode(protocol, local, remote)
	if err != nil {
		return egress.Process{Unknown: "the kernel does not tell: " + err.Error()}
	}
	if inode == 0 {
		return egress.Process{Unknown: "the process has closed its end already"}
	}
	s := search{link: "socket:[" + strconv.FormatUint(uint64(inode), 10) + "]", left: looks}
	pid := w.last
	if pid == 0 || !s.near(pid, w.at) && !s.holds(pid) {
		pid = s.below(w.init)
	}
	switch {
	case pid != 0:
		w.last, w.at = pid, s.at
		return process(pid)
	case s.left <= 0:
		return egress.Process{Unknown: "the box has more processes and files open than are looked at"}
	}
	return egress.Process{Unknown: "no process of the box has that socket any more"}
}

// inode asks for the number of one socket (linux/inet_diag.h), 0 if there is
// none.
func (w *who) inode(protocol uint8, local, remote netip.AddrPort) (uint32, error) {
	if err := unix.Sendto(w.diag, question(protocol, local, remote), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return 0, err
	}
	buf := make([]byte, 1024)
	n, _, err := unix.Recvfrom(w.diag, buf, 0)
	if err != nil {
		return 0, err
	}
	return inodeOf(buf[:n])
}

// question is an inet_diag_req_v2 for exactly one socket. With UDP the kernel
// takes source and destination the other way round.
func question(protocol uint8, local, remote netip.AddrPort) []byte {
	family := byte(unix.AF_INET)
	if local.Addr().Is6() {
		family = unix.AF_INET6
	}
	if protocol == unix.IPPROTO_UDP {
		local, remote = remote, local
	}
	b := make([]byte, 0, unix.NLMSG_HDRLEN+56)
	b = binary.NativeEndian.AppendUint32(b, unix.NLMSG_HDRLEN+56)
	b = binary.NativeEndian.AppendUint16(b, 20) // SOCK_DIAG_BY_FAMILY
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST)
	b = append(b, 0, 0, 0, 0, 0, 0, 0, 0) // sequence and port
	b = append(b, family, protocol, 0, 0)
	b = binary.NativeEndian.AppendUint32(b, ^uint32(0)) // any state
	b = binary.BigEndian.AppendUint16(b, local.Port())
	b = binary.BigEndian.AppendUint16(b, remote.Port())
	b = append(b, padded(local.Addr())...)
	b = append(b, padded(remote.Addr())...)
	return append(b, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff) // any interface, no cookie
}

func padded(a netip.Addr) []byte {
	return append(a.AsSlice(), make([]byte, 16-a.BitLen()/8)...)
}

// inodeOf reads an inet_diag_msg, or why there is none.
func inodeOf(b []byte) (uint32, error) {
	const inodeAt = unix.NLMSG_HDRLEN + 4 + 48 + 16
	if len(b) < unix.NLMSG_HDRLEN+4 {
		return 0, errors.New("a short answer")
	}
	if binary.NativeEndian.Uint16(b[4:]) == unix.NLMSG_ERROR {
		errno := unix.Errno(-int32(binary.NativeEndian.Uint32(b[unix.NLMSG_HDRLEN:])))
		if errno == unix.ENOENT {
			return 0, nil
		}
		return 0, errno
	}
	if len(b) < inodeAt+4 {
		return 0, errors.New("a short answer")
	}
	return binary.NativeEndian.Uint32(b[inodeAt:]), nil
}

// A search looks for who has a socket, for a bounded time.
type search struct {
	link string // what the descriptor is a link to
	left int    // what may still be looked at
	at   int    // the number that was found
}

// below is a process that has the socket, among one and what it started, 0 if
// none is found: who connects is mostly the youngest.
func (s *search) below(pid int) int {
	children := s.children(pid)
	slices.Reverse(children)
	for _, child := range children {
		if s.left <= 0 {
			return 0
		}
		if found := s.below(child); found != 0 {
			return found
		}
	}
	if s.holds(pid) {
		return pid
	}
	return 0
}

// children are those of all threads of a process.
func (s *search) children(pid int) []int {
	tasks := proc(pid, "task")
	var all []int
	for _, thread := range s.names(tasks) {
		f, err := os.Open(filepath.Join(tasks, thread, "children"))
		if err != nil {
			continue // it has ended
		}
		b, err := io.ReadAll(io.LimitReader(f, childrenLimit))
		_ = f.Close() // it was read
		if err != nil {
			continue
		}
		for field := range strings.FieldsSeq(string(b)) {
			if child, err := strconv.Atoi(field); err == nil {
				all = append(all, child)
			}
		}
	}
	return all
}

// near says whether the process has the socket where it had the last one, or
// next to it. A client that connects again takes the number that it has closed or
// the one after it, and this costs the same however many files it has open.
func (s *search) near(pid, at int) bool {
	dir := proc(pid, "fd")
	return s.is(dir, at) || s.is(dir, at+1) || s.is(dir, at-1)
}

// holds says whether the process has the socket. The newest mostly has the highest
// number.
func (s *search) holds(pid int) bool {
	dir := proc(pid, "fd")
	names := s.names(dir)
	slices.Reverse(names)
	for _, name := range names {
		if fd, err := strconv.Atoi(name); err == nil && s.is(dir, fd) {
			return true
		}
	}
	return false
}

// is looks at one descriptor.
func (s *search) is(dir string, fd int) bool {
	to, err := os.Readlink(dir + "/" + strconv.Itoa(fd))
	if err != nil || to != s.link {
		return false
	}
	s.at = fd
	return true
}

// names are those in a directory, as many as may still be looked at.
func (s *search) names(dir string) []string {
	if s.left <= 0 {
		return nil
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil // it has ended
	}
	defer f.Close()
	names, _ := f.Readdirnames(s.left) // what was read before an error is looked at
	s.left -= len(names) + 1
	return names
}

func proc(pid int, name string) string { return filepath.Join("/proc", strconv.Itoa(pid), name) }

// process is what a line says of one. Its program is what the job called it.
func process(pid int) egress.Process {
	p := egress.Process{PID: innerPID(pid)}
	exe, err := os.Readlink(proc(pid, "exe"))
	if err != nil {
		p.Unknown = "the process has ended"
		return p
	}
	if p.Executable = printable(exe); len(p.Executable) > executableLimit {
		p.Executable = p.Executable[:executableLimit] + "..."
	}
	return p
}

// innerPID is the number that the box knows a process by: the last one of NSpid
// (proc_pid_status(5)). 0 if it has ended.
func innerPID(pid int) int {
	b, err := os.ReadFile(proc(pid, "status"))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if numbers, ok := strings.CutPrefix(line, "NSpid:"); ok {
			fields := strings.Fields(numbers)
			n, err := strconv.Atoi(fields[max(0, len(fields)-1)])
			if err != nil {
				return 0
			}
			return n
		}
	}
	return 0
}
