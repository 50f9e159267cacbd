package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner/gitcache"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox"
)

// doctorTimeout bounds one question to one backend.
const doctorTimeout = 20 * time.Second

// A finding is one line of the doctor.
type finding struct {
	About  string `json:"about"` // "runtime native"
	Name   string `json:"name"`
	State  string `json:"state"` // ok, missing, unproven
	Detail string `json:"detail,omitempty"`
}

const (
	stateOK      = "ok"
	stateMissing = "missing"
)

func runDoctor(c *call) error {
	o, err := c.flags("doctor", 0, nil)
	if err != nil {
		return err
	}
	found := host()
	w, err := c.wireDoctor(o.config)
	if err != nil {
		found = append(found, finding{"configuration", o.config, stateMissing, err.Error()})
	} else {
		defer w.close()
		found = append(found, w.examine()...)
	}
	bad := 0
	var b strings.Builder
	for _, f := range found {
		if f.State != stateOK {
			bad++
		}
		fmt.Fprintf(&b, "%-8s %s: %s", f.State, f.About, f.Name)
		if f.Detail != "" {
			b.WriteString("  (" + f.Detail + ")")
		}
		b.WriteByte('\n')
	}
	if bad == 0 {
		b.WriteString("\neverything that Mayfly promises is enforced here\n")
	} else {
		fmt.Fprintf(&b, "\n%d of %d are missing: what each means stands beside it\n", bad, len(found))
	}
	if err := c.print(o, found, b.String()); err != nil {
		return err
	}
	if bad > 0 {
		return exitError{exitNo, nil}
	}
	return nil
}

// wireDoctor is the agent of the configuration, or what "mayfly exec" would use
// on a machine without one.
func (c *call) wireDoctor(path string) (*wiring, error) {
	if !noConfig(path) {
		return wireBeside(path, c.stderr)
	}
	state, err := execState("")
	if err != nil {
		return nil, err
	}
	return wireExec(path, state, policy.Nothing(), zerolog.Nop())
}

// host looks at the machine itself.
func host() []finding {
	var u unix.Utsname
	fs := []finding{}
	if err := unix.Uname(&u); err != nil {
		fs = append(fs, finding{"host", "kernel", stateMissing, err.Error()})
	} else {
		fs = append(fs, finding{"host", "kernel", stateOK, "Linux " + unix.ByteSliceToString(u.Release[:]) + " " + unix.ByteSliceToString(u.Machine[:])})
	}
	who := finding{"host", "root", stateOK, "boxes get id ranges, limits and disks of their own"}
	if os.Geteuid() != 0 {
		who.State = stateMissing
		who.Detail = "an ordinary user can run boxes, but not limit them: run the agent as root to have limits, disks and owners"
	}
	return append(fs, who)
}

// examine asks every part of the configuration what it can do here.
func (w *wiring) examine() []finding {
	ctx := context.Background()
	var fs []finding
	for _, name := range slices.Sorted(maps.Keys(w.agent.Runtimes)) {
		fs = append(fs, w.examineRuntime(ctx, name, w.agent.Runtimes[name])...)
		fs = append(fs, examineImages(ctx, name, w.agent.Runtimes[name])...)
	}
	for _, name := range slices.Sorted(maps.Keys(w.agent.Issuers)) {
		fs = slices.Concat(fs, []finding{examineIssuer(ctx, name, w.agent.Issuers[name])}, examineStatic(name, w.agent.Issuers[name]), examineSSH(name, w.agent.Issuers[name]))
	}
	for _, name := range slices.Sorted(maps.Keys(w.agent.Providers)) {
		fs = append(fs, examineProvider(ctx, name, w.agent.Providers[name]))
	}
	fs = append(fs, w.examineIdentity()...)
	fs = append(fs, w.examineOutbound(ctx)...)
	fs = append(fs, finding{"policy", w.policyFile, stateOK, w.agent.Policy.Digest()})
	return slices.Concat(fs, examineGateway(), w.examineLearning(), w.examineState(), w.examineSlots(), w.examineWarm(), w.examineMonitor(), w.examineGit(ctx))
}

// examineIssuer lists leases, and asks an issuer that cannot for what it can say
// without minting one.
func examineIssuer(ctx context.Context, name string, i creds.Issuer) finding {
	ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	leases, err := i.List(ctx)
	f := finding{"issuer " + name, "reachable", stateOK, fmt.Sprintf("%d leases of this installation live now", len(leases))}
	if errors.Is(err, errors.ErrUnsupported) {
		f.Detail, err = "cannot list its leases: the reaper does not cover it", nil
		if c, ok := i.(interface{ Check(context.Context) error }); ok {
			err = c.Check(ctx)
		}
	}
	if err != nil {
		f.State, f.Detail = stateMissing, err.Error()
	}
	return f
}

// examineGateway says whose certificates jobs see and whose the gateway believes.
func examineGateway() []finding {
	f := finding{"gateway", "https", stateOK, "TLS that a rule ends here has an authority for each job, made when it is needed; destinations are believed as this machine does"}
	roots, err := x509.SystemCertPool()
	switch {
	case err != nil:
		f.State, f.Detail = stateMissing, err.Error()
	case roots.Equal(x509.NewCertPool()):
		f.State, f.Detail = stateMissing, "this machine trusts no authority: install ca-certificates, or write ca: in each https rule"
	}
	return []finding{f}
}

// examineProvider asks a service that can be asked without taking a job.
func examineProvider(ctx context.Context, name string, p providers.Provider) finding {
	checker, ok := p.(interface {
		Check(ctx context.Context) (string, error)
	})
	if !ok {
		return finding{"provider " + name, "configured", stateOK, ""}
	}
	ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	detail, err := checker.Check(ctx)
	if err != nil {
		return finding{"provider " + name, "reachable", stateMissing, err.Error()}
	}
	return finding{"provider " + name, "reachable", stateOK, detail}
}

// examineRuntime asks a runtime what it enforces, and tries its wall from inside.
func (w *wiring) examineRuntime(ctx context.Context, name string, r sandbox.Runtime) []finding {
	ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	about := "runtime " + name
	claims, err := r.Check(ctx)
	var fs []finding
	for _, c := range claims {
		f := finding{about, c.Name, stateOK, c.Detail}
		if !c.Enforced {
			f.State = stateMissing
		}
		fs = append(fs, f)
	}
	if err != nil {
		return append(fs, finding{about, "usable", stateMissing, err.Error()})
	}
	fs = append(fs, finding{about, "services", stateOK, services(r)})
	seen, err := w.look(ctx, r)
	if err != nil {
		return append(fs, finding{about, "wall from inside", stateMissing, err.Error()})
	}
	return append(fs, finding{about, "wall from inside", stateOK, seen})
}

// examineGit asks git which version it is, and looks at what the cache has.
func (w *wiring) examineGit(ctx context.Context) []finding {
	if w.config.GitCache.Dir == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	detail, err := gitcache.Check(ctx, w.gitCacheConfig())
	f := finding{"git cache", w.config.GitCache.Dir, stateOK, detail}
	if err != nil {
		f.State, f.Detail = stateMissing, err.Error()+": jobs fetch all of their repositories"
	}
	return []finding{f}
}

// services says whether workflows may have services and images of their own,
// which is nothing that a machine lacks.
func services(r sandbox.Runtime) string {
	if _, ok := r.(sandbox.Puller); !ok {
		return "none: it has no images, so container: and services: of workflows are refused"
	}
	if os.Geteuid() != 0 {
		return "none: an ordinary user cannot enter the networks of boxes"
	}
	return "container: and services: of workflows, where a rule has images:"
}

func (w *wiring) examineState() []finding {
	jobs, err := w.state.Jobs()
	warm := 0
	for _, j := range jobs {
		if j.Warm {
			warm++
		}
	}
	f := finding{"state", w.state.Dir, stateOK, fmt.Sprintf("generation %d, %d jobs owe something", w.state.Generation, len(jobs)-warm)}
	if warm > 0 {
		f.Detail += fmt.Sprintf(", %d boxes are ready", warm)
	}
	if err != nil {
		f.State, f.Detail = stateMissing, err.Error()
	}
	return []finding{f, w.examineKeys(), examineLeases(jobs)}
}
