package docker

import (
	"fmt"
	"runtime"
	"slices"
	"strings"

	"github.com/docker/docker/api/types/image"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/engine"
)

// digestsOf are the digests under which the engine has an image of that
// repository from a registry.
func digestsOf(found image.InspectResponse, n engine.Name) []string {
	var all []string
	for _, s := range found.RepoDigests {
		if d, err := engine.ParseName(s); err == nil && d.Repository == n.Repository {
			all = append(all, d.Digest)
		}
	}
	slices.Sort(all)
	return all
}

// describe says what the engine has under a name, if that is what the name says.
func describe(found image.InspectResponse, n engine.Name) (sandbox.Image, error) {
	refuse := func(format string, args ...any) (sandbox.Image, error) {
		return sandbox.Image{}, fmt.Errorf("%w: %s: "+format, append([]any{sandbox.ErrImage, n.Full}, args...)...)
	}
	out := sandbox.Image{Ref: found.ID, Digest: found.ID}
	digests := digestsOf(found, n)
	switch {
	case !engine.IsDigest(found.ID):
		return refuse("the daemon names it %.100q, which is no id", found.ID)
	case n.Repository == "" && n.Digest != found.ID:
		return refuse("the daemon has %s under that id", found.ID)
	case n.Repository != "" && n.Digest != "" && !slices.Contains(digests, n.Digest):
		return refuse("the daemon has %s, with the digests %q, under that digest", found.ID, digests)
	case found.Os != "" && found.Os != "linux" || found.Architecture != "" && found.Architecture != runtime.GOARCH:
		return refuse("it is for %.50s/%.50s, and this machine is linux/%s", found.Os, found.Architecture, runtime.GOARCH)
	}
	if n.Digest != "" {
		out.Digest = n.Digest
	} else if len(digests) > 0 {
		out.Digest = digests[0]
	}
	if c := found.Config; c != nil {
		out.Env, out.Entrypoint, out.Cmd, out.User, out.Dir = c.Env, c.Entrypoint, c.Cmd, c.User, c.WorkingDir
	}
	for _, words := range [][]string{out.Env, out.Entrypoint, out.Cmd, {out.User, out.Dir}} {
		for _, w := range words {
			if strings.Contains(w, "\x00") {
				return refuse("its configuration has a zero byte in %.100q", w)
			}
		}
	}
	return out, nil
}
