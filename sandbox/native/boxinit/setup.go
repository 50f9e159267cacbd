package boxinit

import (
	"encoding/binary"
	"errors"
)

// Descriptors of the guest when it starts, beside 0, 1 and 2 on /dev/null. The
// control stream is where "mayfly-guest serve" expects it. The programs are among
// those that the child is given: of others os.StartProcess overwrites some in the
// child, while it moves those that it gives.
const (
	ControlFD = 3 // SOCK_STREAM: the guest protocol
	SetupFD   = 4 // SOCK_SEQPACKET: the Setup in, the answer out
	LifeFD    = 5 // unprivileged: a lock that is held for as long as it is open
	GuestFD   = 6 // the guest program; this and what follows is not inherited
	RunscFD   = 7 // gVisor: the runsc program
)

// Dirs is how many layers and how many hidden paths a box may have: the disk
// carries this many directories lower/N, upper/N, work/N and hide/N.
const Dirs = 16

// Mounts is how many directories of the host a box may see beside its layers.
const Mounts = 4

// MaxImage is how many layers the image of a box may have. A message carries at
// most 253 descriptors (SCM_MAX_FD).
const MaxImage = 128

// MaxFiles is how many files of its own a box may be given.
const MaxFiles = 8

// MaxMessage bounds an encoded Setup and the answer, in bytes.
const MaxMessage = 64 << 10

// A Setup tells the guest how to make its box. The descriptors that come with
// it are the disk, the layers of its image, the top one first, and then one mount
// per layer, in order; an unprivileged box gets none and makes its own.
type Setup struct {
	Unprivileged bool
	Layers       []Layer
	Hide         []string // directories of the layers that the box sees empty
	RunBytes     uint64   // size of /run/mayfly
	ShmBytes     uint64   // size of /dev/shm
	DiskBytes    uint64   // size of the tmpfs that is an unprivileged box's disk
	DiskInodes   uint64   // files on it
	Processes    uint64   // RLIMIT_NPROC; 0 leaves it
	Files        uint64   // RLIMIT_NOFILE
	Expires      uint64   // Unix seconds; 0 is never
	Filter       []byte   // struct sock_filter array
	Image        uint64   // layers of the image that is the root of the box; 0 is no image
	Etc          []File   // of /etc, in place of those of the image
	Bundle       []byte   // gVisor: config.json (OCI runtime specification); empty is the kernel's own wall
	Platform     string   // gVisor: how runsc catches system calls
}

// GVisor reports whether the box gets a kernel of its own.
func (s *Setup) GVisor() bool { return len(s.Bundle) > 0 }

// A File is one that the box has, of mode 0644.
type File struct{ Name, Content string }

// A Layer is a directory of the host that the box has at Path.
type Layer struct {
	Path   string // in the box, absolute
	Source string // on the host; used by an unprivileged box only
	Write  bool   // a private copy-on-write view instead of read-only
	Mount  bool   // comes after all else, to where the box's own links lead
}

var errMessage = errors.New("setup message is malformed")

// Encode is the Setup as bytes.
func (s *Setup) Encode() []byte {
	b := []byte{flag(s.Unprivileged), byte(len(s.Layers)), byte(len(s.Hide)), byte(len(s.Etc))}
	for _, l := range s.Layers {
		b = append(b, flag(l.Write), flag(l.Mount))
		b = text(text(b, l.Path), l.Source)
	}
	for _, h := range s.Hide {
		b = text(b, h)
	}
	for _, f := range s.Etc {
		b = text(text(b, f.Name), f.Content)
	}
	for _, n := range s.numbers() {
		b = binary.LittleEndian.AppendUint64(b, *n)
	}
	return text(text(text(b, string(s.Filter)), string(s.Bundle)), s.Platform)
}

// Decode reads what Encode wrote.
func Decode(b []byte) (*Setup, error) {
	r := reader{b: b}
	s := &Setup{Unprivileged: r.byte() == 1}
	layers, hide, etc := int(r.byte()), int(r.byte()), int(r.byte())
	if layers > Dirs+Mounts || hide > Dirs || etc > MaxFiles {
		return nil, errMessage
	}
	for range layers {
		write, mount := r.byte() == 1, r.byte() == 1
		s.Layers = append(s.Layers, Layer{Write: write, Mount: mount, Path: r.text(), Source: r.text()})
	}
	for range hide {
		s.Hide = append(s.Hide, r.text())
	}
	for range etc {
		s.Etc = append(s.Etc, File{Name: r.text(), Content: r.text()})
	}
	for _, n := range s.numbers() {
		*n = r.uint64()
	}
	s.Filter = []byte(r.text())
	s.Bundle, s.Platform = []byte(r.text()), r.text()
	if r.bad || len(r.b) != 0 || s.Image > MaxImage {
		return nil, errMessage
	}
	return s, nil
}

func (s *Setup) numbers() []*uint64 {
	return []*uint64{&s.RunBytes, &s.ShmBytes, &s.DiskBytes, &s.DiskInodes, &s.Processes, &s.Files, &s.Expires, &s.Image}
}

func flag(b bool) byte {
	if b {
		return 1
	}
	return 0
}

func text(b []byte, s string) []byte {
	b = binary.LittleEndian.AppendUint32(b, uint32(len(s)))
	return append(b, s...)
}

// A reader takes values off b and remembers whether there were enough bytes.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) take(n uint64) []byte {
	if n > uint64(len(r.b)) {
		r.b, r.bad = nil, true
		return make([]byte, min(n, 8))
	}
	b := r.b[:n]
	r.b = r.b[n:]
	return b
}

func (r *reader) byte() byte     { return r.take(1)[0] }
func (r *reader) uint64() uint64 { return binary.LittleEndian.Uint64(r.take(8)) }

func (r *reader) text() string {
	b := r.take(uint64(binary.LittleEndian.Uint32(r.take(4))))
	if r.bad {
		return ""
	}
	return string(b)
}
