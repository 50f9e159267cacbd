package sandboxtest

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
)

func lifeMutants() []mutant {
	return []mutant{
		{"a name in use is ErrExists", func(w *world) {
			w.create = func(ctx context.Context, name string, s sandbox.Spec) (sandbox.Sandbox, error) {
				b, err := w.Runtime.Create(ctx, name, s)
				if errors.Is(err, sandbox.ErrExists) {
					err = errBroken
				}
				return b, err
			}
		}},
		{"names that the agent would not choose are refused", func(w *world) {
			w.create = func(context.Context, string, sandbox.Spec) (sandbox.Sandbox, error) { return nil, nil }
		}},
		{"what cannot be enforced is ErrUnsupported", func(w *world) {
			w.spec = func(s *sandbox.Spec) { s.Limits = sandbox.Limits{} }
		}},
		{"destroying what never was is success", func(w *world) {
			w.destroy = func(context.Context, string) error { return errBroken }
		}},
		{"destroy ends what runs and frees the name", func(w *world) {
			seen := map[string]bool{}
			w.destroy = func(ctx context.Context, name string) error {
				if seen[name] {
					return errBroken
				}
				seen[name] = true
				return w.Runtime.Destroy(ctx, name)
			}
		}},
		{"destroy ends what runs and frees the name", func(w *world) {
			w.list = func(ctx context.Context) ([]sandbox.Info, error) { return w.Runtime.List(ctx) }
			w.create = func(ctx context.Context, name string, s sandbox.Spec) (sandbox.Sandbox, error) {
				w.list = func(context.Context) ([]sandbox.Info, error) { return []sandbox.Info{{Name: name}}, nil }
				return w.Runtime.Create(ctx, name, s)
			}
		}},
		{"destroy leaves no process of the box", func(w *world) { w.destroy = forgetful(w) }},
		{"list shows name labels and expiry", func(w *world) { w.list = relabelled(w) }},
		{"a later life lists the boxes of this one", func(w *world) {
			again := w.harness.Again
			w.harness.Again = func() (sandbox.Runtime, error) {
				r, err := again()
				return &world{Runtime: r, list: func(context.Context) ([]sandbox.Info, error) { return nil, nil }}, err
			}
		}},
		{"a later life destroys the box of a dead one", func(w *world) { w.destroy = forgetful(w) }},
		{"attach gives sockets of the network of the box", func(w *world) { w.attach = outside }},
	}
}

func endMutants() []mutant {
	return []mutant{
		{"a box ends by itself when it expires", func(w *world) {
			w.spec = func(s *sandbox.Spec) { s.Expires = s.Expires.Add(time.Hour) }
		}},
		{"a box whose process 1 dies is ErrDied", func(w *world) {
			w.run = func(ctx context.Context, b sandbox.Sandbox, p sandbox.Process) (sandbox.Exit, error) {
				_, _ = b.Run(ctx, p)
				return sandbox.Exit{Code: 137, Signal: 9}, nil
			}
		}},
		{"boxes do not disturb each other", func(w *world) { w.run = before(": > /tmp/other") }},
		{"a context that has ended is honoured", func(w *world) {
			w.run = func(ctx context.Context, b sandbox.Sandbox, p sandbox.Process) (sandbox.Exit, error) {
				return b.Run(context.WithoutCancel(ctx), p)
			}
		}},
		{"check says what is enforced and leaves nothing", func(w *world) {
			w.check = func(ctx context.Context) ([]sandbox.Claim, error) {
				claims, err := w.Runtime.Check(ctx)
				for i := range claims {
					claims[i].Enforced = !claims[i].Enforced
				}
				return claims, err
			}
		}},
		{"check says what is enforced and leaves nothing", func(w *world) {
			w.check = func(ctx context.Context) ([]sandbox.Claim, error) {
				claims, err := w.Runtime.Check(ctx)
				for i := range claims {
					claims[i].Name = strings.Replace(claims[i].Name, "memory limit", "memory", 1)
				}
				return claims, err
			}
		}},
	}
}

// forgetful says once that a box is destroyed which is not.
func forgetful(w *world) func(context.Context, string) error {
	return once(func(context.Context, string) error { return nil }, w.Runtime.Destroy)
}

func relabelled(w *world) func(context.Context) ([]sandbox.Info, error) {
	return func(ctx context.Context) ([]sandbox.Info, error) {
		infos, err := w.Runtime.List(ctx)
		for i := range infos {
			infos[i].Labels.Generation++
		}
		return infos, err
	}
}

// outside gives sockets of the host.
func outside(ctx context.Context, b sandbox.Sandbox) (sandbox.Sockets, error) {
	s, err := b.Attach(ctx)
	if err != nil {
		return s, err
	}
	l, tcpErr := net.Listen("tcp", "127.0.0.1:0")
	p, udpErr := net.ListenPacket("udp", "127.0.0.1:0")
	if err := errors.Join(tcpErr, udpErr, s.TCP.Close(), s.DNS.Close()); err != nil {
		return s, err
	}
	s.TCP, tcpErr = l.(*net.TCPListener).File()
	s.DNS, udpErr = p.(*net.UDPConn).File()
	return s, errors.Join(tcpErr, udpErr, l.Close(), p.Close())
}

func runMutants() []mutant {
	return []mutant{
		{"the exit status is that of the process", func(w *world) {
			w.run = exits(func(_ sandbox.Process, e *sandbox.Exit) error { e.Code = min(e.Code, 1); return nil })
		}},
		{"the end by a signal is 128 and the signal", func(w *world) {
			w.run = exits(func(_ sandbox.Process, e *sandbox.Exit) error { e.Signal = 0; return nil })
		}},
		{"a missing program is 127 with a reason", func(w *world) {
			w.run = exits(func(sandbox.Process, *sandbox.Exit) error { return errBroken })
		}},
		{"a program that cannot be run is 126 with a reason", func(w *world) {
			w.run = processes(func(p *sandbox.Process) { p.Stderr = nil })
		}},
		{"the environment is what was given", func(w *world) {
			w.run = processes(func(p *sandbox.Process) { p.Env = append(p.Env, "HOME=/root") })
		}},
		{"the directory is the workspace or what was given", func(w *world) {
			w.run = processes(func(p *sandbox.Process) { p.Dir = "/" })
		}},
		{"output is complete and in order", func(w *world) {
			w.run = processes(func(p *sandbox.Process) {
				n, out := 0, p.Stdout
				p.Stdout = func(at time.Time, b []byte) error {
					if n++; n == 2 {
						return nil
					}
					return out(at, b)
				}
			})
		}},
		{"output is stamped when it is read", func(w *world) {
			began := time.Now()
			w.run = processes(func(p *sandbox.Process) {
				out := p.Stdout
				p.Stdout = func(_ time.Time, b []byte) error { return out(began, b) }
			})
		}},
		{"an output that blocks blocks the process", func(w *world) { w.run = unbounded }},
		{"an output that is nil discards", func(w *world) {
			w.run = processes(func(p *sandbox.Process) {
				if p.Stdout == nil {
					p.Stdout = func(time.Time, []byte) error { return errBroken }
				}
			})
		}},
		{"a process starts with three descriptors", func(w *world) { w.run = before("exec 3</dev/null") }},
		{"a process starts with three descriptors", func(w *world) { w.run = before("exec </etc/passwd") }},
		{"the end of the context interrupts", func(w *world) {
			quick := before("trap '' INT")
			w.run = func(ctx context.Context, b sandbox.Sandbox, p sandbox.Process) (sandbox.Exit, error) {
				p.Grace = 100 * time.Millisecond
				return quick(ctx, b, p)
			}
		}},
		{"after a grace it terminates", func(w *world) { w.run = before("trap '' TERM") }},
		{"after another grace it kills", func(w *world) {
			w.run = processes(func(p *sandbox.Process) { p.Grace = time.Millisecond })
		}},
		{"an error of an output ends the process", func(w *world) {
			w.run = func(ctx context.Context, b sandbox.Sandbox, p sandbox.Process) (sandbox.Exit, error) {
				exit, _ := b.Run(ctx, p)
				return exit, nil
			}
		}},
	}
}

// unbounded takes all output at once and hands it over when the process has
// ended.
func unbounded(ctx context.Context, b sandbox.Sandbox, p sandbox.Process) (sandbox.Exit, error) {
	type chunk struct {
		at time.Time
		b  []byte
	}
	var all []chunk
	out := p.Stdout
	if out == nil {
		return b.Run(ctx, p)
	}
	p.Stdout = func(at time.Time, b []byte) error { all = append(all, chunk{at, bytes.Clone(b)}); return nil }
	exit, err := b.Run(ctx, p)
	for _, c := range all {
		err = errors.Join(err, out(c.at, c.b))
	}
	return exit, err
}

// unrefused does not say that a Put was refused.
func unrefused(ctx context.Context, b sandbox.Sandbox, dir string, r io.Reader) error {
	_ = b.Put(ctx, dir, r)
	return nil
}

func transferMutants() []mutant {
	return []mutant{
		{"put makes directories and files with their modes", func(w *world) {
			w.put = repack(func(h *tar.Header) { h.Mode = 0o777 })
		}},
		{"put replaces what is there", func(w *world) {
			w.put = func(ctx context.Context, b sandbox.Sandbox, dir string, r io.Reader) error {
				if _, err := b.Get(ctx, dir+"/f", 100); err == nil {
					return nil
				}
				return b.Put(ctx, dir, r)
			}
		}},
		{"put refuses names that leave the directory", func(w *world) {
			w.put = repack(func(h *tar.Header) { h.Name = strings.TrimPrefix(path.Clean("/"+h.Name), "/") })
		}},
		{"put refuses names that leave the directory", func(w *world) {
			w.put = func(ctx context.Context, b sandbox.Sandbox, _ string, r io.Reader) error {
				up := repack(func(h *tar.Header) { h.Name = strings.TrimPrefix(path.Clean("/workspace/in/"+h.Name), "/") })
				return up(ctx, b, "/", r)
			}
		}},
		{"put refuses links that leave the directory", func(w *world) { w.put = unrefused }},
		{"put does not follow links of the job", func(w *world) {
			w.put = func(ctx context.Context, b sandbox.Sandbox, dir string, _ io.Reader) error {
				_, err := b.Run(ctx, shell(`echo x > "$1"/file`, dir))
				return err
			}
		}},
		{"put refuses what is no archive", func(w *world) { w.put = unrefused }},
		{"get returns all of a file", func(w *world) {
			w.get = func(ctx context.Context, b sandbox.Sandbox, name string, limit int64) ([]byte, error) {
				content, err := b.Get(ctx, name, limit)
				text, _, _ := bytes.Cut(content, []byte{0})
				return text, err
			}
		}},
		{"get returns no more than asked", func(w *world) {
			w.get = func(ctx context.Context, b sandbox.Sandbox, name string, _ int64) ([]byte, error) {
				return b.Get(ctx, name, 1<<20)
			}
		}},
		{"get of an absent file is ErrNotExist", func(w *world) {
			w.get = func(ctx context.Context, b sandbox.Sandbox, name string, limit int64) ([]byte, error) {
				content, err := b.Get(ctx, name, limit)
				if err != nil {
					err = errBroken
				}
				return content, err
			}
		}},
		{"get follows no link", func(w *world) { w.get = following }},
		{"get of what is no file is refused", func(w *world) {
			w.get = func(ctx context.Context, b sandbox.Sandbox, name string, limit int64) ([]byte, error) {
				content, _ := b.Get(ctx, name, limit)
				return content, nil
			}
		}},
	}
}

// following reads a file of the box as any process there does.
func following(ctx context.Context, b sandbox.Sandbox, name string, limit int64) ([]byte, error) {
	r := (&box{Sandbox: b}).run(ctx, shell(`head -c "$1" "$2"`, strconv.FormatInt(limit, 10), name))
	return []byte(r.out), r.succeeded()
}

func limitMutants() []mutant {
	lifted := func(change func(l *sandbox.Limits)) func(w *world) {
		return func(w *world) { w.spec = func(s *sandbox.Spec) { change(&s.Limits) } }
	}
	return []mutant{
		{"memory over the limit is killed and said to be", lifted(func(l *sandbox.Limits) { l.Memory = 0 })},
		{"memory over the limit is killed and said to be", func(w *world) {
			w.run = exits(func(_ sandbox.Process, e *sandbox.Exit) error { e.OOM = false; return nil })
		}},
		{"memory over the limit is killed and said to be", func(w *world) { // and the neighbour dies of it
			w.run = func(ctx context.Context, b sandbox.Sandbox, p sandbox.Process) (sandbox.Exit, error) {
				exit, err := b.Run(ctx, p)
				if ctx.Err() != nil {
					return sandbox.Exit{}, sandbox.ErrDied
				}
				return exit, err
			}
		}},
		{"shared memory counts as memory", lifted(func(l *sandbox.Limits) { l.Memory = 0 })},
		{"processes over the limit are refused", lifted(func(l *sandbox.Limits) { l.Pids = 0 })},
		{"threads over the limit are refused", lifted(func(l *sandbox.Limits) { l.Pids = 0 })},
		{"bytes over the limit are refused", lifted(func(l *sandbox.Limits) { l.Disk = 0 })},
		{"files over the limit are refused", lifted(func(l *sandbox.Limits) { l.Inodes = 0 })},
		{"computing over the limit is slowed down", func(w *world) {
			w.run = rewrite(func(sandbox.Process, []byte) []byte { return []byte("900\n") })
		}},
	}
}

func isolationMutants() []mutant {
	return []mutant{
		{"no socket reaches the host", func(w *world) {
			w.run = func(ctx context.Context, b sandbox.Sandbox, p sandbox.Process) (sandbox.Exit, error) {
				if len(p.Args) > 4 && p.Args[1] == "connect" {
					return sandbox.Exit{}, send(ctx, Target{p.Args[2], p.Args[3]}, p.Args[4])
				}
				return b.Run(ctx, p)
			}
		}},
		{"process 1 reaches nothing either", func(w *world) {
			w.probed = func(o []sandbox.Outcome) {
				if len(o) > 0 {
					o[0].Err = nil
				}
			}
		}},
		{"no process of the host is visible", func(w *world) {
			w.run = rewrite(func(p sandbox.Process, out []byte) []byte {
				if len(p.Args) > 2 && strings.Contains(p.Args[2], "cmdline") {
					for _, e := range hostCommands() {
						out = append(out, e...)
					}
				}
				return out
			})
		}},
		{"no process of the host is visible", func(w *world) { w.run = succeeds("kill") }},
		{"no file of the host is visible", func(w *world) { w.run = succeeds("find") }},
		{"no environment of the host is visible", func(w *world) {
			w.run = rewrite(func(sandbox.Process, []byte) []byte { return []byte(os.Environ()[0] + "\n") })
		}},
		{"no environment of the host is visible", func(w *world) { w.run = succeeds("open") }},
		{"no socket of the host is in the file system", func(w *world) { w.run = succeeds("sockets") }},
		{"no socket of the host is in the file system", func(w *world) { w.run = succeeds("connect") }},
		{"no privilege can be gained", func(w *world) { w.run = replace("NoNewPrivs:\t1", "NoNewPrivs:\t0") }},
		{"system calls are filtered", func(w *world) { w.run = replace("Seccomp:\t2", "Seccomp:\t0") }},
		{"no capability over the machine is held", func(w *world) { w.run = replace("CapBnd:\t0000000000", "CapBnd:\t0000000020") }},
		{"a setuid program gains nothing", func(w *world) { w.run = succeeds("setuid") }},
		{"a box cannot see another", func(w *world) { w.run = succeeds("find") }},
	}
}

// hostCommands are the arguments of all processes.
func hostCommands() [][]byte {
	var all [][]byte
	dirs, _ := os.ReadDir("/proc") // none are enough for the mutant to fail
	for _, d := range dirs {
		if b, err := os.ReadFile("/proc/" + d.Name() + "/cmdline"); err == nil {
			all = append(all, b)
		}
	}
	return all
}
