package image

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// A Finding says of one place that images come from whether it can be used.
type Finding struct {
	Name   string // "from docker.io/library/*"
	Usable bool
	Detail string
}

// Examine looks at each source: an archive is opened and its manifest checked, of
// a registry that a pattern names in full one question is asked.
func (s *Store) Examine(ctx context.Context) []Finding {
	out := []Finding{{Name: "kept", Usable: true}}
	if entries, err := s.List(ctx); err != nil {
		out[0] = Finding{Name: "kept", Detail: err.Error()}
	} else {
		out[0].Detail = fmt.Sprintf("%d images in %s", len(entries), s.cfg.Dir)
	}
	for _, name := range slices.Sorted(maps.Keys(s.sources)) {
		f := Finding{"source " + name, true, s.sources[name]}
		if err := s.openable(ctx, name); err != nil {
			f.Usable, f.Detail = false, err.Error()
		}
		out = append(out, f)
	}
	asked := map[string]Finding{}
	for _, p := range s.cfg.From {
		host, _, _ := strings.Cut(p, "/")
		f, ok := asked[host]
		if !ok {
			f = s.reachable(ctx, host)
			asked[host] = f
		}
		f.Name = "from " + p
		out = append(out, f)
	}
	return out
}

func (s *Store) openable(ctx context.Context, name string) (err error) {
	n, err := ParseName(name)
	if err != nil {
		return err
	}
	f, err := local(s.sources[name])
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.close()) }()
	_, _, err = resolveLocal(ctx, f, n)
	return err
}

// reachable asks a registry whether it is one. One that wants to know who asks is.
func (s *Store) reachable(ctx context.Context, host string) Finding {
	if strings.Contains(host, "*") {
		return Finding{Usable: true, Detail: "not asked: it names no registry"}
	}
	if s.cfg.Pull == Never {
		return Finding{Usable: true, Detail: "never asked (images.pull)"}
	}
	if err := s.ping(ctx, host); err != nil {
		return Finding{Detail: err.Error() + ": jobs whose images are not here will fail"}
	}
	return Finding{Usable: true, Detail: host + " answers"}
}
