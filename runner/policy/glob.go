package policy

import (
	"errors"
	"fmt"
	"strings"

	"github.com/mayfly-ci/mayfly/configs/strict"
)

// A glob matches the whole of a text. "*" stands for any run of characters
// other than "/", "**" for any run at all, the empty one included. Everything
// else stands for itself, and case counts.
type glob string

// maxGlob bounds a pattern: matching costs its length times the text's.
const maxGlob = 256

func (g *glob) UnmarshalText(b []byte) error {
	text := string(b)
	switch {
	case text == "":
		return errors.New("pattern is empty and matches nothing: remove the key to match anything")
	case len(text) > maxGlob:
		return fmt.Errorf("pattern is longer than %d bytes", maxGlob)
	case strings.Contains(text, "***"):
		return fmt.Errorf("pattern %q: *** means nothing: write * for one segment or ** for any number", text)
	case strings.ContainsAny(text, `?[]{}!\`):
		return fmt.Errorf(`pattern %q: only * and ** are special, and ? [ ] { } ! \ are not allowed: list the cases`, text)
	}
	for _, r := range text {
		if r < ' ' || r == 0x7f {
			return fmt.Errorf("pattern %q holds a control character", text)
		}
	}
	*g = glob(text)
	return nil
}

// match walks the pattern over the text with the set of places in the text
// that can be reached so far, so that no pattern takes exponential time.
func (g glob) match(text string) bool {
	at := make([]bool, len(text)+1)
	at[0] = true
	for p := string(g); p != ""; {
		switch {
		case strings.HasPrefix(p, "**"):
			p = p[2:]
			spread(at, text, "")
		case p[0] == '*':
			p = p[1:]
			spread(at, text, "/")
		default:
			for i := len(text); i > 0; i-- {
				at[i] = at[i-1] && text[i-1] == p[0]
			}
			at[0] = false
			p = p[1:]
		}
	}
	return at[len(text)]
}

// spread adds every place that is reached without passing a byte of stop.
func spread(at []bool, text, stop string) {
	for i := range len(text) {
		if at[i] && strings.IndexByte(stop, text[i]) < 0 {
			at[i+1] = true
		}
	}
}

// oneOf is a glob or a list of them. An absent key is nil and matches anything;
// a list that is there and empty is an error, because it reads as "nothing".
type oneOf []glob

// DecodeNode implements strict.NodeDecoder.
func (o *oneOf) DecodeNode(n strict.Node) error {
	list, err := listOf[glob](n)
	*o = list
	return err
}

// tiers is one trust tier or a list of them. Tiers are named, never matched:
// a new one must not be let in by a pattern of yesterday.
type tiers []tier

// DecodeNode implements strict.NodeDecoder.
func (t *tiers) DecodeNode(n strict.Node) error {
	list, err := listOf[tier](n)
	*t = list
	return err
}

func listOf[T any](n strict.Node) ([]T, error) {
	items := n.Items()
	if len(items) == 0 {
		return nil, n.Errorf("empty list: name a value, or remove the key")
	}
	list := make([]T, len(items))
	var errs []error
	for i, item := range items {
		errs = append(errs, item.Decode(&list[i]))
	}
	return list, strict.Join(errs...)
}

func (o oneOf) match(text string) bool {
	for _, g := range o {
		if g.match(text) {
			return true
		}
	}
	return o == nil
}

func (t tiers) match(text string) bool {
	for _, one := range t {
		if string(one) == text {
			return true
		}
	}
	return false
}

func texts[T ~string](list []T) []string {
	out := make([]string, len(list))
	for i, v := range list {
		out[i] = string(v)
	}
	return out
}

// A Pattern is a pattern of the policy language on its own, for what is said of
// repositories outside of a policy: the agent's quotas.
type Pattern struct{ glob glob }

// ParsePattern reads a pattern as a rule of a policy would.
func ParsePattern(text string) (Pattern, error) {
	var p Pattern
	err := p.glob.UnmarshalText([]byte(text))
	return p, err
}

// Match reports whether the pattern stands for the whole of text.
func (p Pattern) Match(text string) bool { return p.glob.match(text) }
