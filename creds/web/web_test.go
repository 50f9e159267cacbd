package web_test

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/creds/web"
)

func TestCheckURL(t *testing.T) {
	t.Parallel()
	for text, good := range map[string]bool{
		"https://forge.example.com": true, "https://forge.example.com:8443/git": true, "http://127.0.0.1:3000": true, "http://[::1]:3000": true,
		"http://forge.example.com": false, "": false, "forge.example.com": false, "https://u:p@forge.example.com": false,
		"https://forge.example.com/?a=b": false, "https://forge.example.com/#f": false, "ftp://127.0.0.1": false,
		// What is put behind these would be no path.
		"https://forge.example.com?": false, "https://forge.example.com/#": false, "https://:8443": false,
	} {
		if err := web.CheckURL(text, false); (err == nil) != good {
			t.Errorf("%q: got %v, good: %v", text, err, good)
		}
	}
	if err := web.CheckURL("http://forge.example.com", true); err != nil {
		t.Errorf("insecure: %v", err)
	}
}

// TestStaysWhereItIs: neither a redirect nor an endless answer is followed.
func TestStaysWhereItIs(t *testing.T) {
	t.Parallel()
	elsewhere := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("a redirect was followed, with %q", r.Header.Get("Authorization"))
	}))
	defer elsewhere.Close()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/redirect":
			http.Redirect(w, r, elsewhere.URL, http.StatusTemporaryRedirect)
		case "/endless":
			_, _ = w.Write([]byte(strings.Repeat("x", 9<<20)))
		default:
			w.WriteHeader(http.StatusTeapot)
			_, _ = w.Write([]byte("short"))
		}
	}))
	defer server.Close()
	client, err := web.NewClient("", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer client.CloseIdleConnections()
	get := func(path string) (int, []byte, error) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, server.URL+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "secret")
		return web.Do(client, req)
	}
	if _, _, err := get("/redirect"); !errors.Is(err, web.ErrRedirect) {
		t.Errorf("redirect: got %v, want ErrRedirect", err)
	}
	if _, _, err := get("/endless"); err == nil || !strings.Contains(err.Error(), "larger") {
		t.Errorf("endless: got %v, want it cut off", err)
	}
	if status, body, err := get("/"); status != http.StatusTeapot || string(body) != "short" || err != nil {
		t.Errorf("answer: got %d %q %v", status, body, err)
	}
	if _, err := web.NewClient("web_test.go", nil); err == nil {
		t.Error("a file without certificates is taken for authorities")
	}
}

func TestWords(t *testing.T) {
	t.Parallel()
	if got := web.Words("no\n  such token s3cret", "s3cret", ""); got != "no such token [secret]" {
		t.Errorf("got %q", got)
	}
	if got := web.Words(strings.Repeat("ö", 1000)); len(got) > 410 {
		t.Errorf("got %d bytes", len(got))
	}
}
