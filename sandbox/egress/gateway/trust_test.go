package gateway_test

import (
	"io"
	"net/http"
	"testing"
)

// TestResumed: the second connection to a destination resumes the session of the
// first, also where the rule names the authority.
func TestResumed(t *testing.T) {
	resumed := make(chan bool, 2)
	s := newSecured(t, false, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { resumed <- r.TLS.DidResume }))
	for _, want := range []bool{false, true} {
		c := s.client(false) // a connection of its own
		resp, err := c.Get(s.url("/"))
		if err != nil {
			t.Fatal(err)
		}
		_, err = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("got %s and %v", resp.Status, err)
		}
		if got := <-resumed; got != want {
			t.Errorf("session with the destination resumed: got %v, want %v", got, want)
		}
	}
}
