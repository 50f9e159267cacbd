package ssh

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// publishTimeout bounds the command that takes the list to the servers; set
// 2026-11-24.
const publishTimeout = 30 * time.Second

// A record is what the store keeps: the list, and how often it has changed.
type record struct {
	Version uint64    `json:"version"`
	Revoked []revoked `json:"revoked"`
}

func openHandle(sealed []byte) (handle, error) {
	var h handle
	if err := json.Unmarshal(sealed, &h); err != nil || h.Key == "" || h.Cert == "" {
		return handle{}, errors.New("handle: not one of this issuer") // its text is a secret
	}
	return h, nil
}

// Revoke implements creds.Issuer. The name is all it takes. It is published again
// each time: who asks twice may have been killed before.
func (i *Issuer) Revoke(ctx context.Context, name string, sealed []byte) error {
	err := checkName(name)
	// Without a handle it may be any time that was possible.
	until := i.config.Now().Add(i.config.Longest)
	if err == nil && sealed != nil {
		var h handle
		if h, err = openHandle(sealed); err == nil {
			until = h.Expires
		}
	}
	if err == nil {
		err = i.revoke(ctx, i.serial(name), until)
	}
	if err != nil {
		return fmt.Errorf("revoke lease %s: %w", name, err)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	delete(i.names, name)
	return nil
}

func (i *Issuer) revoke(ctx context.Context, serial uint64, until time.Time) error {
	ca, err := i.authority()
	if err != nil {
		return err
	}
	i.listing.Lock()
	defer i.listing.Unlock()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	r, err := i.load()
	if err != nil {
		return err
	}
	now := i.config.Now()
	// A server's clock may be behind.
	r.Revoked = slices.DeleteFunc(r.Revoked, func(e revoked) bool { return e.Until.Add(time.Hour).Before(now) })
	entry := revoked{blob(ca.PublicKey()), serial, until.UTC().Truncate(time.Second)}
	if at := slices.IndexFunc(r.Revoked, func(e revoked) bool { return e.CA == entry.CA && e.Serial == serial }); at < 0 {
		r.Version++
		r.Revoked = append(r.Revoked, entry)
		b, err := json.Marshal(r)
		if err != nil {
			return err
		}
		if err := i.config.Store.Save(b); err != nil {
			return fmt.Errorf("list of revoked certificates: %w", err)
		}
	}
	i.config.Trace("ssh.recorded")
	list, err := krl(r.Version, now, "mayfly "+i.config.Owner, r.Revoked)
	if err != nil {
		return err
	}
	if err := i.publish(ctx, list); err != nil {
		return fmt.Errorf("list of revoked certificates: %w", err)
	}
	i.config.Trace("ssh.published")
	return nil
}

func (i *Issuer) load() (record, error) {
	var r record
	b, err := i.config.Store.Load()
	if err == nil && b != nil {
		err = json.Unmarshal(b, &r)
	}
	if err != nil {
		return r, fmt.Errorf("list of revoked certificates: %w", err)
	}
	return r, nil
}

// publish writes the file and runs the command. Both have the list, or it is an
// error.
func (i *Issuer) publish(ctx context.Context, list []byte) error {
	var errs []error
	if i.config.List != "" {
		errs = append(errs, replace(i.config.List, list))
	}
	if len(i.config.Publish) > 0 {
		ctx, cancel := context.WithTimeout(ctx, publishTimeout)
		defer cancel()
		cmd := exec.CommandContext(ctx, i.config.Publish[0], i.config.Publish[1:]...)
		cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"} // nothing of the agent's
		cmd.Stdin = bytes.NewReader(list)
		cmd.WaitDelay = time.Second
		if out, err := cmd.CombinedOutput(); err != nil {
			text := line(string(out))
			errs = append(errs, fmt.Errorf("publish: %s: %w: %s", i.config.Publish[0], err, text[:min(len(text), 300)]))
		}
	}
	return errors.Join(errs...)
}

// replace writes a file that servers may be reading, who refuse every key while
// they cannot.
func replace(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err := errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return os.Rename(f.Name(), path)
}

// Published writes the list as it is, so that servers have one before the first
// revocation: without it they refuse every key.
func (i *Issuer) Published(ctx context.Context) error {
	i.listing.Lock()
	defer i.listing.Unlock()
	r, err := i.load()
	if err != nil {
		return err
	}
	list, err := krl(r.Version, i.config.Now(), "mayfly "+strings.TrimSpace(i.config.Owner), r.Revoked)
	if err != nil {
		return err
	}
	return i.publish(ctx, list)
}
