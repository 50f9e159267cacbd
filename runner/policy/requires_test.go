package policy

import (
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
)

const approvalText = "version: 1\nrepository: acme/app\nsha: 0123456789abcdef0123456789abcdef01234567\nby: alice\n"

// FuzzApproval: whatever a file says, it covers the commit and the repository that it
// names, and no job that has none.
func FuzzApproval(f *testing.F) {
	f.Add(approvalText)
	f.Add(approvalText + "until: 2020-01-01T00:00:00Z\nartifacts: [sha256:" + strings.Repeat("a", 64) + "]\n")
	f.Add("version: 1\nrepository: ''\nsha: ''\nby: a\n")
	f.Add(strings.Replace(approvalText, "version: 1", "version: 2", 1))
	f.Add("&a {version: 1, sha: *a}")
	f.Fuzz(func(t *testing.T, text string) {
		a, err := ParseApproval([]byte(text), "x")
		if err != nil {
			if a.SHA != "" || a.Repository != "" {
				t.Errorf("got %+v and %v", a, err)
			}
			return
		}
		if len(a.SHA) != 40 && len(a.SHA) != 64 {
			t.Errorf("got %+v", a)
		}
		for _, s := range []creds.Subject{{}, {Repository: a.Repository}, {SHA: a.SHA}, {Repository: a.Repository + "x", SHA: a.SHA}} {
			if s.Repository == a.Repository && s.SHA == a.SHA {
				continue
			}
			if a.Covers(providers.Job{Subject: s}, time.Time{}) == nil {
				t.Errorf("%+v covers %+v", a, s)
			}
		}
	})
}

func TestApprovalRefused(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{
		"short sha":   strings.Replace(approvalText, "cdef01234567", "", 1),
		"no sha":      strings.Replace(approvalText, "sha:", "#", 1),
		"nobody":      strings.Replace(approvalText, "by:", "#", 1),
		"no place":    strings.Replace(approvalText, "repository:", "#", 1),
		"version 2":   strings.Replace(approvalText, "version: 1", "version: 2", 1),
		"a slip":      approvalText + "untill: 2020-01-01T00:00:00Z\n",
		"a day":       approvalText + "until: 2020-01-01\n",
		"a short sum": approvalText + "artifacts: [sha256:abc]\n",
		"nothing":     "",
	} {
		if a, err := ParseApproval([]byte(text), "x.yaml"); err == nil || a.SHA != "" || a.Repository != "" || !strings.Contains(err.Error(), "x.yaml:") {
			t.Errorf("%s: got %+v, %v", name, a, err)
		}
	}
}
