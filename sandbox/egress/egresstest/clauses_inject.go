package egresstest

import (
	"errors"
	"fmt"
	"strings"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// What a lease has, what the job has in its place, and what neither gave.
const (
	credential = "the-credential-of-the-lease"
	standing   = "PLACEHOLDER-0a1b2c3d4e5f"
	another    = "a-credential-of-another"
)

// injecting is a job that reaches web.example, and a child's rule that puts the
// credential into requests below /api.
func (b *bench) injecting() (*job, func(path, header, value string) (int, string, error), error) {
	r, _, err := b.secured()
	if err != nil {
		return nil, nil, err
	}
	j, err := b.start("job-1", r)
	if err != nil {
		return nil, nil, err
	}
	r.ID, r.Requests = "policy:lease", []egress.Request{{Methods: []string{"GET"}, Path: "/api/**"}}
	r.Inject = &egress.Injection{Lease: "lease", As: egress.Bearer, Value: creds.NewSecret(credential), Placeholder: standing}
	if err := j.open("job-1-lease", "job-1", r); err != nil {
		return nil, nil, err
	}
	c, err := j.client("web.example", "web.example", true)
	if err != nil {
		return nil, nil, err
	}
	return j, func(path, header, value string) (int, string, error) {
		return c.do("GET", "https://web.example"+path, "", nil, header, value)
	}, nil
}

func injects(b *bench) error {
	j, get, err := b.injecting()
	if err != nil {
		return err
	}
	for _, header := range [][2]string{{"Authorization", "Bearer " + standing}, {"X-Nothing", "x"}} {
		_, text, err := get("/api/x", header[0], header[1])
		if err != nil || !strings.HasSuffix(text, ", good true") || strings.Contains(text, credential) {
			return fmt.Errorf("with %s: got %q %v, want the destination to get the credential and the answer not to say it", header[0], text, err)
		}
	}
	if _, text, err := get("/other", "X-Nothing", "x"); err != nil || strings.Contains(text, " said ") {
		return fmt.Errorf("a request that the rule does not name: got %q %v, want no credential", text, err)
	}
	if status, text, err := get("/api/x", "Authorization", "Bearer "+another); err != nil || status != 403 {
		return fmt.Errorf("another credential: got %d %q %v, want 403", status, text, err)
	}
	if err := j.close("job-1-lease"); err != nil {
		return err
	}
	if _, text, err := get("/api/x", "X-Nothing", "x"); err != nil || strings.Contains(text, " said ") {
		return fmt.Errorf("when the rule is gone: got %q %v, want no credential", text, err)
	}
	if n := j.ledger.count(func(l egress.Line) bool { return l.Verdict == egress.Ended && l.Request.Lease == "lease" }); n != 2 {
		return fmt.Errorf("got %d lines of requests that had the credential, want 2", n)
	}
	return nil
}

func tripwires(b *bench) error {
	j, get, err := b.injecting()
	if err != nil {
		return err
	}
	trip := func() error {
		var errs []error
		for _, tt := range [][3]string{
			{"/api/x", "X-Note", standing},
			{"/other", "Authorization", "Bearer " + standing},
			{"/other/" + standing, "X-Nothing", "x"},
			{"/other?note=" + standing, "X-Nothing", "x"},
		} {
			if status, text, err := get(tt[0], tt[1], tt[2]); err == nil && (status == 200 || strings.HasPrefix(text, "host ")) {
				errs = append(errs, fmt.Errorf("%s with %s: got %d %q", tt[0], tt[1], status, text))
			}
		}
		return errors.Join(errs...)
	}
	if err := trip(); err != nil {
		return err
	}
	if err := j.close("job-1-lease"); err != nil {
		return err
	}
	if err := trip(); err != nil {
		return fmt.Errorf("when the rule is gone: %w", err)
	}
	if n := j.ledger.count(func(l egress.Line) bool { return strings.Contains(fmt.Sprintf("%+v", l), standing) }); n > 0 {
		return fmt.Errorf("%d lines say the placeholder", n)
	}
	return nil
}
