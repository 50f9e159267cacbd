package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/mayfly-ci/mayfly/configs"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/image"
	"github.com/mayfly-ci/mayfly/sandbox/native"
)

// imagesNode is the key "images" of a native runtime.
type imagesNode struct {
	Pull         string            `yaml:"pull"`
	From         []string          `yaml:"from"`
	Sources      map[string]string `yaml:"sources"`
	DigestOnly   bool              `yaml:"digest_only"`
	CAFile       string            `yaml:"ca_file"`
	Insecure     []string          `yaml:"insecure"`
	TokenServers []string          `yaml:"token_servers"`
	MaxBytes     bytesNode         `yaml:"max_bytes"`
	MaxFiles     int64             `yaml:"max_files"`
	KeepBytes    bytesNode         `yaml:"keep_bytes"`
	KeepAge      time.Duration     `yaml:"keep_age"`
}

func (n imagesNode) config(section configs.Section) (image.Config, error) {
	c := image.Config{
		Pull: image.When(n.Pull), From: n.From, Sources: map[string]string{}, DigestOnly: n.DigestOnly,
		CAFile: section.Path(n.CAFile), Insecure: n.Insecure, TokenServers: n.TokenServers,
		MaxBytes: int64(n.MaxBytes), MaxFiles: n.MaxFiles, KeepBytes: int64(n.KeepBytes), KeepAge: n.KeepAge,
	}
	for name, path := range n.Sources {
		abs, err := filepath.Abs(section.Path(path))
		if err != nil {
			return c, err
		}
		c.Sources[name] = abs
	}
	if err := c.Validate(); err != nil {
		return c, section.Errorf("images", "%w", err)
	}
	return c, nil
}

func nativeConfig(section configs.Section, weak bool) (native.Config, error) {
	var own struct {
		Unprivileged *bool      `yaml:"unprivileged"`
		FirstID      uint32     `yaml:"first_id"`
		Cgroup       string     `yaml:"cgroup"`
		Base         []string   `yaml:"base"`
		Hide         []string   `yaml:"hide"`
		Images       imagesNode `yaml:"images"`

		GVisor *gvisorNode `yaml:"gvisor"`
	}
	if err := section.Decode(&own); err != nil {
		return native.Config{}, err
	}
	if own.Unprivileged != nil {
		weak = *own.Unprivileged
	}
	images, err := own.Images.config(section)
	if err != nil {
		return native.Config{}, err
	}
	kernel, err := own.GVisor.config(section)
	return native.Config{
		FirstID: own.FirstID, CgroupParent: own.Cgroup, Base: own.Base, Hide: own.Hide, Unprivileged: weak, Images: images, GVisor: kernel,
	}, err
}

// bytesNode is a number of bytes, written as the policy writes it.
type bytesNode int64

// UnmarshalText implements encoding.TextUnmarshaler.
func (n *bytesNode) UnmarshalText(b []byte) error {
	text := string(b)
	for i, unit := range []string{"KiB", "MiB", "GiB", "TiB"} {
		digits, ok := strings.CutSuffix(text, unit)
		v, err := strconv.ParseInt(digits, 10, 64)
		if shift := 10 * (i + 1); ok && err == nil && v > 0 && v <= math.MaxInt64>>shift {
			*n = bytesNode(v << shift)
			return nil
		}
	}
	return fmt.Errorf("%q is not a size: write a whole number and KiB, MiB, GiB or TiB, such as 8GiB", text)
}

func runImage(c *call) error {
	var name, runtime string
	o, err := c.flags("image", 2, func(fs *flag.FlagSet) {
		fs.StringVar(&name, "name", "", "what an imported image is called (default: what its archive says)")
		fs.StringVar(&runtime, "runtime", "", "runtime whose images are meant (default: the only one that keeps its own)")
	})
	if err != nil {
		return err
	}
	arguments := map[string]int{"pull": 2, "import": 2, "remove": 2, "list": 1, "prune": 1}
	if len(o.args) == 0 || arguments[o.args[0]] != len(o.args) {
		return usageError("want: mayfly image pull NAME | import FILE [--name NAME] | list | prune | remove NAME")
	}
	w, err := wireBeside(o.config, c.stderr)
	if err != nil {
		return err
	}
	defer w.close()
	store, puller, err := w.images(runtime)
	if err != nil {
		return exitError{exitUsage, err}
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	switch o.args[0] {
	case "pull":
		img, err := puller.Pull(ctx, sandbox.Pull{Image: o.args[1]})
		return c.said(o, img, err)
	case "import":
		img, err := store.Import(ctx, o.args[1], name)
		return c.said(o, img, err)
	case "remove":
		return store.Remove(ctx, o.args[1])
	case "prune":
		gone, err := store.Prune(ctx)
		text := strings.Join(gone, "\n") + fmt.Sprintf("\n%d images removed\n", len(gone))
		return errors.Join(err, c.print(o, gone, strings.TrimPrefix(text, "\n")))
	}
	return c.listImages(ctx, o, store)
}

// said prints what an image is.
func (c *call) said(o *options, img sandbox.Image, err error) error {
	if err != nil {
		return err
	}
	return c.print(o, img, fmt.Sprintf("%s  %s transferred\n", img.Digest, inMiB(img.Size)))
}

func (c *call) listImages(ctx context.Context, o *options, store *image.Store) error {
	entries, err := store.List(ctx)
	if err != nil {
		return err
	}
	var b strings.Builder
	for _, e := range entries {
		var notes []string
		if e.InUse {
			notes = append(notes, "in use")
		}
		if e.Imported {
			notes = append(notes, "imported")
		}
		fmt.Fprintf(&b, "%s  %s  used %s  %s\n", e.Digest, inMiB(e.Bytes), e.Used.UTC().Format(time.RFC3339), strings.Join(notes, ", "))
		for _, name := range e.Names {
			fmt.Fprintf(&b, "    %s\n", name)
		}
	}
	if len(entries) == 0 {
		b.WriteString("no images\n")
	}
	return c.print(o, entries, b.String())
}

func inMiB(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }

// A keeper is a runtime that keeps its own images.
type keeper interface {
	sandbox.Puller
	Images() *image.Store
}

// images are those of a runtime, or of the only one that has some.
func (w *wiring) images(runtime string) (*image.Store, sandbox.Puller, error) {
	var found []string
	for name, r := range w.agent.Runtimes {
		if k, ok := r.(keeper); ok && k.Images() != nil && (runtime == "" || runtime == name) {
			found = append(found, name)
		}
	}
	slices.Sort(found)
	switch {
	case len(found) == 1:
		k := w.agent.Runtimes[found[0]].(keeper)
		return k.Images(), k, nil
	case len(found) == 0 && runtime != "":
		return nil, nil, fmt.Errorf("runtime %q keeps no images of its own: it is not native as root, or an engine keeps them", runtime)
	case len(found) == 0:
		return nil, nil, fmt.Errorf("no runtime of %s keeps images of its own: that is native, as root", strings.Join(slices.Sorted(maps.Keys(w.agent.Runtimes)), ", "))
	}
	return nil, nil, fmt.Errorf("several runtimes keep images: say --runtime %s", strings.Join(found, " or --runtime "))
}

// examineImages says where a runtime may have images from, and whether it can.
func examineImages(ctx context.Context, name string, r sandbox.Runtime) []finding {
	k, ok := r.(keeper)
	if !ok || k.Images() == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	var fs []finding
	for _, s := range k.Images().Examine(ctx) {
		f := finding{"runtime " + name, "images " + s.Name, stateOK, s.Detail}
		if !s.Usable {
			f.State = stateMissing
		}
		fs = append(fs, f)
	}
	return fs
}
