package policy

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/mayfly-ci/mayfly/configs/strict"
)

// imagePattern is what an image may be called, written in full:
// docker.io/library/postgres:*, registry.example/team/*@sha256:*.
type imagePattern glob

func (p *imagePattern) UnmarshalText(b []byte) error {
	if err := (*glob)(p).UnmarshalText(b); err != nil {
		return err
	}
	text := string(b)
	registry, rest, _ := strings.Cut(text, "/")
	switch {
	case strings.HasPrefix(text, "**"):
	case rest == "" || !isRegistry(registry) && !strings.Contains(registry, "*"):
		return fmt.Errorf("pattern %q: write the registry too, as in docker.io/library/postgres:*", text)
	case !strings.HasSuffix(text, "*") && !strings.ContainsAny(rest, ":@"):
		return fmt.Errorf("pattern %q: say which tag or digest, as in %s:* or %s@sha256:*", text, text, text)
	}
	return nil
}

// imageList is a list of patterns. An empty one is an error: it reads as if it
// said something.
type imageList []imagePattern

// DecodeNode implements strict.NodeDecoder.
func (l *imageList) DecodeNode(n strict.Node) error {
	list, err := listOf[imagePattern](n)
	*l = list
	return err
}

// serviceID is the key of a service in a workflow.
type serviceID string

func (s *serviceID) UnmarshalText(b []byte) error {
	*s = serviceID(b)
	return word(b, "the key of a service", `[A-Za-z_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?`)
}

// AllowImage judges an image that a workflow names, and returns it in full:
// postgres:16 is docker.io/library/postgres:16. What is judged is what must be
// pulled. Of an image with a digest the tag means nothing and is left out. The
// error wraps ErrDenied.
func (p Plan) AllowImage(name string) (string, error) {
	full, err := fullImage(name)
	if err != nil {
		return "", fmt.Errorf("%w: %s: image %q: %w", ErrDenied, p.Rule, name, err)
	}
	for _, pattern := range p.Images {
		if glob(pattern).match(full) {
			return full, nil
		}
	}
	if len(p.Images) == 0 {
		return "", fmt.Errorf("%w: %s: the workflow names the image %s, and the rule lets it name none: add images: [%q] to the rule", ErrDenied, p.Rule, full, full)
	}
	return "", fmt.Errorf("%w: %s: the workflow names the image %s, which none of the rule's images allows: %s", ErrDenied, p.Rule, full, strings.Join(p.Images, ", "))
}

// fullImage is the one way to write an image of a registry (the grammar of
// github.com/distribution/reference): with registry, path, and tag or digest.
// What is no such name, a file say, is refused.
func fullImage(name string) (string, error) {
	registry, path, found := strings.Cut(name, "/")
	if !found || !isRegistry(registry) {
		registry, path = "docker.io", name
	}
	if registry == "index.docker.io" {
		registry = "docker.io"
	}
	if registry == "docker.io" && !strings.Contains(path, "/") {
		path = "library/" + path
	}
	const part = `[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*`
	re, err := regexp.Compile(`^(` + part + `(?:/` + part + `)*)(?::([A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?(?:@(sha256:[0-9a-f]{64}))?$`)
	if err != nil {
		return "", err
	}
	m := re.FindStringSubmatch(path)
	host := regexp.MustCompile(`^[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?(?::[0-9]{1,5})?$`)
	if m == nil || len(name) > 255 || !host.MatchString(registry) {
		return "", fmt.Errorf("it is not the name of an image in a registry")
	}
	full := registry + "/" + m[1]
	switch {
	case m[3] != "":
		return full + "@" + m[3], nil
	case m[2] != "":
		return full + ":" + m[2], nil
	}
	return full + ":latest", nil
}

// isRegistry tells the name of a machine from the first part of a path.
func isRegistry(part string) bool {
	return strings.ContainsAny(part, ".:") || part == "localhost"
}
