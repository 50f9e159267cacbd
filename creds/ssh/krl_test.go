package ssh

import (
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

// TestListReadByOpenSSH: ssh-keygen, which reads it as sshd does, finds what is
// in the list revoked and nothing else, for two authorities.
func TestListReadByOpenSSH(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var cas []ssh.Signer
	var entries []revoked
	for range 2 {
		_, private, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		ca, err := ssh.NewSignerFromKey(private)
		if err != nil {
			t.Fatal(err)
		}
		cas = append(cas, ca)
	}
	for _, serial := range []uint64{1 << 63, 7, 1, 7, 1<<64 - 1} {
		entries = append(entries, revoked{blob(cas[0].PublicKey()), serial, time.Time{}})
	}
	entries = append(entries, revoked{blob(cas[1].PublicKey()), 8, time.Time{}})
	list := filepath.Join(dir, "list")
	b, err := krl(3, time.Now(), "a comment", entries)
	if err == nil {
		err = os.WriteFile(list, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	for n, c := range []struct {
		ca      int
		serial  uint64
		revoked bool
	}{
		{0, 1, true},
		{0, 7, true},
		{0, 1 << 63, true},
		{0, 1<<64 - 1, true},
		{0, 2, false},
		{0, 8, false},
		{1, 8, true},
		{1, 7, false},
		{1, 1, false},
	} {
		public, _, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		key, err := ssh.NewPublicKey(public)
		if err != nil {
			t.Fatal(err)
		}
		cert := &ssh.Certificate{Key: key, Serial: c.serial, CertType: ssh.UserCert, KeyId: "k", ValidPrincipals: []string{"p"}, ValidBefore: ssh.CertTimeInfinity}
		if err := cert.SignCert(rand.Reader, cas[c.ca]); err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(dir, fmt.Sprintf("%d-cert.pub", n))
		if err := os.WriteFile(file, ssh.MarshalAuthorizedKey(cert), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("ssh-keygen", "-Q", "-f", list, file).CombinedOutput()
		if code := exitCode(err); (code == 1) != c.revoked || code > 1 {
			t.Errorf("authority %d, serial %d: ssh-keygen ends with %d: %s; revoked: %v", c.ca, c.serial, code, out, c.revoked)
		}
	}
	if out, err := exec.Command("ssh-keygen", "-Q", "-l", "-f", list).CombinedOutput(); err != nil {
		t.Errorf("ssh-keygen -Q -l: %v: %s", err, out)
	}
}

func exitCode(err error) int {
	if exit, ok := err.(*exec.ExitError); ok {
		return exit.ExitCode()
	}
	if err != nil {
		return 255
	}
	return 0
}
