package gitea

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/mayfly-ci/mayfly/creds"
)

const (
	// maxAnswer bounds what is read of one answer, in bytes. A workflow has at
	// most a megabyte; the event beside it and the outputs of needed jobs make
	// up the rest.
	maxAnswer = 16 << 20

	// callTimeout bounds one call; Gitea answers in milliseconds, and a
	// megabyte of log on a slow line takes some seconds.
	callTimeout = 30 * time.Second

	// Retries of what must get through. The first comes soon, because a reverse
	// proxy that reloads is back at once; a server that restarts takes seconds.
	retryFirst = 100 * time.Millisecond
	retryLast  = 5 * time.Second

	// maxRetryAfter bounds the wait that a server may ask for.
	maxRetryAfter = 5 * time.Minute
)

var (
	// errUnregistered: the server does not know this runner (any more).
	errUnregistered = errors.New("the server does not know this runner")
	// errNoTask: the server does not know the task, or it is another's.
	errNoTask = errors.New("the server does not know this task as ours")
	// errSealed: the log is complete, and takes no more rows.
	errSealed = errors.New("the log is complete")
	// errTooLarge: an answer that is larger than maxAnswer.
	errTooLarge = fmt.Errorf("the answer has more than %d bytes", maxAnswer)
)

// A client speaks the Connect protocol (connectrpc.com/docs/protocol, "Unary
// Request") in JSON to one instance.
type client struct {
	base    string // https://host/path/api/actions
	http    *http.Client
	agent   string
	timeout time.Duration
}

// newClient checks the address: credentials do not cross a network in clear.
func newClient(c Config) (*client, error) {
	u, err := url.Parse(c.URL)
	if err != nil {
		return nil, errors.New("url: it is not a URL")
	}
	switch {
	case u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "":
		return nil, errors.New("url: want https://HOST, with a path if Gitea is below one")
	case u.Scheme == "http" && !c.Insecure && !loopback(u.Hostname()):
		return nil, fmt.Errorf("url: http to %s would carry tokens and secrets in clear: use https (ca_file for a private authority), or say insecure: true", u.Hostname())
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, fmt.Errorf("url: scheme %q, want https", u.Scheme)
	}
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.RootCA != "" {
		pem, err := os.ReadFile(c.RootCA)
		if err != nil {
			return nil, fmt.Errorf("ca_file: %w", err)
		}
		if conf.RootCAs = x509.NewCertPool(); !conf.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("ca_file: %s: no certificate in PEM", c.RootCA)
		}
	}
	timeout := c.Timeout
	if timeout <= 0 {
		timeout = callTimeout
	}
	transport := &http.Transport{
		DialContext:         (&net.Dialer{Timeout: timeout}).DialContext,
		TLSClientConfig:     conf,
		ForceAttemptHTTP2:   true,
		MaxIdleConnsPerHost: 16, // two a job: a log and a heartbeat
		IdleConnTimeout:     90 * time.Second,
		// An answer has a dozen headers.
		MaxResponseHeaderBytes: 64 << 10,
	}
	var out http.RoundTripper = transport
	if c.Out != nil {
		out = c.Out(transport)
	}
	return &client{
		base:  strings.TrimRight(u.Scheme+"://"+u.Host+u.EscapedPath(), "/") + "/api/actions",
		agent: "mayfly/" + orDefault(c.Version, "dev"), timeout: timeout,
		http: &http.Client{
			Transport: out,
			// A redirect would carry the runner's token to somewhere else.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}, nil
}

func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// A callError is a call that was not answered as it should.
type callError struct {
	method string
	err    error
	final  bool          // the same call will be answered the same
	after  time.Duration // the server asks to wait so long
}

func (e *callError) Error() string { return e.method + ": " + e.err.Error() }
func (e *callError) Unwrap() error { return e.err }

// call makes one call. The error is a *callError, and errUnregistered, errNoTask
// or errSealed if that is what it says. Of a broken answer partial gets what was
// read.
func (c *client) call(ctx context.Context, method string, id identity, in, out any) (partial []byte, err error) {
	wrong := func(err error) error {
		return &callError{method: method[strings.LastIndexByte(method, '/')+1:], err: err}
	}
	var body bytes.Buffer
	enc := json.NewEncoder(&body)
	enc.SetEscapeHTML(false) // logs are full of <, > and &
	if err := enc.Encode(in); err != nil {
		return nil, wrong(err)
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.base+method, &body)
	if err != nil {
		return nil, wrong(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Connect-Protocol-Version", "1")
	req.Header.Set("Connect-Timeout-Ms", strconv.FormatInt(c.timeout.Milliseconds(), 10))
	req.Header.Set("User-Agent", c.agent)
	id.sign(req)
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, wrong(plain(err))
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if len(b) > maxAnswer {
		return b, wrong(errTooLarge)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, refusal(wrong(nil), resp, b)
	}
	if err != nil {
		return b, wrong(fmt.Errorf("the answer was cut off: %w", plain(err)))
	}
	if kind, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type")); kind != "application/json" {
		return nil, wrong(fmt.Errorf("the answer is %q and not JSON: is this the URL of a Gitea?", clip(kind)))
	}
	if err := json.Unmarshal(b, out); err != nil {
		return b, wrong(fmt.Errorf("the answer is not understood: %s", clip(err.Error())))
	}
	return nil, nil
}

// sign adds who we are. Register is called without an identity.
func (id identity) sign(req *http.Request) {
	if id.UUID != "" {
		req.Header.Set("X-Runner-Uuid", id.UUID)
		req.Header.Set("X-Runner-Token", id.token.Reveal())
	}
}

// plain takes the URL off: the error of a call names its method.
func plain(err error) error {
	if u, ok := errors.AsType[*url.Error](err); ok {
		return u.Err
	}
	return err
}

// refusal reads an answer that is none. Gitea returns the errors of gRPC, which
// Connect wraps: the status is 500 and the code "unknown" whatever it is, and
// only the text tells ("rpc error: code = Unauthenticated desc = …").
func refusal(err error, resp *http.Response, body []byte) error {
	e, _ := errors.AsType[*callError](err)
	e.after = retryAfter(resp.Header.Get("Retry-After"))
	var said struct{ Code, Message string }
	if json.Unmarshal(body, &said) != nil || said.Code == "" {
		e.err = fmt.Errorf("HTTP %d", resp.StatusCode)
		switch {
		case resp.StatusCode/100 == 3:
			e.err, e.final = fmt.Errorf("HTTP %d, redirected to %q: configure that as the url", resp.StatusCode, clip(resp.Header.Get("Location"))), true
		case resp.StatusCode == http.StatusNotFound:
			e.err, e.final = errors.New("HTTP 404: this is not the URL of a Gitea with actions"), true
		case resp.StatusCode/100 == 4 && resp.StatusCode != http.StatusTooManyRequests && resp.StatusCode != http.StatusRequestTimeout:
			e.final = true
		}
		return e
	}
	code, text := said.Code, said.Message
	if m := grpcStatus.FindStringSubmatch(text); m != nil {
		code, text = m[1], m[2]
	}
	e.err = fmt.Errorf("%s: %s", clip(code), clip(text))
	code = strings.ToLower(strings.ReplaceAll(code, "_", ""))
	switch {
	case code == "unauthenticated", strings.Contains(text, "unregistered runner"), strings.Contains(text, "runner has been removed"):
		e.err, e.final = errUnregistered, true
	case code == "alreadyexists":
		e.err, e.final = errSealed, true
	case strings.Contains(text, "resource does not exist"), strings.Contains(text, "invalid runner for task"), code == "notfound":
		e.err, e.final = errNoTask, true
	case code == "invalidargument", code == "permissiondenied", code == "unimplemented", code == "outofrange", code == "failedprecondition":
		e.final = true
	}
	return e
}

var grpcStatus = regexp.MustCompile(`(?s)^rpc error: code = (\w+) desc = (.*)`)

// retryAfter reads the header's seconds; its other form, a date, is rare enough
// to be ignored.
func retryAfter(header string) time.Duration {
	n, err := strconv.ParseUint(header, 10, 31)
	if err != nil {
		return 0
	}
	return min(time.Duration(n)*time.Second, maxRetryAfter)
}

// clip makes text of the server's fit for an error: one line, and short.
func clip(s string) string {
	const most = 200
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}

// insist makes a call until it is answered, or ctx ends. The error is that of
// the last call.
func (c *client) insist(ctx context.Context, method string, id identity, in, out any) error {
	for wait := retryFirst; ; wait = min(2*wait, retryLast) {
		_, err := c.call(ctx, method, id, in, out)
		e, failed := errors.AsType[*callError](err)
		if !failed || e.final {
			return err
		}
		if !pause(ctx, max(jitter(wait), e.after)) {
			return err
		}
	}
}

// pause waits for d and returns false if ctx ended first.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}

const (
	methodPing       = "/ping.v1.PingService/Ping"
	methodRegister   = "/runner.v1.RunnerService/Register"
	methodDeclare    = "/runner.v1.RunnerService/Declare"
	methodFetchTask  = "/runner.v1.RunnerService/FetchTask"
	methodUpdateTask = "/runner.v1.RunnerService/UpdateTask"
	methodUpdateLog  = "/runner.v1.RunnerService/UpdateLog"
)

// An identity is what Register gave us.
type identity struct {
	UUID  string
	token creds.Secret
}
