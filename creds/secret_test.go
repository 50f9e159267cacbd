package creds_test

import (
	"bytes"
	"encoding/base64"
	"encoding/gob"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"html/template"
	"log/slog"
	"strings"
	"testing"
	text "text/template"

	"github.com/mayfly-ci/mayfly/creds"
)

const value = "hunter2-and-more"

// A holder is everything a Secret may sit in.
type holder struct {
	Open    creds.Secret
	Pointer *creds.Secret
	List    []creds.Secret
	Map     map[string]creds.Secret
	Any     any
	hidden  creds.Secret
	deep    struct{ p *creds.Secret }
}

func newHolder() holder {
	s := creds.NewSecret(value)
	h := holder{Open: s, Pointer: &s, List: []creds.Secret{s}, Map: map[string]creds.Secret{"k": s}, Any: s, hidden: s}
	h.deep.p = &s
	return h
}

// leaks looks for the value in the forms in which fmt and encoders write bytes.
func leaks(out string) string {
	plain := []byte(value)
	decimal := strings.Trim(fmt.Sprint(plain), "[]")
	for _, form := range []string{
		value, fmt.Sprintf("%x", plain), fmt.Sprintf("% x", plain), decimal, strings.ReplaceAll(decimal, " ", ", "),
		base64.StdEncoding.EncodeToString(plain), fmt.Sprintf("%#v", plain), fmt.Sprintf("%o", plain), fmt.Sprintf("%b", plain), fmt.Sprintf("%U", plain),
	} {
		if strings.Contains(strings.ToLower(out), strings.ToLower(form)) {
			return form
		}
	}
	return ""
}

func TestSecretUnderEveryVerb(t *testing.T) {
	t.Parallel()
	if leaks(fmt.Sprintf("%x", value)) == "" || leaks(fmt.Sprintf("%d", []byte(value))) == "" {
		t.Fatal("the test sees no leak where there is one")
	}
	h := newHolder()
	things := map[string]any{
		"secret": h.Open, "pointer": &h.Open, "struct": h, "pointer to struct": &h, "hidden": struct{ s creds.Secret }{h.Open},
		"slice": h.List, "map": h.Map, "array": [1]creds.Secret{h.Open}, "any": []any{h.Open, &h}, "key": map[creds.Secret]int{h.Open: 1},
		"error": fmt.Errorf("login: %v %w", h.Open, errors.New(h.Open.String())), "lease": creds.Lease{Values: h.Map},
	}
	for what, thing := range things {
		for verb := ' '; verb < 127; verb++ {
			for _, flags := range []string{"", "+", "#", " ", "-", "0", "+#", "20", ".3", "20.3"} {
				format := "%" + flags + string(verb)
				if out := fmt.Sprintf(format, thing); leaks(out) != "" {
					t.Errorf("%s under %s: printed as %s", what, format, leaks(out))
				}
			}
		}
		if out := fmt.Sprint(thing) + fmt.Sprintln(thing); leaks(out) != "" {
			t.Errorf("%s: Sprint prints it", what)
		}
	}
	for _, format := range []string{"%v", "%s", "%d", "%x", "%q", "%#v", "%+v", "%5.1f"} {
		if got := fmt.Sprintf(format, h.Open); got != creds.Placeholder {
			t.Errorf("%s: got %q, want %q", format, got, creds.Placeholder)
		}
	}
}

func TestSecretUnderEncoders(t *testing.T) {
	t.Parallel()
	h := newHolder()
	encoders := map[string]func() (string, error){
		"json":        func() (string, error) { b, err := json.Marshal(h); return string(b), err },
		"json indent": func() (string, error) { b, err := json.MarshalIndent(&h, "", " "); return string(b), err },
		"json key": func() (string, error) {
			b, err := json.Marshal(map[creds.Secret]int{h.Open: 1})
			return string(b), err
		},
		"xml": func() (string, error) { b, err := xml.Marshal(h.Open); return string(b), err },
		"xml attribute": func() (string, error) {
			type element struct {
				S creds.Secret `xml:"s,attr"`
			}
			b, err := xml.Marshal(element{h.Open})
			return string(b), err
		},
		"text template": func() (string, error) {
			var b bytes.Buffer
			err := text.Must(text.New("t").Parse(`{{.}} {{.Open}} {{printf "%s %x" .Open .Pointer}}`)).Execute(&b, h)
			return b.String(), err
		},
		"html template": func() (string, error) {
			var b bytes.Buffer
			err := template.Must(template.New("t").Parse(`<script>{{.Open}}</script>{{.Map}}`)).Execute(&b, h)
			return b.String(), err
		},
	}
	for name, encode := range encoders {
		out, err := encode()
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if leaks(out) != "" || !strings.Contains(out, "secret") {
			t.Errorf("%s: got %s, want the placeholder and not the value", name, out)
		}
	}
}

// TestSecretUnderGob: it cannot be encoded, which is as good.
func TestSecretUnderGob(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	err := gob.NewEncoder(&b).Encode(struct{ S creds.Secret }{creds.NewSecret(value)})
	if err == nil || leaks(b.String()+err.Error()) != "" {
		t.Errorf("gob: got %q and %v, want an error and not the value", b.String(), err)
	}
}

func TestSecretUnderSlog(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	options := &slog.HandlerOptions{Level: slog.LevelDebug}
	for _, handler := range []slog.Handler{slog.NewTextHandler(&b, options), slog.NewJSONHandler(&b, options)} {
		h := newHolder()
		slog.New(handler).With("with", h.Open).Info("m", "s", h.Open, "h", h, "p", &h, "l", h.List, "m", h.Map, slog.Group("g", "s", h.Pointer))
	}
	if leaks(b.String()) != "" || !strings.Contains(b.String(), creds.Placeholder) {
		t.Errorf("slog wrote %s, want the placeholder and not the value", b.String())
	}
}

func TestSecretReveals(t *testing.T) {
	t.Parallel()
	if got := creds.NewSecret(value).Reveal(); got != value {
		t.Errorf("Reveal: got %q, want the value", got)
	}
	for want, s := range map[bool][]creds.Secret{true: {{}, creds.NewSecret("")}, false: {creds.NewSecret(" ")}} {
		for _, s := range s {
			if s.IsZero() != want || want && s.Reveal() != "" {
				t.Errorf("IsZero: got %v, want %v", s.IsZero(), want)
			}
		}
	}
	if got := fmt.Sprint(creds.Secret{}); got != creds.Placeholder {
		t.Errorf("empty secret prints as %q: whether there is one is nobody's business", got)
	}
}
