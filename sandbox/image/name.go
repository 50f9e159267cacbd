package image

import (
	"context"
	"fmt"
	"regexp"
	"strings"
	"sync"

	"github.com/google/go-containerregistry/pkg/name"
)

// A Name says which image is meant: what a person wrote, in full.
type Name struct {
	Registry   string // "docker.io" if none is written
	Repository string
	Tag        string // "latest" if neither a tag nor a digest is written
	Digest     string // "sha256:…"; then a tag that is written too means nothing
}

// ParseName reads a name as the engines do: debian, debian:12,
// registry.example:5000/a/b@sha256:…
func ParseName(s string) (Name, error) {
	ref, err := name.ParseReference(s)
	if err != nil {
		return Name{}, refuse("image name %.300q: %w", s, err)
	}
	n := Name{Registry: ref.Context().RegistryStr(), Repository: ref.Context().RepositoryStr()}
	if n.Registry == name.DefaultRegistry {
		n.Registry = "docker.io"
	}
	switch r := ref.(type) {
	case name.Tag:
		n.Tag = r.TagStr()
	case name.Digest:
		n.Digest = r.DigestStr()
		if !isDigest(n.Digest) {
			return Name{}, refuse("image name %.300q: a digest is sha256: and 64 hexadecimal digits", s)
		}
	}
	return n, nil
}

// String is the name in full: two that mean the same are equal.
func (n Name) String() string {
	if n.Digest != "" {
		return n.repository() + "@" + n.Digest
	}
	return n.repository() + ":" + n.Tag
}

func (n Name) repository() string { return n.Registry + "/" + n.Repository }

// reference is the name for the library.
func (n Name) reference() (name.Reference, error) { return name.ParseReference(n.String()) }

func isDigest(s string) bool {
	hex, ok := strings.CutPrefix(s, "sha256:")
	return ok && isHex(hex)
}

func isHex(s string) bool { return len(s) == 64 && strings.Trim(s, "0123456789abcdef") == "" }

// matches says whether one of the patterns allows the name.
func (n Name) matches(patterns []string) bool {
	for _, p := range patterns {
		re := pattern(p)
		if re.MatchString(n.repository()) || re.MatchString(n.String()) {
			return true
		}
	}
	return false
}

// pattern is checked: checkPattern.
func pattern(p string) *regexp.Regexp {
	quoted := regexp.QuoteMeta(p)
	quoted = strings.ReplaceAll(quoted, `\*\*`, `.*`)
	return regexp.MustCompile(`^` + strings.ReplaceAll(quoted, `\*`, `[^/]*`) + `$`)
}

// checkPattern refuses one that could never match, or matches by accident.
func checkPattern(p string) error {
	registry, _, ok := strings.Cut(p, "/")
	if !ok || registry == "" || strings.Trim(p, "*/") == "" {
		return fmt.Errorf("images: from %q: write registry/repository, such as docker.io/library/debian or registry.example/team/**", p)
	}
	if !strings.ContainsAny(registry, ".:*") && registry != "localhost" {
		return fmt.Errorf("images: from %q: %q is no registry: write docker.io/library/… for an image of Docker Hub", p, registry)
	}
	return nil
}

// A busy is the set of things in work, each by one goroutine at a time.
type busy struct {
	mu sync.Mutex
	of map[string]chan struct{}
}

// hold waits until nobody works on the thing.
func (b *busy) hold(ctx context.Context, what string) (release func(), err error) {
	for {
		b.mu.Lock()
		other, taken := b.of[what]
		if !taken {
			mine := make(chan struct{})
			if b.of == nil {
				b.of = map[string]chan struct{}{}
			}
			b.of[what] = mine
			b.mu.Unlock()
			return func() {
				b.mu.Lock()
				defer b.mu.Unlock()
				delete(b.of, what)
				close(mine)
			}, nil
		}
		b.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, fmt.Errorf("%s is in work: %w", what, context.Cause(ctx))
		}
	}
}
