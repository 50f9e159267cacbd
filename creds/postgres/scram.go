package postgres

import (
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
)

// scramIterations is the least that RFC 7677 allows and some clients accept.
// They slow down guessing, and nobody guesses 256 random bits.
const scramIterations = 4096

// newPassword returns 256 random bits in letters that need no quoting in a
// DSN, a URL or a shell.
func newPassword() string {
	b := make([]byte, 32)
	_, _ = rand.Read(b) // cannot fail: it ends the program instead
	return base64.RawURLEncoding.EncodeToString(b)
}

// verifier is what PostgreSQL stores of a password (RFC 5802 section 3, RFC
// 7677). Sending it instead of the password keeps the password out of the
// statement, and so out of the server's log and statistics.
func verifier(password string) (string, error) {
	salt := make([]byte, 16)
	_, _ = rand.Read(salt)
	return saltedVerifier(password, salt, scramIterations)
}

func saltedVerifier(password string, salt []byte, iterations int) (string, error) {
	salted, err := pbkdf2.Key(sha256.New, password, salt, iterations, sha256.Size)
	if err != nil {
		return "", fmt.Errorf("verifier of the password: %w", err)
	}
	stored := sha256.Sum256(sum(salted, "Client Key"))
	b64 := base64.StdEncoding.EncodeToString
	return fmt.Sprintf("SCRAM-SHA-256$%d:%s$%s:%s", iterations, b64(salt), b64(stored[:]), b64(sum(salted, "Server Key"))), nil
}

func sum(key []byte, text string) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(text))
	return h.Sum(nil)
}
