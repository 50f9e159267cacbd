package workflow

import (
	"cmp"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/rhysd/actionlint"
	"go.yaml.in/yaml/v4"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
)

// MaxServices is how many services a job may have. Each has a box with the
// limits of the job's own.
const MaxServices = 8

// containers reads "container" and "services". What needs no context to be seen
// wrong is refused here, the rest by Contain.
func (b *builder) containers(doc *yaml.Node) []providers.Container {
	var cs []providers.Container
	own := dig(doc, "jobs", b.job.ID.Value)
	if c := b.job.Container; c != nil {
		cs = append(cs, b.container("", c, dig(own, "container")))
		if len(c.Ports) > 0 {
			b.add(c.Ports[0].Pos, `"ports" of a job's container: nobody outside can connect to a box; remove them`)
		}
	}
	s := b.job.Services
	if s == nil {
		return cs
	}
	if s.Expression != nil {
		b.add(s.Expression.Pos, `"services" as one expression is not supported: write the services out`)
		return cs
	}
	if len(s.Value) > MaxServices {
		b.add(s.Pos, "%d services: a job may have %d", len(s.Value), MaxServices)
		return cs
	}
	services := slices.SortedFunc(maps.Values(s.Value), func(x, y *actionlint.Service) int {
		return cmp.Or(cmp.Compare(x.Name.Pos.Line, y.Name.Pos.Line), cmp.Compare(x.Name.Pos.Col, y.Name.Pos.Col))
	})
	for _, service := range services {
		name := service.Name.Value
		// GitHub's rule for ids, and a name that can be looked up.
		if !regexp.MustCompile(`^[A-Za-z_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?$`).MatchString(name) {
			b.add(service.Name.Pos, "services: %q is not a letter or _ followed by letters, digits, - and _", name)
		}
		cs = append(cs, b.container(name, service.Container, dig(own, "services", name)))
	}
	return cs
}

func (b *builder) container(name string, c *actionlint.Container, n *yaml.Node) providers.Container {
	out := providers.Container{
		Name: name, Image: b.template(c.Image), Env: b.env(nil, c.Env), Options: b.template(c.Options),
		Position: position(b.file, c.Pos),
	}
	if c.Credentials != nil {
		out.Username, out.Password = b.template(c.Credentials.Username), b.template(c.Credentials.Password)
	}
	// The parser takes volumes for ports, and keeps the later of the two.
	if v := dig(n, "volumes"); v != nil {
		b.add(at(v), `"volumes" is not supported: a box sees nothing of the host, and nothing of a job outlives it; remove it`)
		c.Ports = nil
	}
	for _, p := range c.Ports {
		out.Ports = append(out.Ports, b.template(p))
		if _, err := parsePort(p.Value); err != nil && !hasExpression(p.Value) {
			b.add(p.Pos, "%v", err)
		}
	}
	if c.Options != nil && !hasExpression(c.Options.Value) {
		if _, err := parseOptions(c.Options.Value, name == ""); err != nil {
			b.add(c.Options.Pos, "%v", err)
		}
	}
	return out
}

func hasExpression(template string) bool { return strings.Contains(template, "${{") }

// A Container is a providers.Container whose templates have been evaluated.
type Container struct {
	Name     string
	Image    string // "" is none
	Env      map[string]string
	Ports    []Port
	Options  Options
	Username string
	Password creds.Secret
	Position string
}

// A Port is one of a service, and the one of the job's localhost that leads to it.
type Port struct {
	Host      uint16 // 0 is one that the agent chooses
	Container uint16
}

// Contain evaluates a container. Its error wraps providers.ErrBadJob and names
// what is not supported with its position. No value stands in its errors but
// that of ports and options.
func Contain(c providers.Container, s Scope) (Container, error) {
	out := Container{Name: c.Name, Position: c.Position, Env: map[string]string{}}
	var password, options string
	for _, t := range []struct {
		key, template string
		to            *string
	}{
		{"image", c.Image, &out.Image},
		{"credentials", c.Username, &out.Username},
		{"credentials", c.Password, &password},
		{"options", c.Options, &options},
	} {
		v, err := Interpolate(t.template, s)
		if err != nil {
			return out, bad(c, t.key, err)
		}
		*t.to = strings.TrimSpace(v)
	}
	if password != "" {
		out.Password = creds.NewSecret(password)
	}
	for k, t := range c.Env.Vars {
		v, err := Interpolate(t, s)
		if err != nil {
			return out, bad(c, "env "+k, err)
		}
		out.Env[k] = v
	}
	if c.Env.Expr != "" {
		more, err := Variables(c.Env.Expr, s)
		if err != nil {
			return out, bad(c, "env", err)
		}
		maps.Copy(out.Env, more)
	}
	for _, t := range c.Ports {
		v, err := Interpolate(t, s)
		var p Port
		if err == nil {
			p, err = parsePort(v)
		}
		if err != nil {
			return out, bad(c, "ports", err)
		}
		out.Ports = append(out.Ports, p)
	}
	var err error
	if out.Options, err = parseOptions(options, c.Name == ""); err != nil {
		return out, bad(c, "options", err)
	}
	return out, nil
}

func bad(c providers.Container, key string, err error) error {
	what := "container"
	if c.Name != "" {
		what = "service " + c.Name
	}
	return fmt.Errorf("%w: %s: %s: %s: %w", providers.ErrBadJob, c.Position, what, key, err)
}

// parsePort reads a port as engines write it.
func parsePort(text string) (Port, error) {
	rest, protocol, named := strings.Cut(text, "/")
	if named && protocol != "tcp" {
		return Port{}, fmt.Errorf("port %q: tcp alone is carried to a service", text)
	}
	parts := strings.Split(rest, ":")
	if len(parts) == 3 && slices.Contains([]string{"127.0.0.1", "0.0.0.0", "localhost"}, parts[0]) {
		parts = parts[1:] // the job's localhost is all that there is
	}
	var numbers []uint16
	for _, part := range parts {
		n, err := strconv.ParseUint(part, 10, 16)
		if err != nil || n == 0 || len(parts) > 2 {
			return Port{}, fmt.Errorf("port %q: write 5432, or 15432:5432 for another one on localhost", text)
		}
		numbers = append(numbers, uint16(n))
	}
	if len(numbers) == 1 {
		return Port{Container: numbers[0]}, nil
	}
	return Port{numbers[0], numbers[1]}, nil
}
