package native

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// The answers of the filter (seccomp(2)).
const (
	retAllow    = unix.SECCOMP_RET_ALLOW
	retKill     = unix.SECCOMP_RET_KILL_PROCESS
	retEPERM    = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
	retENOSYS   = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
	retNoFamily = unix.SECCOMP_RET_ERRNO | uint32(unix.EAFNOSUPPORT)
)

// Offsets in struct seccomp_data. Both machines are little-endian, so the low
// half of argument n is at dataArgs + 8*n.
const (
	dataNumber = 0
	dataArch   = 4
	dataArgs   = 16
)

// newNamespaces are the flags of clone(2) that make a namespace. CLONE_NEWTIME
// is not among them: clone reads its bit as part of the exit signal.
const newNamespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC |
	unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET

// filter is the system call filter of a box for a Go architecture, as the
// kernel's sock_filter array. Other architectures of the machine (i386, arm)
// kill the process; x32 and calls newer than the table say ENOSYS, so that
// programs fall back; known calls that are not allowed say EPERM.
func filter(goarch string) ([]byte, error) {
	if goarch != "amd64" && goarch != "arm64" {
		return nil, fmt.Errorf("system call filter: no table for %s", goarch)
	}
	info, err := arch.GetInfo(goarch)
	if err != nil {
		return nil, fmt.Errorf("system call filter: %w", err)
	}
	raw, err := bpf.Assemble(program(info))
	if err != nil {
		return nil, fmt.Errorf("system call filter: %w", err)
	}
	var b bytes.Buffer
	for _, in := range raw {
		if err := binary.Write(&b, binary.NativeEndian, in); err != nil {
			return nil, fmt.Errorf("system call filter: %w", err)
		}
	}
	return b.Bytes(), nil
}

func program(info *arch.Info) []bpf.Instruction {
	out := []bpf.Instruction{
		bpf.LoadAbsolute{Off: dataArch, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(info.ID), SkipTrue: 1},
		bpf.RetConstant{Val: retKill},
		bpf.LoadAbsolute{Off: dataNumber, Size: 4},
	}
	newest := 0
	for _, n := range info.SyscallNames {
		newest = max(newest, n)
	}
	out = append(out,
		bpf.JumpIf{Cond: bpf.JumpGreaterThan, Val: uint32(newest), SkipFalse: 1},
		bpf.RetConstant{Val: retENOSYS})
	for _, c := range conditional() {
		if n, ok := info.SyscallNames[c.name]; ok {
			out = append(out, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: uint32(n), SkipTrue: uint8(len(c.body))})
			out = append(out, c.body...)
		}
	}
	for _, r := range ranges(info) {
		out = append(out,
			bpf.JumpIf{Cond: bpf.JumpGreaterThan, Val: r[1], SkipTrue: 2},
			bpf.JumpIf{Cond: bpf.JumpGreaterOrEqual, Val: r[0], SkipFalse: 1},
			bpf.RetConstant{Val: retAllow})
	}
	return append(out, bpf.RetConstant{Val: retEPERM})
}

// ranges are the allowed numbers as closed intervals, ascending.
func ranges(info *arch.Info) [][2]uint32 {
	var numbers []uint32
	for _, name := range allowed() {
		if n, ok := info.SyscallNames[name]; ok { // each machine lacks some
			numbers = append(numbers, uint32(n))
		}
	}
	slices.Sort(numbers)
	var out [][2]uint32
	for _, n := range numbers {
		if last := len(out) - 1; last >= 0 && out[last][1]+1 >= n {
			out[last][1] = n
			continue
		}
		out = append(out, [2]uint32{n, n})
	}
	return out
}

// A rule decides a call by its arguments. Its body always returns.
type rule struct {
	name string
	body []bpf.Instruction
}

func arg(n uint32) bpf.Instruction { return bpf.LoadAbsolute{Off: dataArgs + 8*n, Size: 4} }

// oneOf allows the values of an argument and answers the others with deny.
func oneOf(n, deny uint32, values ...uint32) []bpf.Instruction {
	out := []bpf.Instruction{arg(n)}
	for _, v := range values {
		out = append(out, bpf.JumpIf{Cond: bpf.JumpEqual, Val: v, SkipFalse: 1}, bpf.RetConstant{Val: retAllow})
	}
	return append(out, bpf.RetConstant{Val: deny})
}

// noneOf denies the values of an argument and allows the others.
func noneOf(n uint32, values ...uint32) []bpf.Instruction {
	out := []bpf.Instruction{arg(n)}
	for _, v := range values {
		out = append(out, bpf.JumpIf{Cond: bpf.JumpEqual, Val: v, SkipFalse: 1}, bpf.RetConstant{Val: retEPERM})
	}
	return append(out, bpf.RetConstant{Val: retAllow})
}

func conditional() []rule {
	return []rule{
		{"clone", []bpf.Instruction{
			arg(0),
			bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: newNamespaces, SkipFalse: 1},
			bpf.RetConstant{Val: retEPERM},
			bpf.RetConstant{Val: retAllow},
		}},
		// Its flags are in memory, which a filter cannot read; libraries fall
		// back to clone.
		{"clone3", []bpf.Instruction{bpf.RetConstant{Val: retENOSYS}}},
		{"socket", append([]bpf.Instruction{
			arg(0),
			bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.AF_NETLINK, SkipTrue: uint8(len(oneOf(2, retNoFamily, unix.NETLINK_ROUTE)))},
		}, append(oneOf(2, retNoFamily, unix.NETLINK_ROUTE),
			oneOf(0, retNoFamily, unix.AF_UNIX, unix.AF_INET, unix.AF_INET6)...)...)},
		{"socketpair", oneOf(0, retNoFamily, unix.AF_UNIX)},
		// TIOCSTI and TIOCLINUX type into a terminal; TIOCSETD loads line
		// disciplines.
		{"ioctl", noneOf(1, unix.TIOCSTI, unix.TIOCLINUX, unix.TIOCSETD)},
		// PER_LINUX, PER_LINUX32, each with UNAME26, and the question.
		{"personality", oneOf(0, retEPERM, 0, 0x8, 0x20000, 0x20008, 0xffffffff)},
	}
}
