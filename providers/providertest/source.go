package providertest

import (
	"context"
	"fmt"
	"net/url"
	"reflect"
	"strings"

	"github.com/mayfly-ci/mayfly/providers"
)

// sourceIsPlain wants an address without a secret in it, which nothing that a job
// says about its service changes.
func sourceIsPlain(ctx context.Context, s Service) error {
	p, job, _, err := claimed(ctx, s, "c-1")
	if err != nil {
		return err
	}
	sourcer, ok := p.(providers.Sourcer)
	if !ok {
		return nil
	}
	got, err := sourcer.Source(job)
	if err != nil {
		return fmt.Errorf("Source = %w, want where the repository of the job is", err)
	}
	u, err := url.Parse(got.URL)
	if err != nil || u.User != nil || u.RawQuery != "" || u.Fragment != "" || !strings.Contains("https http file", u.Scheme) || u.Scheme == "" {
		return fmt.Errorf("Source gives %q, want an https, http or file URL without user, query and fragment", got.URL)
	}
	job.Env = providers.Env{Vars: map[string]string{"GITHUB_SERVER_URL": "https://elsewhere.example"}}
	job.Contexts = map[string]any{"github": map[string]any{"server_url": "https://elsewhere.example", "repositoryUrl": "https://elsewhere.example/x"}}
	if again, err := sourcer.Source(job); err != nil || !reflect.DeepEqual(got, again) {
		return fmt.Errorf("Source of a job that names another service = %q, %w, want %q as before", again.URL, err, got.URL)
	}
	return nil
}
