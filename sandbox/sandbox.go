// Package sandbox defines the place a job runs in: fresh for the job, with no
// way out but its gateway, and gone afterwards.
//
// It is the contract between the agent and the runtimes (native, docker,
// containerd). A [Runtime] makes and destroys boxes by name; a [Sandbox] is one
// box whose process 1 is the Mayfly guest. All runtimes pass the suite in
// sandbox/sandboxtest, isolation claims included.
//
// The package imports the standard library, and creds for the type Secret: what
// an image is pulled with is one (docs/adr/0013).
package sandbox

import (
	"context"
	"errors"
	"io"
	"net/netip"
	"os"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
)

var (
	// ErrExists reports that Create was called with a name in use.
	ErrExists = errors.New("sandbox exists")

	// ErrUnsupported reports that this machine lacks something the runtime
	// needs, or that the spec asks for what the runtime cannot enforce. The
	// job is refused: a weaker sandbox is never given instead.
	ErrUnsupported = errors.New("not supported by this runtime or machine")

	// ErrDied reports that the box ended while something was asked of it.
	ErrDied = errors.New("sandbox died")

	// ErrImage reports an image that may not be used: absent where nothing may
	// be pulled, not what its digest says, or made to harm whoever unpacks it.
	ErrImage = errors.New("image refused")
)

// Limits bound what a box may use. Zero means the runtime's default, which is
// finite; there is no unlimited.
type Limits struct {
	Memory   int64 // bytes, page cache and tmpfs of the box included
	Pids     int64 // processes and threads
	MilliCPU int64 // thousandths of a core
	Disk     int64 // bytes the box may write, workspace and system together
	Inodes   int64 // files the box may create
}

// A Spec says what to build. The zero value of every field is the safe one: a
// box without network, with default limits, over the host's base system.
type Spec struct {
	Labels Labels
	// Image is Image.Ref as Pull returned it; "" is the runtime's base. Of a
	// Puller, Create asks no registry.
	Image     string
	Isolation Isolation
	Limits    Limits
	Expires   time.Time // the box kills itself then, whatever became of the agent
	Mounts    []Mount   // at most 4
}

// An Isolation is the wall between a box and the kernel of the machine.
type Isolation string

// Isolations. A runtime refuses one that it does not have with ErrUnsupported.
const (
	Kernel Isolation = ""       // namespaces and a system call filter of the machine's own kernel
	GVisor Isolation = "gvisor" // a kernel of its own in user space (runsc)
)

// A Mount is a directory of the host that a box sees, always read-only, without
// set-user-ID programs and devices. What root of the box may read there is what
// others may, or, where the runtime maps ids, all of it: it must hold no secret
// that the job may not have.
type Mount struct{ Source, Target string } // absolute and clean, on the host and in the box

// Labels are how a box is found again when the journal is lost.
type Labels struct {
	Owner      string `json:"owner"` // installation id
	Job        string `json:"job"`
	Generation int64  `json:"generation"` // life of the agent that made it
}

// Info describes a box that exists, wholly or in part.
type Info struct {
	Name    string
	Labels  Labels
	Expires time.Time
}

// A Runtime makes and unmakes boxes. Names are chosen by the agent, at most 40
// bytes of [a-z0-9-], and written down before Create is called.
type Runtime interface {
	// Create builds a box with an idle guest in it. It returns ErrExists if
	// the name is in use and ErrUnsupported if it cannot enforce the spec. If
	// it fails the box may exist in part: the agent will call Destroy.
	Create(ctx context.Context, name string, s Spec) (Sandbox, error)

	// Destroy kills everything in the box and removes all of it. It returns
	// nil only when nothing is left. An absent name is success.
	Destroy(ctx context.Context, name string) error

	// List names every box, whole or partial, that this installation made in
	// any of its lives and that still exists.
	List(ctx context.Context) ([]Info, error)

	// Check probes this machine, without a job, and says what the runtime
	// enforces here and what it does not. An error means it cannot be used.
	// The box that it makes for this is named with CheckPrefix and expires
	// within a minute.
	Check(ctx context.Context) ([]Claim, error)
}

// A Puller is a Runtime whose boxes can be made of other images than its base.
type Puller interface {
	// Pull makes an image ready for Create and says what it is. It may be called
	// for the same image at once and again; what is there and named by digest
	// asks nobody. It returns ErrImage for one that may not be used.
	Pull(ctx context.Context, p Pull) (Image, error)
}

// A Pull says which image is wanted and who asks for it.
type Pull struct {
	// Image is as a person writes it: debian:12, registry.example/a/b@sha256:…;
	// "" is the runtime's base, and what comes back is the zero Image if that is
	// none.
	Image string
	// User and Password are for the registry of that name, and sent to nobody
	// else, redirections included. Empty is anonymous.
	User     string
	Password creds.Secret
}

// An Image is what a box can be made of.
type Image struct {
	Ref    string // names exactly this content in Spec.Image
	Digest string // "sha256:…" of the manifest for this machine, or of what the runtime has of it
	Size   int64  // bytes that this Pull transferred; 0 if it was there

	// What the image asks for: variables that every process gets, and the
	// process that it is for. The guest is process 1 all the same.
	Env        []string
	Entrypoint []string
	Cmd        []string
	User       string // name or id, and group behind a colon
	Dir        string
}

// A Claim is one line of what a runtime enforces on this machine.
type Claim struct {
	Name     string // "memory limit"
	Enforced bool
	Detail   string // how, or what follows from its absence and what to do
}

// Sockets are opened inside the network of a box and used by the gateway
// outside it. The receiver owns and closes them. egress.Sockets is the same
// type for the other side of the contract.
type Sockets struct {
	TCP *os.File // listener that all TCP to the virtual range reaches
	DNS *os.File // UDP socket that all UDP to port 53 reaches
	Log *os.File // netlink NFLOG socket: one packet per refused attempt; nil if the runtime has none
	// Init is process 1 of the box as this machine counts, for the ledger to say
	// which of its descendants made an attempt; 0 if they are not on this machine,
	// or are no processes of its kernel.
	Init int
}

// A Sandbox is one box.
type Sandbox interface {
	// Attach makes the loopback-only network of the box ready and returns its
	// sockets. Before Attach, and if nobody serves the sockets, the job
	// reaches nothing. It is called once, before the first Run.
	Attach(ctx context.Context) (Sockets, error)

	// Run executes p and waits for it and for its output. One process runs at a
	// time, and one beside it. When ctx ends it
	// interrupts p, then terminates it, then kills it, with p.Grace between,
	// and returns what became of it together with context.Cause(ctx). A
	// process that cannot be started is Exit{Code: 127 or 126} and its reason
	// on p.Stderr, as in a shell; an error means the box itself failed.
	Run(ctx context.Context, p Process) (Exit, error)

	// Put unpacks a tar stream below dir, which is absolute in the box.
	// Entries that would leave dir are refused.
	Put(ctx context.Context, dir string, tar io.Reader) error

	// Get returns the content of a regular file of the box, at most max
	// bytes. It follows no link. An absent file is fs.ErrNotExist.
	Get(ctx context.Context, path string, max int64) ([]byte, error)
}

// A Prober is a Sandbox that can be looked at from inside. All real ones are.
type Prober interface {
	// Probe has process 1 try things, in order, and says what became of each. A
	// step could do no more: it has the same rights. It may be called at any
	// time, also while a step runs, and not twice at once.
	Probe(ctx context.Context, attempts []Attempt) ([]Outcome, error)
}

// A Mounter is a Sandbox that may be shown directories of the host after it was
// made, as one is that was made before its job was known.
type Mounter interface {
	// Mount does what Spec.Mounts does of a box that has none, and refuses what
	// Create does. It is called at most once with mounts, before the first Run:
	// nothing of a job may be in the box yet. A box of which it fails must not be
	// used. With no mounts it does nothing, and is ErrUnsupported of a box that
	// could have none.
	Mount(ctx context.Context, mounts []Mount) error
}

// An Attempt is something to try with a socket: "tcp" and "udp" connect to
// Address and send Text, and "udp" waits for an answer; "raw", "packet" and
// "vsock" only make a socket of that family.
type Attempt struct {
	Network string
	Address netip.AddrPort
	Text    []byte // at most 512 bytes
}

// An Outcome is what became of an attempt: the error of the system (nil if it
// went through, ETIMEDOUT if nothing came of it), and the answer to a datagram.
type Outcome struct {
	Err   error
	Reply []byte
}

// A Process is a command to run in a box.
type Process struct {
	Args []string
	Env  []string // all of it: nothing is inherited
	Dir  string   // absolute; "" is the workspace
	// User is a name or id, and group behind a colon, as the files of the box
	// know them; "" is root. One that is not there is Exit{Code: 126}. A process
	// of another user gets his HOME, unless Env has one.
	User   string
	Stdout Output // nil discards
	Stderr Output
	Grace  time.Duration // between interrupt, terminate and kill; 0 is the runtime's default

	// Stdin is what the process reads, to the end of the channel; nil is
	// /dev/null. Run takes from it as the process reads, and nothing more once
	// the process has ended. What was sent must not be changed.
	Stdin <-chan []byte
	// TTY, if set, gives the process a terminal of its own as its input and
	// outputs: what Stdin carries is typed, and its end means nothing; what the
	// terminal shows goes to Stdout.
	TTY *TTY
	// Alone kills every other process of the box first, whoever started it.
	// They are gone, or Run returns ErrDied, even if p cannot be started.
	Alone bool
	// Beside runs p while another process runs: a look at a server, say.
	Beside bool
}

// A TTY is a terminal for a process.
type TTY struct {
	Size   Size        // at the start
	Resize <-chan Size // sizes that follow; nil is none
}

// A Size is that of a terminal, in characters.
type Size struct{ Rows, Cols uint16 }

// An Output receives what a process prints. at is stamped by the guest when it
// read the bytes. b is valid only during the call. Blocking in it blocks the
// process, which is how back-pressure works; an error ends the process.
type Output func(at time.Time, b []byte) error

// An Exit says how a process ended.
type Exit struct {
	Code   int // exit status, or 128 + signal
	Signal int // signal that killed it, 0 if none
	OOM    bool
}

// CheckPrefix begins the names of boxes that Check makes; no job's name does.
const CheckPrefix = "check-"

// Paths that every box has, whatever the runtime.
const (
	// Workspace is the disk-backed directory of the job, its working directory.
	Workspace = "/workspace"
	// Run is a tmpfs that holds secrets and command files, writable by the job.
	Run = "/run/mayfly"
)
