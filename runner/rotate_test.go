package runner

import (
	"bytes"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/runner/internal/journal"
	"github.com/mayfly-ci/mayfly/runner/internal/seal"
)

// keptState is a state with a lease's handle, a safe and a sealed text.
func keptState(t *testing.T, dir string) (s *State, text string) {
	t.Helper()
	s, err := OpenState(dir)
	if err != nil {
		t.Fatal(err)
	}
	log, err := s.journal.Begin("mf-a", journal.Debt{Kind: kindClaim, Name: "mf-a"})
	if err != nil {
		t.Fatal(err)
	}
	text, err = s.Seal("pg", creds.NewSecret("hunter2"), time.Unix(100, 0))
	if err := errors.Join(err, log.Intend(journal.Debt{Kind: kindLease, Name: "mf-a-l-x"}), log.Try("mf-a-l-x"),
		log.Held("mf-a-l-x", []byte("handle"), true), log.Close(), s.Safe("ci").Save([]byte("registration"))); err != nil {
		t.Fatal(err)
	}
	return s, text
}

// opens says whether a state of the directory can read all of it.
func opens(t *testing.T, dir, text string) bool {
	t.Helper()
	s, err := PeekState(dir)
	if err != nil {
		t.Fatal(err)
	}
	logs, err := s.journal.Peek()
	if err != nil || len(logs) != 1 || logs[0].Damaged != 0 {
		t.Fatalf("journal: %v, %v", logs, err)
	}
	held := string(logs[0].Debts()[0].Handle) == "handle"
	safe, err := s.Safe("ci").Load()
	in, terr := s.Unseal("pg", creds.NewSecret(text))
	good := err == nil && terr == nil
	if held != good {
		t.Errorf("the journal opens: %v, the rest: %v and %v", held, err, terr)
	}
	return good && held && string(safe) == "registration" && in.Secret.Reveal() == "hunter2" && in.Since.Equal(time.Unix(100, 0))
}

// TestRotate: after a rotation everything is sealed with the new key, the old one
// opens what was sealed before, and when it is forgotten it opens nothing more.
func TestRotate(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, text := keptState(t, dir)
	path := filepath.Join(dir, sealFile)
	first, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Rotate(); err != nil {
		t.Fatal(err)
	}
	if !opens(t, dir, text) {
		t.Error("after the rotation what the old key sealed is not opened")
	}
	again, sealed, err := s.Reseal("pg", creds.NewSecret(text))
	if err != nil || !sealed {
		t.Fatalf("Reseal: %v, %v", sealed, err)
	}
	if err := errors.Join(s.Forget(), s.Close()); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(path); err != nil || len(b) != len(first) || bytes.Equal(b, first) {
		t.Errorf("%d bytes are left of the keys (%v), want those of the new one", len(b), err)
	}
	if !opens(t, dir, again) {
		t.Error("what was sealed again is not opened by the new key alone")
	}
	if err := os.WriteFile(path, first, 0o600); err != nil {
		t.Fatal(err)
	}
	if opens(t, dir, again) {
		t.Error("the old key opens what was sealed again")
	}
}

// TestForgetAfterACrash: a rotation that was killed when it had a new key, and had
// sealed nothing with it, costs nothing, nor does a safe that was half written.
func TestForgetAfterACrash(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, text := keptState(t, dir)
	half := filepath.Join(dir, "safe", "new-ci.new")
	if err := errors.Join(seal.Rotate(filepath.Join(dir, sealFile)), os.WriteFile(half, []byte("ha"), 0o600), s.Close()); err != nil {
		t.Fatal(err)
	}
	s, err := OpenState(dir)
	if err != nil {
		t.Fatal(err)
	}
	again, _, err := s.Reseal("pg", creds.NewSecret(text))
	if err := errors.Join(err, s.Forget(), s.Close()); err != nil {
		t.Fatal(err)
	}
	if n, _ := s.Keys(); n != 2 {
		t.Errorf("%d keys, want the two that there were", n)
	}
	if !opens(t, dir, again) {
		t.Error("what was not sealed again before is lost")
	}
	// What no key opens is not forgotten silently.
	s, err = OpenState(dir)
	if err == nil {
		err = errors.Join(seal.Rotate(filepath.Join(dir, sealFile)), os.WriteFile(filepath.Join(dir, "safe", "ci"), []byte("junk"), 0o600))
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	if err := s.Forget(); err == nil || !strings.Contains(err.Error(), "remove the file") {
		t.Errorf("with a safe that no key opens: %v", err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, sealFile)); err != nil || len(b) != 64 {
		t.Errorf("%d bytes of keys are left (%v), want both", len(b), err)
	}
}

// TestRotateBeside: nobody changes keys under a living agent, nor anything else.
func TestRotateBeside(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, _ := keptState(t, dir)
	defer func() { _ = s.Close() }()
	before := contents(t, dir)
	peeked, err := PeekState(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := peeked.Rotate(); !errors.Is(err, errPeeked) {
		t.Errorf("Rotate: %v", err)
	}
	if err := peeked.Forget(); !errors.Is(err, errPeeked) {
		t.Errorf("Forget: %v", err)
	}
	if !maps.Equal(before, contents(t, dir)) {
		t.Error("a file of the state is another one")
	}
}

// contents are those of all files below a directory, by their names.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := fs.WalkDir(os.DirFS(dir), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(filepath.Join(dir, name))
		all[name] = string(b)
		return err
	})
	if err != nil || len(all) == 0 {
		t.Fatalf("%d files, %v", len(all), err)
	}
	return all
}

// TestKeyOfSystemd: it seals, and the file opens what it sealed before;
// with the credential alone no file is made, also not by who only looks.
func TestKeyOfSystemd(t *testing.T) {
	dir, given := t.TempDir(), t.TempDir()
	s, text := keptState(t, dir)
	if err := os.WriteFile(filepath.Join(given, seal.Credential), bytes.Repeat([]byte{7}, 32), 0o400); err != nil {
		t.Fatal(err)
	}
	t.Setenv("CREDENTIALS_DIRECTORY", given)
	if err := s.Rotate(); err != nil {
		t.Fatal(err)
	}
	if n, manager := s.Keys(); n != 2 || !manager || !opens(t, dir, text) {
		t.Errorf("%d keys, of the service manager: %v", n, manager)
	}
	again, _, err := s.Reseal("pg", creds.NewSecret(text))
	if err := errors.Join(err, s.Forget(), s.Close()); err != nil {
		t.Fatal(err)
	}
	if !opens(t, dir, again) {
		t.Error("the credential alone does not open what it sealed")
	}
	agent, err := OpenState(dir) // as the agent does
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, sealFile)); err == nil {
		t.Error("the agent has made a key beside that of the service manager")
	}
	if err := agent.Close(); err != nil {
		t.Fatal(err)
	}
	t.Setenv("CREDENTIALS_DIRECTORY", "")
	if opens(t, dir, again) {
		t.Error("it is opened without the credential")
	}
	looks, err := PeekState(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := looks.Seal("pg", creds.NewSecret("x"), time.Now()); err == nil {
		t.Error("a secret was sealed without a key")
	}
	if _, err := os.Stat(filepath.Join(dir, sealFile)); err == nil {
		t.Error("a key was made beside that of the service manager")
	}
}

// TestNoOtherKeyThanSystemds: who has not the key of the last life makes none, and
// recovers nothing without it: handles would be given up.
func TestNoOtherKeyThanSystemds(t *testing.T) {
	dir, given := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(given, seal.Credential), bytes.Repeat([]byte{7}, 32), 0o400); err != nil {
		t.Fatal(err)
	}
	open := func(credentials string) error {
		t.Setenv("CREDENTIALS_DIRECTORY", credentials)
		s, err := OpenState(dir)
		if err != nil {
			return err
		}
		return s.Close()
	}
	if err := open(given); err != nil {
		t.Fatal(err)
	}
	refused := func(what string) {
		if err := open(""); !errors.Is(err, ErrKeyElsewhere) || !strings.Contains(err.Error(), "systemd-run") {
			t.Errorf("%s: %v", what, err)
		}
	}
	refused("without a key")
	path := filepath.Join(dir, sealFile)
	if _, err := os.Stat(path); err == nil {
		t.Error("a key was made")
	}
	if _, err := seal.Load(path); err != nil {
		t.Fatal(err)
	}
	refused("with an older key")
	s, err := PeekState(dir)
	if err != nil || s.Generation != 1 {
		t.Errorf("beside: generation %d, %v, want the one that was", s.Generation, err)
	}
	if err := open(given); err != nil {
		t.Errorf("with the key again: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "agent.json"), []byte(`{"version": 1, "installation": "a"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := open(""); err != nil {
		t.Errorf("after it was given up: %v", err)
	}
}
