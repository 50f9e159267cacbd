package kernel

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
	retAllow  = unix.SECCOMP_RET_ALLOW
	retKill   = unix.SECCOMP_RET_KILL_PROCESS
	retEPERM  = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
	retENOSYS = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
)

// Offsets in struct seccomp_data. Both machines are little-endian, so the low
// half of argument n is at dataArgs + 8*n.
const (
	dataNumber = 0
	dataArch   = 4
	dataArgs   = 16
)

// Filter is the system call filter of a box for a Go architecture, as the
// kernel's sock_filter array. Other architectures of the machine (i386, arm)
// kill the process; x32 and calls newer than the table say ENOSYS, so that
// programs fall back; known calls that are not allowed say EPERM.
func Filter(goarch string) ([]byte, error) {
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
	for _, r := range Rules() {
		if n, ok := info.SyscallNames[r.Name]; ok {
			decide := body(r)
			out = append(out, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: uint32(n), SkipTrue: uint8(len(decide))})
			out = append(out, decide...)
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
	for _, name := range Allowed() {
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

// body decides a call whose number matched. It always returns.
func body(r Rule) []bpf.Instruction {
	hit, miss := uint32(retAllow), retErrno(r.Errno)
	out := []bpf.Instruction{arg(r.Arg)}
	if r.Inner != nil {
		out = append(out,
			bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: r.Inner.Value, SkipTrue: 4},
			arg(r.Inner.Arg),
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: r.Inner.Required, SkipFalse: 1},
			bpf.RetConstant{Val: hit},
			bpf.RetConstant{Val: miss})
	}
	if r.Mask != 0 {
		out = append(out, bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: r.Mask})
	}
	if r.Except {
		hit, miss = miss, hit
	}
	for _, v := range r.Values {
		out = append(out, bpf.JumpIf{Cond: bpf.JumpEqual, Val: v, SkipFalse: 1}, bpf.RetConstant{Val: hit})
	}
	return append(out, bpf.RetConstant{Val: miss})
}

func arg(n int) bpf.Instruction { return bpf.LoadAbsolute{Off: dataArgs + 8*uint32(n), Size: 4} }

func retErrno(e unix.Errno) uint32 { return unix.SECCOMP_RET_ERRNO | uint32(e) }
