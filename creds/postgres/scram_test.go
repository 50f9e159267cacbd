package postgres

import (
	"encoding/base64"
	"strings"
	"testing"
)

// TestVerifier checks against the exchange printed in RFC 7677, section 3.
func TestVerifier(t *testing.T) {
	t.Parallel()
	salt, err := base64.StdEncoding.DecodeString("W22ZaJ0SNY7soEsUEjb6gQ==")
	if err != nil {
		t.Fatal(err)
	}
	got, err := saltedVerifier("pencil", salt, 4096)
	if err != nil {
		t.Fatal(err)
	}
	// As PostgreSQL computes it for this password and salt.
	const want = "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU="
	if got != want {
		t.Errorf("verifier of \"pencil\":\n got %s\nwant %s", got, want)
	}
	// The server's signature in the RFC's last message is made with the key.
	signature := sum(mustDecode(t, got[strings.LastIndex(got, ":")+1:]), "n=user,r=rOprNGfwEbeRWgbNEkqO,"+
		"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096,"+
		"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0")
	if v := base64.StdEncoding.EncodeToString(signature); v != "6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=" {
		t.Errorf("server signature: got %s, want the RFC's", v)
	}
}

func mustDecode(t *testing.T, s string) []byte {
	t.Helper()
	b, err := base64.StdEncoding.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestPasswordsDiffer(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for range 100 {
		p := newPassword()
		if b, err := base64.RawURLEncoding.DecodeString(p); err != nil || len(b) != 32 || seen[p] {
			t.Fatalf("password of %d bytes (%v), seen before: %v; want 32 new ones", len(b), err, seen[p])
		}
		seen[p] = true
	}
}
