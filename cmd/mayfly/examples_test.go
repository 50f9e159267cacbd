package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestExamples: "mayfly config check" is content with every example, with the
// policy that it names, once the files of /etc/mayfly are there.
func TestExamples(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	copies, err := filepath.Glob("../../configs/*.yaml")
	if err != nil || len(copies) == 0 {
		t.Fatalf("%d examples, %v", len(copies), err)
	}
	authority, key := authorityOf(t)
	agents := 0
	for _, path := range copies {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, own := range regexp.MustCompile(`/etc/mayfly/[\w.-]+`).FindAllString(string(b), -1) {
			text := key
			if strings.Contains(filepath.Base(own), "ca.pem") {
				text = authority
			}
			if err := os.WriteFile(filepath.Join(dir, filepath.Base(own)), text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		text := strings.ReplaceAll(string(b), "/etc/mayfly/", dir+"/")
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(path)), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, path := range copies {
		name := filepath.Base(path)
		if !strings.HasPrefix(name, "agent") {
			continue
		}
		agents++
		var out, said bytes.Buffer
		c := &call{args: []string{"check", filepath.Join(dir, name)}, stdout: &out, stderr: &said}
		if err := runConfig(c); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if agents < 11 {
		t.Errorf("%d examples were looked at", agents)
	}
}

// authorityOf is a certificate and its key, in PEM.
func authorityOf(t *testing.T) (certificate, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	form := &x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, form, form, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	text, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: text})
}
