package strict

import (
	"encoding"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v4"
)

// A NodeDecoder is a type that reads its part of a file itself. Its errors
// should be made with Errorf of the node that is wrong.
type NodeDecoder interface {
	DecodeNode(n Node) error
}

// Decode stores the part in what into points to and reports every problem.
//
// A struct takes the keys that its fields name with a tag `yaml:"key"`; a field
// without a tag is no part of the file and stays as it is. `yaml:"key,required"`
// must be there. A field of type Node keeps its part for later; one with the
// tag `yaml:",self"` gets the whole mapping, for positions; the fields of a struct
// with `yaml:",inline"` count as if they stood there. Other types: text,
// true/false, whole numbers, time.Duration as "10m", slices, pointers, maps
// with text keys, and what implements NodeDecoder or encoding.TextUnmarshaler
// (which gets the text of the scalar). An absent key, and an empty list or
// mapping, leave the field as it was; an empty scalar is an error.
func (n Node) Decode(into any) error {
	v := reflect.ValueOf(into)
	if v.Kind() != reflect.Pointer || v.IsNil() {
		return fmt.Errorf("decode: want a pointer, got %T", into)
	}
	return Join(n.decode(v.Elem()))
}

func (n Node) decode(v reflect.Value) error {
	if v.Type() == reflect.TypeFor[Node]() {
		v.Set(reflect.ValueOf(n))
		return nil
	}
	if v.Kind() == reflect.Pointer {
		if v.IsNil() {
			v.Set(reflect.New(v.Type().Elem()))
		}
		return n.decode(v.Elem())
	}
	switch p := v.Addr().Interface().(type) {
	case NodeDecoder:
		return n.locate(p.DecodeNode(n))
	case *time.Duration:
		return n.duration(p)
	case encoding.TextUnmarshaler:
		return n.text(p)
	}
	switch v.Kind() {
	case reflect.Struct:
		return n.structure(v)
	case reflect.Map:
		return n.mapping(v)
	case reflect.Slice:
		return n.list(v)
	}
	return n.basic(v)
}

// locate gives an error without a place the place of the node.
func (n Node) locate(err error) error {
	if err == nil || place(err) != (Pos{}) {
		return err
	}
	return &Error{n.Pos(), err}
}

func (n Node) wrong(want string) error {
	if n.isNull() {
		return n.Errorf("value is empty: want %s", want)
	}
	return n.Errorf("want %s, got %s", want, n.kind())
}

func (n Node) text(p encoding.TextUnmarshaler) error {
	if n.isNull() || n.y.Kind != yaml.ScalarNode {
		return n.wrong("text")
	}
	return n.locate(p.UnmarshalText([]byte(n.y.Value)))
}

func (n Node) duration(p *time.Duration) error {
	if n.isNull() || n.y.Kind != yaml.ScalarNode {
		return n.wrong("a duration such as 90s, 10m or 1h30m")
	}
	d, err := time.ParseDuration(n.y.Value)
	if err != nil {
		return n.Errorf("%q is not a duration: write 90s, 10m or 1h30m", n.y.Value)
	}
	*p = d
	return nil
}

func (n Node) basic(v reflect.Value) error {
	is := func(tag string) bool { return n.y != nil && n.y.Kind == yaml.ScalarNode && n.y.Tag == tag }
	switch v.Kind() {
	case reflect.String:
		if is("!!int") || is("!!float") || is("!!bool") || is("!!timestamp") {
			return n.Errorf("want text, got %s: put it in quotes", n.kind())
		}
		if !is("!!str") {
			return n.wrong("text")
		}
		v.SetString(n.y.Value)
	case reflect.Bool:
		if !is("!!bool") {
			return n.wrong("true or false")
		}
		v.SetBool(strings.EqualFold(n.y.Value, "true"))
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		i, err := strconv.ParseInt(n.Text(), 10, v.Type().Bits())
		if err != nil || !is("!!int") || strconv.FormatInt(i, 10) != n.Text() {
			return n.wrong("a whole number in decimal" + outOf(err))
		}
		v.SetInt(i)
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		u, err := strconv.ParseUint(n.Text(), 10, v.Type().Bits())
		if err != nil || !is("!!int") || strconv.FormatUint(u, 10) != n.Text() {
			return n.wrong("a whole number in decimal, not negative" + outOf(err))
		}
		v.SetUint(u)
	default:
		return n.Errorf("a value of type %s cannot be read from a file", v.Type())
	}
	return nil
}

func outOf(err error) string {
	if e, ok := err.(*strconv.NumError); ok && e.Err == strconv.ErrRange {
		return " and in range"
	}
	return ""
}

func (n Node) list(v reflect.Value) error {
	if n.isNull() {
		return nil
	}
	if n.y.Kind != yaml.SequenceNode {
		return n.wrong("a list")
	}
	items := n.Items()
	out := reflect.MakeSlice(v.Type(), len(items), len(items))
	var errs []error
	for i, item := range items {
		errs = append(errs, item.decode(out.Index(i)))
	}
	v.Set(out)
	return errors.Join(errs...)
}

func (n Node) mapping(v reflect.Value) error {
	if n.isNull() {
		return nil
	}
	if n.y.Kind != yaml.MappingNode {
		return n.wrong("a mapping")
	}
	out := reflect.MakeMap(v.Type())
	var errs []error
	for k, c := range n.pairs() {
		key, val := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
		errs = append(errs, k.decode(key), c.decode(val))
		out.SetMapIndex(key, val)
	}
	v.Set(out)
	return errors.Join(errs...)
}

func (n Node) structure(v reflect.Value) error {
	if !n.isNull() && n.y.Kind != yaml.MappingNode {
		return n.wrong("a mapping")
	}
	f := fields{values: map[string]reflect.Value{}}
	f.collect(n, v)
	required := f.required
	var errs []error
	for k, c := range n.pairs() {
		field, ok := f.values[k.y.Value]
		if !ok {
			errs = append(errs, k.Errorf("unknown key %q (known: %s)", k.y.Value, strings.Join(f.known, ", ")))
			continue
		}
		required = slices.DeleteFunc(required, func(r string) bool { return r == k.y.Value })
		errs = append(errs, c.decode(field))
	}
	for _, r := range required {
		errs = append(errs, n.Errorf("key %q is missing", r))
	}
	return errors.Join(errs...)
}

// fields are those of a struct that keys of a mapping are stored in.
type fields struct {
	values          map[string]reflect.Value
	known, required []string
}

func (f *fields) collect(n Node, v reflect.Value) {
	for i := range v.NumField() {
		name, option, _ := strings.Cut(v.Type().Field(i).Tag.Get("yaml"), ",")
		switch {
		case option == "self":
			v.Field(i).Set(reflect.ValueOf(n))
		case option == "inline":
			f.collect(n, v.Field(i))
		case name != "" && name != "-":
			f.values[name] = v.Field(i)
			f.known = append(f.known, name)
			if option == "required" {
				f.required = append(f.required, name)
			}
		}
	}
}
