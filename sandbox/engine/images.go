package engine

import (
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"

	"github.com/distribution/reference"

	"github.com/mayfly-ci/mayfly/sandbox"
)

// When says when a registry is asked for an image.
type When string

// Times at which a registry is asked. An image that is named by digest and is on
// the machine is never asked for.
const (
	Missing When = "missing" // for an image that is not on the machine
	Always  When = "always"  // what a tag means, for every job
	Never   When = "never"   // only what is on the machine
)

// Images say which images are pulled. The zero value pulls none.
type Images struct {
	Pull When // "" is Missing
	// From lists what may be pulled: registry/repository, as it is or with :tag or
	// @digest. * is any text without a slash, ** any text. What it does not list
	// is never asked for, whatever Pull says, and has to be on the machine.
	From []string
	// DigestOnly refuses images that are named by a tag.
	DigestOnly bool
	// Out makes a transport to registries one that leaves this machine; nil dials
	// directly. The environment's proxy is never used.
	Out func(*http.Transport) http.RoundTripper
}

// String says what they allow, for people.
func (i Images) String() string {
	named := "named by tag or digest"
	if i.DigestOnly {
		named = "named by digest only"
	}
	switch {
	case i.Pull == Never || len(i.From) == 0:
		return "only those on this machine, " + named + "; nothing is pulled"
	case i.Pull == Always:
		return "pulled for every job that names a tag, from " + strings.Join(i.From, ", ") + "; " + named
	}
	return "pulled if they are not on this machine, from " + strings.Join(i.From, ", ") + "; " + named
}

// Check refuses what could never match, or matches by accident.
func (i Images) Check() error {
	if i.Pull != "" && !slices.Contains([]When{Missing, Always, Never}, i.Pull) {
		return fmt.Errorf("images: pull %q: write missing, always or never", i.Pull)
	}
	for _, p := range i.From {
		registry, _, ok := strings.Cut(p, "/")
		switch {
		case !ok || registry == "" || strings.Trim(p, "*/") == "":
			return fmt.Errorf("images: from %q: write registry/repository, such as docker.io/library/debian or registry.example/team/**", p)
		case !strings.ContainsAny(registry, ".:*") && registry != "localhost":
			return fmt.Errorf("images: from %q: %q is no registry: write docker.io/library/… for an image of Docker Hub", p, registry)
		}
	}
	return nil
}

// Allow refuses a name that no job may use, with sandbox.ErrImage.
func (i Images) Allow(image string) error {
	n, err := ParseName(image)
	if err == nil && i.DigestOnly && n.Digest == "" {
		err = fmt.Errorf("%w: %s is named by a tag, and digest_only is set: write %s@sha256:…", sandbox.ErrImage, image, n.Repository)
	}
	return err
}

// Pulls reports whether a registry may be asked for that name.
func (i Images) Pulls(n Name) bool {
	if i.Pull == Never || n.Repository == "" {
		return false
	}
	for _, p := range i.From {
		if re := pattern(p); re.MatchString(n.Repository) || re.MatchString(n.Full) {
			return true
		}
	}
	return false
}

func pattern(p string) *regexp.Regexp {
	quoted := strings.ReplaceAll(regexp.QuoteMeta(p), `\*\*`, `.*`)
	return regexp.MustCompile(`^` + strings.ReplaceAll(quoted, `\*`, `[^/]*`) + `$`)
}

// A Name is what a person wrote, in full.
type Name struct {
	Full       string // for the engine
	Registry   string // "docker.io" if none is written
	Repository string // with the registry; "" if it is an id
	Digest     string // "sha256:…" of an id, or of the manifest; "" if there is a tag only
}

// IsDigest reports whether s is sha256: and 64 hexadecimal digits.
func IsDigest(s string) bool {
	ok, err := regexp.MatchString(`^sha256:[0-9a-f]{64}$`, s)
	return ok && err == nil
}

// ParseName reads a name as engines do. An id is written whole, since what a short
// one means changes with what is on the machine. What is no name is
// sandbox.ErrImage.
func ParseName(s string) (Name, error) {
	for _, id := range []string{s, "sha256:" + s} {
		if IsDigest(id) {
			return Name{Full: id, Digest: id}, nil
		}
	}
	ref, err := reference.ParseNormalizedNamed(s)
	if err != nil {
		return Name{}, fmt.Errorf("%w: name %.300q: %w", sandbox.ErrImage, s, err)
	}
	n := Name{Registry: reference.Domain(ref), Repository: ref.Name()}
	if d, ok := ref.(reference.Digested); ok {
		n.Digest = d.Digest().String() // a tag that is written too means nothing
		n.Full = n.Repository + "@" + n.Digest
		if !IsDigest(n.Digest) {
			return Name{}, fmt.Errorf("%w: name %.300q: a digest is sha256: and 64 hexadecimal digits", sandbox.ErrImage, s)
		}
		return n, nil
	}
	n.Full = reference.TagNameOnly(ref).String()
	return n, nil
}
