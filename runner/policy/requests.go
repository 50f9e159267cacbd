package policy

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/mayfly-ci/mayfly/configs/strict"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// requestNode is one of the requests that a rule lets through.
type requestNode struct {
	Self         strict.Node   `yaml:",self"`
	Methods      []httpMethod  `yaml:"methods,required"`
	Path         pathPattern   `yaml:"path,required"`
	Query        *[]queryKey   `yaml:"query"`
	ContentTypes *[]mediaType  `yaml:"content-types"`
	Sent         size          `yaml:"sent"`
	Received     size          `yaml:"received"`
	Count        requestNumber `yaml:"count"`
	Rate         requestNumber `yaml:"rate"`
	WebSocket    bool          `yaml:"websocket"`
}

type (
	httpMethod string
	queryKey   string
	mediaType  string
)

// The checks of these are the gateway's own, made on the request as a whole.
func (m *httpMethod) UnmarshalText(b []byte) error { *m = httpMethod(b); return nil }
func (k *queryKey) UnmarshalText(b []byte) error   { *k = queryKey(b); return nil }
func (t *mediaType) UnmarshalText(b []byte) error  { *t = mediaType(b); return nil }

// requestNumber is how many requests may be.
type requestNumber int

// mostRequests is more than a job makes, and few enough to count.
const mostRequests = 1_000_000_000

func (r *requestNumber) UnmarshalText(b []byte) error {
	n, err := natural(string(b))
	if err != nil || n > mostRequests {
		return fmt.Errorf("%q is not a number of requests: write 1 or more", b)
	}
	*r = requestNumber(n)
	return nil
}

// pathPattern is a pattern of a path in which {repository} and the like stand for
// facts of the job.
type pathPattern string

func (p *pathPattern) UnmarshalText(b []byte) error {
	*p = pathPattern(b)
	_, err := p.fill(func(string) (string, error) { return "x", nil })
	return err
}

// fill replaces each variable.
func (p pathPattern) fill(value func(name string) (string, error)) (string, error) {
	var all []error
	filled := regexp.MustCompile(`\{[^{}]*\}`).ReplaceAllStringFunc(string(p), func(v string) string {
		name := v[1 : len(v)-1]
		if _, known := fact(name, providers.Job{}); !known {
			all = append(all, fmt.Errorf("path %q: unknown variable %s (known: {repository}, {owner}, {name}, {ref}, {sha})", p, v))
			return "x"
		}
		s, err := value(name)
		if err != nil {
			all = append(all, fmt.Errorf("path %q: %w", p, err))
		}
		return s
	})
	return filled, errors.Join(all...)
}

// fact is what a variable of a path means.
func fact(name string, j providers.Job) (value string, known bool) {
	repository := j.Subject.Repository
	slash := strings.LastIndexByte(repository, '/')
	switch name {
	case "repository":
		return repository, true
	case "owner":
		return repository[:max(slash, 0)], true
	case "name":
		return repository[slash+1:], true
	case "ref":
		return j.Subject.Ref, true
	case "sha":
		return j.Subject.SHA, true
	}
	return "", false
}

// safeFact is a fact of a job that means nothing but itself in a path: somebody
// else may have chosen it.
func safeFact(name string, j providers.Job) (string, error) {
	value, _ := fact(name, j)
	for segment := range strings.SplitSeq(value, "/") {
		ok, err := regexp.MatchString(`^[A-Za-z0-9._~@+=,-]+$`, segment)
		if err != nil || !ok || segment == "." || segment == ".." {
			return "", fmt.Errorf("{%s} of this job is %q, which is not safe in a path", name, value)
		}
	}
	return value, nil
}

// request is what the gateway checks. Its path has the variables in it still.
func (n requestNode) request() (egress.Request, error) {
	r := egress.Request{
		Methods: texts(n.Methods), Path: string(n.Path), Query: list(n.Query), ContentTypes: list(n.ContentTypes),
		Sent: int64(n.Sent), Received: int64(n.Received), Count: int(n.Count), Rate: int(n.Rate), WebSocket: n.WebSocket,
	}
	sample := r
	var err error
	sample.Path, err = n.Path.fill(func(string) (string, error) { return "x", nil })
	if err != nil || n.Path == "" || n.Self.Get("methods").IsZero() {
		return r, nil // it was refused already
	}
	if err := sample.Check(); err != nil {
		return r, n.Self.Errorf("%s", strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	return r, nil
}

// list tells an absent key, nil, from an empty list.
func list[T ~string](l *[]T) []string {
	if l == nil {
		return nil
	}
	return append([]string{}, texts(*l)...)
}

// fill gives the paths of a rule the job's own facts.
func fill(r egress.Rule, j providers.Job) (egress.Rule, error) {
	var all []error
	requests := make([]egress.Request, 0, len(r.Requests))
	for _, q := range r.Requests {
		path, err := pathPattern(q.Path).fill(func(name string) (string, error) { return safeFact(name, j) })
		q.Path = path
		if err == nil {
			err = q.Check()
		}
		all = append(all, err)
		requests = append(requests, q)
	}
	session, err := fillSession(r.Session, j)
	if err := errors.Join(append(all, err)...); err != nil {
		return r, fmt.Errorf("%w: %s: %w", ErrDenied, r.ID, err)
	}
	if len(requests) > 0 {
		r.Requests = requests
	}
	r.Session = session
	return r, nil
}

// certificates are what a destination's certificate must chain to, as PEM.
type certificates string

func (c *certificates) UnmarshalText(b []byte) error {
	rest := b
	for n := 0; ; n++ {
		block, more := pem.Decode(rest)
		if block == nil {
			if n == 0 || strings.TrimSpace(string(rest)) != "" {
				return errors.New("want certificates as PEM, and nothing else")
			}
			*c = certificates(b)
			return nil
		}
		if block.Type != "CERTIFICATE" {
			return fmt.Errorf("want certificates as PEM, got %s", block.Type)
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return fmt.Errorf("certificate %d: %w", n+1, err)
		}
		rest = more
	}
}
