package seal

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

func TestSealOpen(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "seal.key")
	k, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	again, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, plain := range [][]byte{[]byte("handle"), {}, nil} {
		sealed := k.Seal("job", plain)
		if len(plain) > 0 && bytes.Contains(sealed, plain) {
			t.Errorf("sealed bytes show %q", plain)
		}
		got, err := again.Open("job", sealed)
		if err != nil || !bytes.Equal(got, plain) || (got == nil) != (plain == nil) {
			t.Errorf("open: got %v, %v, want %v", got, err, plain)
		}
	}
	sealed := k.Seal("job", []byte("handle"))
	if _, err := k.Open("other", sealed); !errors.Is(err, ErrSealed) {
		t.Errorf("for another name: got %v, want ErrSealed", err)
	}
	for i := range sealed {
		bad := bytes.Clone(sealed)
		bad[i] ^= 1
		if _, err := k.Open("job", bad); !errors.Is(err, ErrSealed) {
			t.Errorf("byte %d flipped: got %v, want ErrSealed", i, err)
		}
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if shown := fmt.Sprintf("%v %+v %#v", k, k, k); strings.Contains(shown, string(raw)) {
		t.Error("the key can be printed")
	}
}

func TestRefusesAKeyThatOthersCanRead(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "seal.key")
	if err := os.WriteFile(path, make([]byte, keyBytes), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(path); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("mode 0644: got %v, want a refusal that says what to do", err)
	}
	short := filepath.Join(t.TempDir(), "seal.key")
	if err := os.WriteFile(short, []byte("short"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(short); err == nil {
		t.Error("a truncated key: got nil, want an error")
	}
}

// An agent that makes its state, and a command that looks at it meanwhile, have
// one key.
func TestLoadAtOnce(t *testing.T) {
	t.Parallel()
	for range 20 {
		path := filepath.Join(t.TempDir(), "seal.key")
		sealed := make([][]byte, 8)
		var wg sync.WaitGroup
		for i := range sealed {
			wg.Go(func() {
				key, err := Load(path)
				if err != nil {
					t.Error(err)
					return
				}
				sealed[i] = key.Seal("x", []byte("handle"))
			})
		}
		wg.Wait()
		key, err := Load(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range sealed {
			if got, err := key.Open("x", b); string(got) != "handle" {
				t.Errorf("got %q and %v", got, err)
			}
		}
	}
}
