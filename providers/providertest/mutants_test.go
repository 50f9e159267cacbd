package providertest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
)

// A faulty provider is the fake with some of its methods replaced.
type faulty struct {
	*Fake
	poll     func(context.Context) (providers.Offer, error)
	claim    func(context.Context, string, providers.Offer) (providers.Job, error)
	watch    func(context.Context, string, []byte) error
	complete func(context.Context, string, []byte, providers.Result) error
	log      func(providers.Log) providers.Log
	open     func(error) error
	source   func(providers.Job) (providers.Source, error)
}

func (p *faulty) Source(j providers.Job) (providers.Source, error) {
	if p.source != nil {
		return p.source(j)
	}
	return p.Fake.Source(j)
}

func (p *faulty) Poll(ctx context.Context) (providers.Offer, error) {
	if p.poll != nil {
		return p.poll(ctx)
	}
	return p.Fake.Poll(ctx)
}

func (p *faulty) Claim(ctx context.Context, name string, o providers.Offer) (providers.Job, error) {
	if p.claim != nil {
		return p.claim(ctx, name, o)
	}
	return p.Fake.Claim(ctx, name, o)
}

func (p *faulty) Watch(ctx context.Context, name string, ref []byte) error {
	if p.watch != nil {
		return p.watch(ctx, name, ref)
	}
	return p.Fake.Watch(ctx, name, ref)
}

func (p *faulty) Complete(ctx context.Context, name string, ref []byte, r providers.Result) error {
	if p.complete != nil {
		return p.complete(ctx, name, ref, r)
	}
	return p.Fake.Complete(ctx, name, ref, r)
}

func (p *faulty) Log(ctx context.Context, name string, ref []byte) (providers.Log, error) {
	l, err := p.Fake.Log(ctx, name, ref)
	if err == nil && p.log != nil {
		l = p.log(l)
	}
	if err != nil && p.open != nil {
		err = p.open(err)
	}
	return l, err
}

// A faultyLog is a log with some of its methods replaced.
type faultyLog struct {
	providers.Log
	write func([]byte) error
	step  func(providers.StepState) error
	close func(context.Context) error
}

func (l *faultyLog) Write(at time.Time, step int, b []byte) error {
	if l.write != nil {
		return l.write(b)
	}
	return l.Log.Write(at, step, b)
}

func (l *faultyLog) Step(s providers.StepState) error {
	if l.step != nil {
		return l.step(s)
	}
	return l.Log.Step(s)
}

func (l *faultyLog) Close(ctx context.Context) error {
	if l.close != nil {
		return l.close(ctx)
	}
	return l.Log.Close(ctx)
}

// mutants break one promise each. The clause must be red; others may be too
// where one promise rests on another.
func mutants() map[string]func(*faulty) {
	all := pollMutants()
	for _, some := range []map[string]func(*faulty){claimMutants(), watchMutants(), completeMutants(), logMutants(), noteMutants()} {
		maps.Copy(all, some)
	}
	return all
}

func pollMutants() map[string]func(*faulty) {
	return map[string]func(*faulty){
		"poll waits and gives back when ctx ends": func(p *faulty) {
			p.poll = func(ctx context.Context) (providers.Offer, error) { return p.Fake.Poll(context.WithoutCancel(ctx)) }
		},
		"poll offers what is submitted while it waits": func(p *faulty) {
			p.poll = func(ctx context.Context) (providers.Offer, error) {
				now, cancel := context.WithTimeout(ctx, moment/2)
				defer cancel()
				if o, err := p.Fake.Poll(now); err == nil {
					return o, nil
				}
				<-ctx.Done() // looked once, and sleeps for ever
				return providers.Offer{}, ctx.Err()
			}
		},
	}
}

func claimMutants() map[string]func(*faulty) {
	return map[string]func(*faulty){
		"the source of a job is the service's own": func(p *faulty) {
			p.source = func(j providers.Job) (providers.Source, error) {
				s, err := p.Fake.Source(j)
				if github, ok := j.Contexts["github"].(map[string]any); ok && github["server_url"] != nil {
					s.URL = fmt.Sprint(github["server_url"])
				}
				return s, err
			}
		},
		"claim gives the job that was submitted": func(p *faulty) {
			p.claim = func(ctx context.Context, name string, o providers.Offer) (providers.Job, error) {
				j, err := p.Fake.Claim(ctx, name, o)
				j.Trust = ""
				return j, err
			}
		},
		"claiming a name twice gives the same job": func(p *faulty) {
			p.claim = func(ctx context.Context, name string, o providers.Offer) (providers.Job, error) {
				j, err := p.Fake.Claim(ctx, name, o)
				j.Subject.Actor = time.Now().String()
				return j, err
			}
		},
		"claiming a name again after a restart gives the same job": func(p *faulty) {
			mine := map[string]bool{}
			p.claim = func(ctx context.Context, name string, o providers.Offer) (providers.Job, error) {
				names, err := p.Fake.Owed()
				if err == nil && strings.Contains(strings.Join(names, " "), name) && !mine[name] {
					return providers.Job{}, providers.ErrGone
				}
				mine[name] = true
				return p.Fake.Claim(ctx, name, o)
			}
		},
		"an offer is claimed by one agent only":             copies,
		"fifty jobs and four agents: none lost, none twice": copies,
		"a completed job is not offered again":              copies,
		"an offer that never was is gone": func(p *faulty) {
			p.claim = func(ctx context.Context, name string, o providers.Offer) (providers.Job, error) {
				j, err := p.Fake.Claim(ctx, name, o)
				if errors.Is(err, providers.ErrGone) {
					err = errors.New("404 not found")
				}
				return j, err
			}
		},
		"a bad job is claimed, refused and can be completed": func(p *faulty) {
			p.claim = func(ctx context.Context, name string, o providers.Offer) (providers.Job, error) {
				j, err := p.Fake.Claim(ctx, name, o)
				if errors.Is(err, providers.ErrBadJob) {
					return providers.Job{}, err
				}
				return j, err
			}
		},
		"names of 40 bytes work": func(p *faulty) {
			p.claim = func(ctx context.Context, name string, o providers.Offer) (providers.Job, error) {
				return p.Fake.Claim(ctx, name[:min(len(name), 32)], o)
			}
		},
	}
}

func watchMutants() map[string]func(*faulty) {
	return map[string]func(*faulty){
		"watch lasts until ctx ends": func(p *faulty) {
			p.watch = func(context.Context, string, []byte) error { return nil }
		},
		"watch tells of a cancel": func(p *faulty) {
			p.watch = func(ctx context.Context, _ string, _ []byte) error { <-ctx.Done(); return nil }
		},
		"watch tells of a cancel that came before it": func(p *faulty) {
			p.watch = func(ctx context.Context, name string, ref []byte) error {
				done, cancel := context.WithCancel(ctx)
				cancel()
				if p.Fake.Watch(done, name, ref) == nil {
					return p.Fake.Watch(ctx, name, ref)
				}
				<-ctx.Done() // the edge was before
				return nil
			}
		},
		"watch goes on after a cancel": func(p *faulty) {
			p.watch = func(ctx context.Context, name string, ref []byte) error {
				p.told = map[string]bool{}
				return p.Fake.Watch(ctx, name, ref)
			}
		},
	}
}

func completeMutants() map[string]func(*faulty) {
	return map[string]func(*faulty){
		"complete reports the result": func(p *faulty) {
			p.complete = func(ctx context.Context, name string, ref []byte, _ providers.Result) error {
				return p.Fake.Complete(ctx, name, ref, providers.Result{Conclusion: providers.Success})
			}
		},
		"complete twice reports once": func(p *faulty) {
			p.complete = func(ctx context.Context, name string, ref []byte, r providers.Result) error {
				err := p.Fake.Complete(ctx, name, ref, r)
				calls, _ := p.Calls()
				file := p.path("reports", fmt.Sprintf("%s.%d", name, len(calls)))
				for _, c := range calls {
					if c.Name == name && c.ID != "" {
						return errors.Join(err, os.WriteFile(file, fmt.Appendf(nil, `{"id":%q,"result":{"conclusion":%q}}`, c.ID, r.Conclusion), 0o600))
					}
				}
				return err
			}
		},
		"complete works without a ref": func(p *faulty) {
			p.complete = func(ctx context.Context, name string, ref []byte, r providers.Result) error {
				if len(ref) == 0 {
					return nil
				}
				return p.Fake.Complete(ctx, name, ref, r)
			}
		},
		"complete works after a restart": func(p *faulty) {
			var mine sync.Map
			p.claim = func(ctx context.Context, name string, o providers.Offer) (providers.Job, error) {
				mine.Store(name, true)
				return p.Fake.Claim(ctx, name, o)
			}
			p.complete = func(ctx context.Context, name string, ref []byte, r providers.Result) error {
				if _, ok := mine.Load(name); !ok {
					return nil
				}
				return p.Fake.Complete(ctx, name, ref, r)
			}
		},
		"complete of a name never claimed does nothing": func(p *faulty) {
			p.complete = func(ctx context.Context, name string, ref []byte, r providers.Result) error {
				if _, err := os.Lstat(p.path("claims", name)); err != nil {
					return err
				}
				return p.Fake.Complete(ctx, name, ref, r)
			}
		},
	}
}

func logMutants() map[string]func(*faulty) {
	return map[string]func(*faulty){
		"the log holds the bytes as written": func(p *faulty) {
			p.log = func(l providers.Log) providers.Log {
				return &faultyLog{Log: l, write: func(b []byte) error {
					return l.Write(time.Now(), 0, []byte(strings.ToValidUTF8(string(b), "?")))
				}}
			}
		},
		"the log goes on behind what was written": func(p *faulty) {
			p.log = func(l providers.Log) providers.Log {
				_ = os.Remove(l.(*fakeLog).file)
				return l
			}
		},
		"the log is with the service when close returns": func(p *faulty) {
			var kept []byte
			p.log = func(l providers.Log) providers.Log {
				return &faultyLog{Log: l, write: func(b []byte) error { kept = append(kept, b...); return nil }}
			}
			p.complete = func(ctx context.Context, name string, ref []byte, r providers.Result) error {
				l, err := p.Fake.Log(ctx, name, ref)
				if err == nil {
					err = l.Write(time.Now(), 0, kept)
				}
				return errors.Join(err, p.Fake.Complete(ctx, name, ref, r))
			}
		},
		"the log closes after the job's ctx is done": nil, // needs the ctx of Log: see lateLog
		"the log of a name without a claim is gone": func(p *faulty) {
			p.open = func(error) error { return errors.New("claim: not found") }
		},
		"the states of steps are shown": func(p *faulty) {
			p.log = func(l providers.Log) providers.Log {
				return &faultyLog{Log: l, step: func(s providers.StepState) error {
					s.Ended = time.Time{}
					return l.Step(s)
				}}
			}
		},
	}
}

// copies offers a job again after it was claimed.
func copies(p *faulty) {
	p.claim = func(ctx context.Context, name string, o providers.Offer) (providers.Job, error) {
		id := filepath.Base(o.ID)
		b, err := os.ReadFile(p.path("offers", id))
		j, cerr := p.Fake.Claim(ctx, name, o)
		if err == nil && cerr == nil {
			cerr = errors.Join(os.WriteFile(p.path("offers", "."+id), b, 0o600), os.Rename(p.path("offers", "."+id), p.path("offers", id)))
		}
		return j, cerr
	}
}

// lateLog is a log that stops with the ctx that it was opened with.
type lateLog struct{ *Fake }

func (p lateLog) Log(ctx context.Context, name string, ref []byte) (providers.Log, error) {
	l, err := p.Fake.Log(ctx, name, ref)
	if err != nil {
		return nil, err
	}
	return &faultyLog{Log: l, write: func(b []byte) error {
		return errors.Join(ctx.Err(), l.Write(time.Now(), 0, b))
	}}, nil
}
