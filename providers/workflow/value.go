package workflow

import (
	"encoding/json"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/mayfly-ci/mayfly/creds"
)

// An object is a map with string keys, an array a slice. They are read through
// reflection and not copied: a context can be large and an expression mostly
// wants one value of it.
type (
	object struct{ v reflect.Value }
	array  struct {
		v        reflect.Value
		filtered bool // made by .*, so that what follows applies to each item
	}
)

// canonical turns a Go value into a value of the language. It is the only
// place of the package where a secret is revealed: an expression can do
// anything with it, and what comes out goes into the job, as it was asked to.
func (ev *evaluator) canonical(v any) any {
	switch v := v.(type) {
	case nil, bool, float64, string, object, array:
		return v
	case creds.Secret:
		return v.Reveal()
	case json.Number:
		return parseNumber(v.String())
	}
	r := reflect.ValueOf(v)
	switch r.Kind() {
	case reflect.Bool:
		return r.Bool()
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		return float64(r.Int())
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return float64(r.Uint())
	case reflect.Float32:
		return r.Float()
	case reflect.String:
		return r.String()
	case reflect.Slice:
		return array{v: r}
	case reflect.Map:
		if r.Type().Key().Kind() == reflect.String {
			return object{v: r}
		}
	}
	ev.fail(fmt.Errorf("context: a value of the type %T cannot be used in an expression", v))
	return nil
}

func (a array) len() int { return a.v.Len() }

func (ev *evaluator) item(a array, i int) any { return ev.canonical(a.v.Index(i).Interface()) }

// keys are sorted: Go's maps keep no order, and an evaluation should not
// depend on chance. GitHub keeps the order of insertion.
func (o object) keys() []string {
	keys := make([]string, 0, o.v.Len())
	for _, k := range o.v.MapKeys() {
		keys = append(keys, k.String())
	}
	slices.Sort(keys)
	return keys
}

// property looks a key up: as written, which tells http_proxy from HTTP_PROXY,
// else in any case, as GitHub does.
func (ev *evaluator) property(o object, key string) (any, bool) {
	if v := o.v.MapIndex(reflect.ValueOf(key).Convert(o.v.Type().Key())); v.IsValid() {
		return ev.canonical(v.Interface()), true
	}
	ev.charge(o.v.Len() * itemCost)
	for _, k := range o.keys() {
		if compareFold(k, key) == 0 {
			v := o.v.MapIndex(reflect.ValueOf(k).Convert(o.v.Type().Key()))
			return ev.canonical(v.Interface()), true
		}
	}
	return nil, false
}

func truthy(v any) bool {
	switch v := v.(type) {
	case nil:
		return false
	case bool:
		return v
	case float64:
		return v != 0 && !math.IsNaN(v)
	case string:
		return v != ""
	default:
		return true
	}
}

func primitive(v any) bool {
	switch v.(type) {
	case object, array, map[string]any, []any:
		return false
	default:
		return true
	}
}

func toNumber(v any) float64 {
	switch v := v.(type) {
	case nil:
		return 0
	case bool:
		if v {
			return 1
		}
		return 0
	case float64:
		return v
	case string:
		return parseNumber(v)
	default:
		return math.NaN()
	}
}

// parseNumber reads a number as JavaScript's Number() does. What Go accepts
// beyond that (underscores, "inf", hexadecimal floats) is not a number.
func parseNumber(s string) float64 {
	s = strings.TrimSpace(s)
	switch {
	case s == "":
		return 0
	case s == "Infinity":
		return math.Inf(1)
	case s == "-Infinity":
		return math.Inf(-1)
	case strings.HasPrefix(s, "0x"), strings.HasPrefix(s, "0o"):
		n, err := strconv.ParseInt(s, 0, 33) // 32 bits without a sign
		if err != nil || strings.Contains(s, "_") {
			return math.NaN()
		}
		if n > math.MaxInt32 {
			n -= 1 << 32 // GitHub reads 32 bits with a sign
		}
		return float64(n)
	case strings.Trim(s, "+-.0123456789eE") != "":
		return math.NaN()
	}
	f, err := strconv.ParseFloat(s, 64)
	if err != nil && !math.IsInf(f, 0) {
		return math.NaN()
	}
	return f
}

func toString(v any) string {
	switch v := v.(type) {
	case nil:
		return ""
	case bool:
		return strconv.FormatBool(v)
	case float64:
		return formatNumber(v)
	case string:
		return v
	case array:
		return "Array"
	default:
		return "Object"
	}
}

// formatNumber is .NET's format "G15", which is what GitHub prints.
func formatNumber(f float64) string {
	switch {
	case math.IsInf(f, 1):
		return "Infinity"
	case math.IsInf(f, -1):
		return "-Infinity"
	case f == 0:
		return "0" // and not -0
	}
	return strconv.FormatFloat(f, 'G', 15, 64)
}

// compareFold orders strings without regard to case, rune by rune in upper
// case, which is .NET's OrdinalIgnoreCase.
func compareFold(a, b string) int {
	for a != "" && b != "" {
		x, n := firstUpper(a)
		y, m := firstUpper(b)
		if x != y {
			return int(x) - int(y)
		}
		a, b = a[n:], b[m:]
	}
	return len(a) - len(b)
}

func firstUpper(s string) (rune, int) {
	r, n := utf8.DecodeRuneInString(s)
	return upper(r), n
}

// upper keeps a letter outside ASCII there: the dotless ı is not an i.
func upper(r rune) rune {
	if u := unicode.ToUpper(r); r < utf8.RuneSelf || u >= utf8.RuneSelf {
		return u
	}
	return r
}

// equal is GitHub's loose equality: kinds that differ are compared as numbers,
// strings without regard to case, NaN equals nothing, and objects and arrays
// are equal only if they are the same one.
func equal(x, y any) bool {
	switch x := x.(type) {
	case object:
		y, ok := y.(object)
		return ok && x.v.Pointer() == y.v.Pointer()
	case array:
		y, ok := y.(array)
		return ok && x.len() == y.len() && x.v.Pointer() == y.v.Pointer()
	case string:
		if y, ok := y.(string); ok {
			return compareFold(x, y) == 0
		}
	}
	return toNumber(x) == toNumber(y) // an object or array is NaN
}

// less is the order under the same rules: what cannot be compared is neither
// less nor greater.
func less(x, y any) bool {
	if x, ok := x.(string); ok {
		if y, ok := y.(string); ok {
			return compareFold(x, y) < 0
		}
	}
	return toNumber(x) < toNumber(y)
}
