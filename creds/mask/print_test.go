package mask_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/mask"
)

// TestUnprintable prints sets and writers in every way that the standard
// library has, on their own and as a part of something else.
func TestUnprintable(t *testing.T) {
	t.Parallel()
	const secret = "s3cr3t-value"
	set := mask.New([]creds.Secret{creds.NewSecret(secret)})
	w := mask.NewWriter(func([]byte) error { return nil }, set)
	write(t, w, secret+" "+secret[:7]) // held back and in the scratch
	type outer struct {
		Set    *mask.Set
		Writer *mask.Writer
		set    *mask.Set
		writer *mask.Writer
		value  mask.Set
		copied mask.Writer
	}
	all := outer{set, w, set, w, *set, *w}
	for _, v := range []any{set, *set, w, *w, all, &all, []any{set, w}, map[string]any{"k": *set, "l": *w}} {
		var printed []string
		for _, verb := range "vsqxXdptTbeocU" {
			printed = append(printed, fmt.Sprintf("%"+string(verb), v), fmt.Sprintf("%+"+string(verb), v), fmt.Sprintf("%#"+string(verb), v))
		}
		encoded, err := json.Marshal(v)
		if err != nil {
			t.Errorf("json.Marshal(%T): %v", v, err)
		}
		var logged bytes.Buffer
		slog.New(slog.NewTextHandler(&logged, nil)).Info("text", "value", v)
		slog.New(slog.NewJSONHandler(&logged, nil)).Info("json", "value", v)
		for _, p := range append(printed, string(encoded), logged.String()) {
			for _, form := range []string{secret[:7], fmt.Sprintf("%x", secret[:7]), fmt.Sprintf("%X", secret[:7]), strings.Trim(fmt.Sprint([]byte(secret[:7])), "[]")} {
				if strings.Contains(p, form) {
					t.Errorf("%T prints as %q, which shows the secret", v, p)
				}
			}
		}
	}
	for _, v := range []any{set, *set, w, *w} {
		if got := fmt.Sprintf("%+v", v); got != creds.Placeholder {
			t.Errorf("%T prints as %q, want %q", v, got, creds.Placeholder)
		}
	}
}
