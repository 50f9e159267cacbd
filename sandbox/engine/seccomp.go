package engine

import (
	"encoding/json"
	"fmt"
	"math"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox/kernel"
)

// The engine takes a filter as text and leaves it to libseccomp. It compares all
// 64 bits of an argument, so that only masks see what the kernel sees; and which
// of two rules counts when both fit is not said, so no two here do.

// A call is one entry of a seccomp profile (OCI runtime specification, "seccomp").
type call struct {
	Names    []string    `json:"names"`
	Action   string      `json:"action"`
	ErrnoRet *unix.Errno `json:"errnoRet,omitempty"`
	Args     []condition `json:"args,omitempty"`
}

// A condition is about one argument: argument & Value == ValueTwo. Two of them
// must both hold. It says nothing about the upper half, as no rule does.
type condition struct {
	Index    int    `json:"index"`
	Value    uint64 `json:"value"`
	ValueTwo uint64 `json:"valueTwo"`
	Op       string `json:"op"`
}

const (
	actAllow = "SCMP_ACT_ALLOW"
	actErrno = "SCMP_ACT_ERRNO" // EPERM if nothing else is said
	opMasked = "SCMP_CMP_MASKED_EQ"
)

// Profile is the filter of a box as the engine wants it. Calls that are not
// named get EPERM; those that are newer than any named ENOSYS, as runc adds;
// those of another architecture of the machine kill the process.
func Profile(goarch string) (string, error) {
	arch, ok := map[string]string{"amd64": "SCMP_ARCH_X86_64", "arm64": "SCMP_ARCH_AARCH64"}[goarch]
	if !ok {
		return "", fmt.Errorf("no name for %s", goarch)
	}
	calls := []call{{Names: kernel.Allowed(), Action: actAllow}}
	for _, r := range kernel.Rules() {
		calls = append(calls, translate(r)...)
	}
	b, err := json.Marshal(map[string]any{"defaultAction": actErrno, "architectures": []string{arch}, "syscalls": calls})
	return string(b), err
}

// translate says a rule in cases that exclude each other.
func translate(r kernel.Rule) []call {
	allow := call{Names: []string{r.Name}, Action: actAllow}
	deny := call{Names: []string{r.Name}, Action: actErrno, ErrnoRet: &r.Errno}
	if len(r.Values) == 0 {
		return []call{deny}
	}
	if r.Mask != 0 {
		// Of a masked argument one value is allowed, and EPERM is the default.
		return []call{allow.when(condition{Index: r.Arg, Value: uint64(r.Mask), ValueTwo: uint64(r.Values[0])})}
	}
	hit, miss, named := allow, deny, r.Values
	if r.Except {
		hit, miss = deny, allow
	}
	var out []call
	for _, v := range r.Values {
		out = append(out, hit.when(equal(r.Arg, v)))
	}
	if in := r.Inner; in != nil {
		named = append(slices.Clone(named), in.Value)
		out = append(out, allow.when(equal(r.Arg, in.Value), equal(in.Arg, in.Required)))
		for _, c := range others(in.Arg, []uint32{in.Required}) {
			out = append(out, deny.when(equal(r.Arg, in.Value), c))
		}
	}
	for _, c := range others(r.Arg, named) {
		out = append(out, miss.when(c))
	}
	return slices.DeleteFunc(out, func(c call) bool {
		return c.Action == actErrno && *c.ErrnoRet == unix.EPERM // so libseccomp refuses to hear it
	})
}

func (c call) when(all ...condition) call {
	for i := range all {
		all[i].Op = opMasked
	}
	c.Args = all
	return c
}

func equal(arg int, v uint32) condition {
	return condition{Index: arg, Value: math.MaxUint32, ValueTwo: uint64(v)}
}

// others are conditions of which one holds for each number that is not among
// the values: the largest blocks of numbers that begin alike and hold none.
func others(arg int, values []uint32) []condition {
	var out []condition
	var split func(begins uint32, bits int)
	split = func(begins uint32, bits int) {
		mask := uint32(math.MaxUint32 << (32 - bits))
		holds := slices.ContainsFunc(values, func(v uint32) bool { return v&mask == begins })
		switch {
		case !holds:
			out = append(out, condition{Index: arg, Value: uint64(mask), ValueTwo: uint64(begins)})
		case bits < 32:
			split(begins, bits+1)
			split(begins|1<<(31-bits), bits+1)
		}
	}
	split(0, 0)
	return out
}
