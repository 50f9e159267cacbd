package credstest

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
)

// ErrDown is what a fake says while its backend is down.
var ErrDown = errors.New("fake backend is down")

// ErrRefused is what Use says of a token that is not valid.
var ErrRefused = errors.New("fake token refused")

// A FakeConfig says how a fake behaves.
type FakeConfig struct {
	// Dir holds the backend: one file per lease, named after it, and "!down"
	// while it is down. It outlives the process, so that a crash test can kill
	// the agent and look at what is left. It must exist.
	Dir   string
	Owner string // installation id

	// NeedsHandle makes it an issuer that knows no names: Revoke and Probe
	// need the token itself, as with tokens that are revoked by presenting them.
	NeedsHandle bool

	// Trace is called before and after each outside effect: "fake.issue.before",
	// "fake.issue.after", "fake.revoke.before", "fake.revoke.after". nil is none.
	Trace func(point string)

	// Hook is called first by each method, with "issue", "revoke", "probe",
	// "list" or "use" and the name of the lease. Its error is the method's. It
	// may block until ctx ends. nil is none.
	Hook func(ctx context.Context, method, name string) error

	Now func() time.Time // nil is time.Now
}

// A Fake is an issuer whose provider is a directory. Several fakes over one
// directory, in one process or many, are one provider.
type Fake struct{ config FakeConfig }

// A record is the file of a lease.
type record struct {
	Token   string        `json:"token"`
	Owner   string        `json:"owner"`
	Expires time.Time     `json:"expires"`
	Subject creds.Subject `json:"subject"`
}

const downFile = "!down" // no name of a lease

// fakeScope is all that a fake understands.
type fakeScope struct {
	Read []string `json:"read"`
}

// NewFake returns a fake over c.Dir.
func NewFake(c FakeConfig) (*Fake, error) {
	if info, err := os.Stat(c.Dir); err != nil || !info.IsDir() {
		return nil, errors.Join(fmt.Errorf("fake issuer: dir %q: want a directory", c.Dir), err)
	}
	if c.Trace == nil {
		c.Trace = func(string) {}
	}
	if c.Hook == nil {
		c.Hook = func(context.Context, string, string) error { return nil }
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return &Fake{c}, nil
}

// SetDown takes the backend down, or up again.
func (f *Fake) SetDown(down bool) error {
	if down {
		return os.WriteFile(filepath.Join(f.config.Dir, downFile), nil, 0o600)
	}
	if err := os.Remove(filepath.Join(f.config.Dir, downFile)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Issue implements creds.Issuer. The lease has the value "token" and the fact
// "provider".
func (f *Fake) Issue(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
	if err := f.begin(ctx, "issue", name); err != nil {
		return creds.Lease{}, err
	}
	if err := f.CheckScope(g.Scope); err != nil {
		return creds.Lease{}, err
	}
	if !g.Expires.After(f.config.Now()) {
		return creds.Lease{}, fmt.Errorf("lease %s: grant expired at %s", name, g.Expires)
	}
	r := record{rand.Text(), f.config.Owner, g.Expires.Truncate(time.Second), g.Subject}
	f.config.Trace("fake.issue.before")
	if err := f.write(name, r); err != nil {
		return creds.Lease{}, fmt.Errorf("lease %s: %w", name, err)
	}
	f.config.Trace("fake.issue.after")
	return creds.Lease{
		Values: map[string]creds.Secret{"token": creds.NewSecret(r.Token)},
		Facts:  map[string]string{"provider": "fake"},
		Handle: []byte(r.Token), ByName: !f.config.NeedsHandle, ExpiresAt: r.Expires,
	}, nil
}

// write makes the file whole and only if there is none.
func (f *Fake) write(name string, r record) (err error) {
	content, err := json.Marshal(r)
	if err != nil {
		return err
	}
	tmp, err := os.CreateTemp(f.config.Dir, "!new-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(tmp.Name())) }()
	_, err = tmp.Write(content)
	if err = errors.Join(err, tmp.Close()); err != nil {
		return err
	}
	return os.Link(tmp.Name(), f.path(name))
}

// Revoke implements creds.Issuer.
func (f *Fake) Revoke(ctx context.Context, name string, handle []byte) error {
	if err := f.begin(ctx, "revoke", name); err != nil {
		return err
	}
	if f.config.NeedsHandle && handle == nil {
		return fmt.Errorf("lease %s: %w", name, creds.ErrNotRevocable)
	}
	f.config.Trace("fake.revoke.before")
	if err := os.Remove(f.path(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f.config.Trace("fake.revoke.after")
	return nil
}

// Probe implements creds.Issuer.
func (f *Fake) Probe(ctx context.Context, name string, handle []byte) (creds.Proof, error) {
	if err := f.begin(ctx, "probe", name); err != nil {
		return creds.Proof{}, err
	}
	if f.config.NeedsHandle && handle == nil {
		return creds.Proof{}, fmt.Errorf("lease %s: nothing to try without its token", name)
	}
	r, err := f.read(name)
	how := "looked for " + name
	if handle != nil {
		how = "presented the token of " + name
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return creds.Proof{At: f.config.Now(), How: how, Refusal: "unknown token"}, nil
	case err != nil:
		return creds.Proof{}, err
	case !r.Expires.After(f.config.Now()):
		return creds.Proof{At: f.config.Now(), How: how, Refusal: "expired"}, nil
	}
	return creds.Proof{}, fmt.Errorf("lease %s: %w", name, creds.ErrStillValid)
}

// List implements creds.Issuer.
func (f *Fake) List(ctx context.Context) ([]creds.Info, error) {
	if err := f.begin(ctx, "list", ""); err != nil {
		return nil, err
	}
	if f.config.NeedsHandle {
		return nil, fmt.Errorf("list leases: %w", errors.ErrUnsupported)
	}
	names, err := f.Live()
	if err != nil {
		return nil, err
	}
	var infos []creds.Info
	for _, name := range names {
		r, err := f.read(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if r.Owner == f.config.Owner {
			infos = append(infos, creds.Info{Name: name, Owner: r.Owner, ExpiresAt: r.Expires})
		}
	}
	return infos, nil
}

// CheckScope implements creds.ScopeChecker: {"read": ["a", "b"]} or nothing.
func (f *Fake) CheckScope(scope json.RawMessage) error {
	if len(scope) == 0 {
		return nil
	}
	d := json.NewDecoder(bytes.NewReader(scope))
	d.DisallowUnknownFields()
	if err := d.Decode(&fakeScope{}); err != nil {
		return fmt.Errorf("%w: %w", creds.ErrBadScope, err)
	}
	return nil
}

// Use is what a job does: it presents the token. A token that is not valid is
// ErrRefused.
func (f *Fake) Use(ctx context.Context, l creds.Lease) error {
	if err := f.begin(ctx, "use", ""); err != nil {
		return err
	}
	names, err := f.Live()
	if err != nil {
		return err
	}
	for _, name := range names {
		r, err := f.read(name)
		if err == nil && r.Token == l.Values["token"].Reveal() && r.Expires.After(f.config.Now()) {
			return nil
		}
	}
	return ErrRefused
}

// Live names the leases that exist at the provider, whoever made them, up or
// down: for the invariants of tests.
func (f *Fake) Live() ([]string, error) {
	entries, err := os.ReadDir(f.config.Dir)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), "!") {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// begin is what all methods do first.
func (f *Fake) begin(ctx context.Context, method, name string) error {
	if err := f.config.Hook(ctx, method, name); err != nil {
		return err
	}
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if name == "" && (method == "list" || method == "use") {
		name = "-"
	}
	if name == "" || len(name) > 40 || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		return fmt.Errorf("lease name %q: want 1 to 40 bytes of a-z, 0-9 and -", name)
	}
	if _, err := os.Stat(filepath.Join(f.config.Dir, downFile)); !errors.Is(err, fs.ErrNotExist) {
		return errors.Join(fmt.Errorf("%s: %w", method, ErrDown), err)
	}
	return nil
}

func (f *Fake) path(name string) string { return filepath.Join(f.config.Dir, name) }

func (f *Fake) read(name string) (record, error) {
	var r record
	content, err := os.ReadFile(f.path(name))
	if err != nil {
		return r, err
	}
	return r, json.Unmarshal(content, &r)
}

var (
	_ creds.Issuer       = (*Fake)(nil)
	_ creds.ScopeChecker = (*Fake)(nil)
)
