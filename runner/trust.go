package runner

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha1"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"
	"unicode/utf16"

	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// Where TLS ends at the gateway the box has to trust the authority of its job.
// It is put where programs look, and named in the variables that some of them
// want, before anything runs. A job without such rules pays nothing.

// authorityFile is the certificate alone, below sandbox.Run.
const authorityFile = "ca.pem"

// bundles are where distributions keep what all programs trust, as PEM. They are
// not links there; what links to them sees the same.
func bundles() []string {
	return []string{
		"/etc/ssl/certs/ca-certificates.crt",                // Debian, Alpine, Arch
		"/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", // Fedora, RHEL
		"/etc/pki/tls/certs/ca-bundle.crt",                  // where that is older
		"/var/lib/ca-certificates/ca-bundle.pem",            // openSUSE
		"/etc/ssl/certs/ca-bundle.crt",                      // images of Nix
		"/etc/ssl/cert.pem",                                 // Alpine without the package
	}
}

// keystores are where Java looks, which reads nothing else.
func keystores() []string {
	return []string{
		"/etc/ssl/certs/java/cacerts",                   // Debian
		"/etc/pki/ca-trust/extracted/java/cacerts",      // Fedora, RHEL
		"/var/lib/ca-certificates/java-cacerts",         // openSUSE
		"/opt/java/openjdk/lib/security/cacerts",        // the images of Eclipse Temurin
		"/usr/lib/jvm/default-jvm/lib/security/cacerts", // Alpine
	}
}

// bundleMax bounds what is read of one of these files, in bytes. The largest are
// a few hundred kilobytes.
const bundleMax = 8 << 20

// terminated are the names for which TLS ends at the gateway.
func terminated(rules []egress.Rule) []string {
	var names []string
	for _, r := range rules {
		if r.Protocol == egress.HTTPS || r.Protocol == egress.Postgres {
			names = append(names, r.Name)
		}
	}
	return names
}

// terminates are those of allRules.
func (l *life) terminates(plan policy.Plan) []string { return terminated(l.allRules(plan)) }

// allRules are those of the job and of the steps that it has.
func (l *life) allRules(plan policy.Plan) []egress.Rule {
	rules := append(stepRules(plan, ""), brokered(plan, "")...)
	for _, s := range l.job.Steps {
		rules = append(append(rules, stepRules(plan, s.ID)...), brokered(plan, s.ID)...)
	}
	return rules
}

// trust puts the authority of a gateway into its box, and the variables that
// programs need to find it behind those of the box's image.
func (l *life) trust(ctx context.Context, box sandbox.Sandbox, image *sandbox.Image, gateway string, names []string) error {
	if len(names) == 0 {
		return nil
	}
	t, ok := l.cfg.Gateway.(egress.Terminator)
	if !ok {
		return fmt.Errorf("authority of the job: the gateway ends no TLS, which a rule for %s needs", names[0])
	}
	ca, err := t.Authority(gateway)
	if err == nil && len(ca) == 0 {
		err = errors.New("the gateway has none")
	}
	if err != nil {
		return fmt.Errorf("authority of the job: %w", err)
	}
	files := map[string][]byte{sandbox.Run + "/" + authorityFile: ca}
	bundle, whole := sandbox.Run+"/"+authorityFile, ca
	for i, name := range bundles() {
		found, err := present(ctx, box, name)
		if err != nil {
			return err
		}
		if found == nil {
			continue
		}
		files[name] = bytes.Join([][]byte{bytes.TrimRight(found, "\n"), ca}, []byte("\n"))
		if len(whole) == len(ca) || i == 0 {
			bundle, whole = name, files[name]
		}
	}
	for _, name := range keystores() {
		found, err := present(ctx, box, name)
		if err != nil {
			return err
		}
		if found != nil {
			files[name] = keystore(whole)
		}
	}
	if err := putFiles(ctx, box, files); err != nil {
		return fmt.Errorf("authority of the job: %w", err)
	}
	image.Env = append(slices.Clone(image.Env), trusting(bundle)...)
	l.clock.mark("-trust")
	return nil
}

// trusting are the variables. What replaces the trust of a program gets all of
// it; what adds to it gets the authority alone.
func trusting(bundle string) []string {
	alone := sandbox.Run + "/" + authorityFile
	env := []string{"NODE_EXTRA_CA_CERTS=" + alone, "DENO_CERT=" + alone}
	for _, v := range []string{
		"SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "PIP_CERT", "GIT_SSL_CAINFO", "CURL_CA_BUNDLE", "CARGO_HTTP_CAINFO", "AWS_CA_BUNDLE",
	} {
		env = append(env, v+"="+bundle)
	}
	return env
}

// present is a file of the box, nil if there is none that is a regular one: a
// link leads to one of the others.
func present(ctx context.Context, box sandbox.Sandbox, name string) ([]byte, error) {
	b, err := box.Get(ctx, name, bundleMax)
	switch {
	case err == nil:
		return b, nil
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case errors.Is(err, sandbox.ErrDied):
		return nil, err
	}
	return nil, nil // absent, or no regular file, or one on the way is a link
}

// putFiles writes files that all users of the box may read, each in its place.
func putFiles(ctx context.Context, box sandbox.Sandbox, files map[string][]byte) error {
	dirs := map[string]map[string][]byte{}
	for name, content := range files {
		dir := path.Dir(name)
		if dirs[dir] == nil {
			dirs[dir] = map[string][]byte{}
		}
		dirs[dir][path.Base(name)] = content
	}
	for dir, inside := range dirs {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for name, content := range inside {
			h := &tar.Header{Name: name, Mode: 0o644, Size: int64(len(content)), Typeflag: tar.TypeReg, ModTime: time.Now()}
			if err := w.WriteHeader(h); err != nil {
				return err
			}
			if _, err := w.Write(content); err != nil {
				return err
			}
		}
		if err := w.Close(); err != nil {
			return err
		}
		if err := box.Put(ctx, dir, &b); err != nil {
			return fmt.Errorf("%s: %w", dir, err)
		}
	}
	return nil
}

// keystore is what Java trusts, made of certificates as PEM: a JKS file (the
// format is that of sun.security.provider.JavaKeyStore, version 2), which every
// Java reads, with the password that Java's own has.
func keystore(bundle []byte) []byte {
	const magic, version, trusted = 0xfeedfeed, 2, 2
	var entries []byte
	count := uint32(0)
	for block, rest := pem.Decode(bundle); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		count++
		entries = binary.BigEndian.AppendUint32(entries, trusted)
		entries = appendUTF(entries, fmt.Sprintf("certificate-%d", count))
		entries = binary.BigEndian.AppendUint64(entries, uint64(time.Now().UnixMilli()))
		entries = appendUTF(entries, "X.509")
		entries = binary.BigEndian.AppendUint32(entries, uint32(len(block.Bytes)))
		entries = append(entries, block.Bytes...)
	}
	var b []byte
	for _, n := range []uint32{magic, version, count} {
		b = binary.BigEndian.AppendUint32(b, n)
	}
	b = append(b, entries...)
	digest := sha1.New() // the format's own; nobody relies on it
	for _, c := range utf16.Encode([]rune("changeit")) {
		_, _ = digest.Write([]byte{byte(c >> 8), byte(c)}) // a hash takes everything
	}
	_, _ = digest.Write([]byte("Mighty Aphrodite"))
	_, _ = digest.Write(b)
	return digest.Sum(b)
}

func appendUTF(b []byte, s string) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(len(s)))
	return append(b, strings.ToValidUTF8(s, "")...)
}
