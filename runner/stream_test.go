package runner

import (
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/mask"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

type textLog struct {
	providers.Log
	strings.Builder
}

func (l *textLog) Write(_ time.Time, _ int, b []byte) error {
	l.Builder.Write(b)
	return nil
}

func newTestStream(t *testing.T, secret string) (*stream, *textLog) {
	t.Helper()
	log := &textLog{}
	s := &stream{log: log, set: mask.New(nil), shown: map[refusal]bool{}, left: 1 << 20}
	s.out = mask.NewWriter(s.send, s.set)
	if err := s.conceal(map[string]creds.Secret{"s": creds.NewSecret(secret)}); err != nil {
		t.Fatal(err)
	}
	return s, log
}

// A line of the agent's own in the middle of a secret does not show half of it.
func TestNoticeInTheMiddleOfASecret(t *testing.T) {
	t.Parallel()
	const secret = "correct-horse-battery-staple"
	for cut := range len(secret) {
		s, log := newTestStream(t, secret)
		for i, part := range []string{"a " + secret[:cut], secret[cut:] + " b\n"} {
			if i == 1 {
				s.refusal(egress.Line{Name: "x.example", Port: 443, Verdict: egress.Refused, Reason: "no rule"}, "")
			}
			if err := s.write(time.Now(), 0, []byte(part)); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.flush(); err != nil {
			t.Fatal(err)
		}
		got := log.String()
		for n := 4; n <= len(secret); n++ {
			if strings.Contains(got, secret[:n]) || strings.Contains(got, secret[len(secret)-n:]) {
				t.Fatalf("cut at %d: the log shows %d bytes of the secret: %q", cut, n, got)
			}
		}
		if !strings.Contains(got, noticeMark) {
			t.Errorf("cut at %d: no notice: %q", cut, got)
		}
	}
}

func TestLogLimit(t *testing.T) {
	t.Parallel()
	s, log := newTestStream(t, "correct-horse")
	s.limit(10)
	for range 5 {
		if err := s.write(time.Now(), 0, []byte("12345678")); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.flush(); err != nil {
		t.Fatal(err)
	}
	if got := log.String(); !strings.HasPrefix(got, "1234567812") || strings.Count(got, "12345678") != 1 || strings.Count(got, "limit") < 1 {
		t.Errorf("got %q, want ten bytes and one line that says so", got)
	}
}

func TestParsePairs(t *testing.T) {
	t.Parallel()
	m, err := parsePairs("A=1\r\nB=x=y\nC<<END\nline 1\nline=2\nEND\n\nD<<E=F\nv\nE=F\nE=")
	want := map[string]string{"A": "1", "B": "x=y", "C": "line 1\nline=2", "D": "v", "E": ""}
	if err != nil || len(m) != len(want) {
		t.Fatalf("got %v, %v, want %v", m, err, want)
	}
	for k, v := range want {
		if m[k] != v {
			t.Errorf("%s: got %q, want %q", k, m[k], v)
		}
	}
	for _, bad := range []string{"A", "=x", "A<<END\nno end", "A<<\nx\n"} {
		if m, err := parsePairs(bad); err == nil {
			t.Errorf("%q: got %v, want an error", bad, m)
		}
	}
}

func FuzzParsePairs(f *testing.F) {
	f.Add("A=1\nC<<END\nx\nEND\n")
	f.Fuzz(func(t *testing.T, text string) {
		m, err := parsePairs(text)
		if err == nil {
			for k := range m {
				if k == "" {
					t.Errorf("%q gives a variable without a name", text)
				}
			}
		}
	})
}

func newSecret() creds.Secret { return creds.NewSecret("s3cret") }
