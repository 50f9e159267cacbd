package creds_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/creds"
)

// A lease that is printed whole, by mistake, shows neither its values nor its
// handle, which often is the credential.
func TestLeaseDoesNotPrint(t *testing.T) {
	t.Parallel()
	const secret = "hunter2-hunter2"
	l := creds.Lease{Values: map[string]creds.Secret{"password": creds.NewSecret(secret)}, Handle: []byte(secret)}
	b, err := json.Marshal(l)
	if err != nil {
		t.Fatal(err)
	}
	shown := string(b)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		shown += fmt.Sprintf(verb+" "+verb+" "+verb, l, &l, l.Handle)
	}
	hex := fmt.Sprintf("%x", secret)
	decimal := strings.Trim(fmt.Sprint([]byte(secret)), "[]")
	for _, form := range []string{secret, hex, decimal, "aHVudGVyMi1odW50ZXIy"} {
		if strings.Contains(shown, form) {
			t.Errorf("a printed lease shows %q: %s", form, shown)
		}
	}
}
