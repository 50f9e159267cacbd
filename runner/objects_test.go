package runner_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/gitcache"
)

// sourceProvider is a worldProvider that knows where repositories are.
type sourceProvider struct {
	*worldProvider
	err error
}

func (p sourceProvider) Source(j providers.Job) (providers.Source, error) {
	return providers.Source{URL: "https://forge.example/" + j.Subject.Repository + ".git", User: "u", Token: j.Secrets["TOKEN"], RootCA: "/ca.pem"}, p.err
}

// worldGit is a git cache of one directory.
type worldGit struct {
	w     *world
	wants []gitcache.Want
}

func (g *worldGit) Prepare(_ context.Context, w gitcache.Want) (string, func(), error) {
	g.wants = append(g.wants, w)
	err := g.w.note("git", w.Repository)
	return "/objects/of/" + w.Tier, func() { _ = g.w.note("git.done", "") }, err
}

// A job's box sees the objects of its own repository and tier, and they are let
// go of when the box is gone.
func TestGitCache(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	git := &worldGit{w: w}
	r := w.run(lifetime(t), func(c *runner.Config) {
		c.Git = git
		c.Providers = map[string]providers.Provider{"ci": sourceProvider{worldProvider: (*worldProvider)(w)}}
	}, providers.Step{Run: "mounted " + gitcache.Target + "\nenv GIT_TEMPLATE_DIR"})
	if got, want := w.shown(), "/objects/of/local\n"+gitcache.TemplateDir+"\n"; r.Conclusion != providers.Success || got != want {
		t.Errorf("got %+v and the log %q, want success and %q", r, got, want)
	}
	want := gitcache.Want{
		Provider: "ci", Repository: "acme/app", Tier: "local", Ref: "refs/heads/main",
		URL: "https://forge.example/acme/app.git", User: "u", Token: creds.Secret{}, RootCA: "/ca.pem",
	}
	if len(git.wants) != 1 || git.wants[0] != want {
		t.Errorf("the cache was asked for %+v, want %+v", git.wants, want)
	}
	order := slices.DeleteFunc(w.happened(), func(call string) bool {
		return !strings.HasPrefix(call, "git") && call != "box.create" && call != "box.destroy"
	})
	if got := strings.Join(order, " "); got != "git box.create box.destroy git.done" {
		t.Errorf("order: %s", got)
	}
	if !slices.ContainsFunc(w.tiers("git.cache"), func(tier string) bool { return tier == "local" }) {
		t.Error("the audit does not say that the box saw the cache")
	}
	w.clean()
}

// A cache that is not there, for whatever reason, costs a job nothing.
func TestNoGitCache(t *testing.T) {
	t.Parallel()
	for name, set := range map[string]func(w *world, c *runner.Config){
		"a provider that does not know": func(w *world, c *runner.Config) { c.Git = &worldGit{w: w} },
		"a source that fails": func(w *world, c *runner.Config) {
			c.Git = &worldGit{w: w}
			c.Providers = map[string]providers.Provider{"ci": sourceProvider{(*worldProvider)(w), errors.New("no")}}
		},
		"a cache that fails": func(w *world, c *runner.Config) {
			c.Git = &worldGit{w: w}
			c.Providers = map[string]providers.Provider{"ci": sourceProvider{worldProvider: (*worldProvider)(w)}}
			w.failWith(func(call, _ string) error {
				if call == "git" {
					return errors.New("full")
				}
				return nil
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			r := w.run(lifetime(t), func(c *runner.Config) { set(w, c) }, providers.Step{Run: "mounted " + gitcache.Target + "\nenv GIT_TEMPLATE_DIR\nprint ran"})
			if got := w.shown(); r.Conclusion != providers.Success || got != "\nran\n" {
				t.Errorf("got %+v and the log %q, want success without a mount", r, got)
			}
			if n := w.made("git.done"); n != 0 {
				t.Errorf("%d caches were let go of that were never had", n)
			}
			w.clean()
		})
	}
}

// tiers are those of the events of that action.
func (w *world) tiers(action string) (all []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, e := range w.events {
		if e.Action == action {
			all = append(all, e.Detail["tier"])
		}
	}
	return all
}
