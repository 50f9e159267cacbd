package workflow

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Options are those of a container that mean something here: the ones of
// "docker create" that neither weaken a box nor need a thing that it has not.
type Options struct {
	Health     Health
	Memory     int64 // bytes; 0 is not said. A limit below the plan's counts, one above does not
	MilliCPU   int64
	Pids       int64
	Env        map[string]string
	Entrypoint string
	User       string
	Dir        string
}

// A Health is how a service says that it can be used. Defaults are the engines'.
type Health struct {
	Command     string // run by /bin/sh -c in the service's box; "" is none
	Interval    time.Duration
	Timeout     time.Duration // of one run
	StartPeriod time.Duration // in which a failure does not count
	Retries     int           // failures in a row, at least 1
}

// An option is one that is known. Without set it is accepted and needs nothing:
// what it asks for is so in every box.
type option struct {
	bare bool // it has no value
	set  func(o *Options, value string) error
}

// known are the options that a service may have.
func known() map[string]option {
	return map[string]option{
		"health-cmd":            {set: func(o *Options, v string) error { o.Health.Command = v; return nil }},
		"health-interval":       {set: func(o *Options, v string) error { return span(&o.Health.Interval, v) }},
		"health-timeout":        {set: func(o *Options, v string) error { return span(&o.Health.Timeout, v) }},
		"health-start-period":   {set: func(o *Options, v string) error { return span(&o.Health.StartPeriod, v) }},
		"health-start-interval": {set: func(_ *Options, v string) error { return span(new(time.Duration), v) }}, // it is asked often anyway
		"health-retries":        {set: func(o *Options, v string) error { return retries(&o.Health.Retries, v) }},
		"no-healthcheck":        {bare: true, set: func(o *Options, _ string) error { o.Health.Command = ""; return nil }},
		"memory":                {set: func(o *Options, v string) error { return bytes(&o.Memory, v) }},
		"cpus":                  {set: func(o *Options, v string) error { return cores(&o.MilliCPU, v) }},
		"pids-limit":            {set: func(o *Options, v string) error { return number(&o.Pids, v) }},
		"env":                   {set: variable},
		"entrypoint":            {set: func(o *Options, v string) error { o.Entrypoint = v; return nil }},
		"user":                  {set: func(o *Options, v string) error { o.User = v; return nil }},
		"workdir":               {set: directory},
		"init":                  {bare: true}, // process 1 of a box reaps
		"rm":                    {bare: true}, // nothing of a box is left
		"tmpfs":                 {},           // nothing of a box is left, and its disk is no slower for it
		"expose":                {},           // every port of a service can be reached by its name
		"label":                 {},           // nobody sees it
	}
}

// forContainer are those that a job's own container may have: its process is the
// guest, and its steps are root of the box.
func forContainer() []string {
	return []string{"memory", "cpus", "pids-limit", "env", "user", "init", "rm", "tmpfs", "expose", "label"}
}

// refusals are options whose refusal deserves a reason of its own.
func refusals() map[string]string {
	host := "a box sees nothing of the host"
	network := "a box has no network but its own loopback and its gateway"
	wall := "it would weaken the box"
	return map[string]string{
		"privileged": wall, "cap-add": wall, "security-opt": wall, "userns": wall, "cgroupns": wall, "cgroup-parent": wall,
		"sysctl": wall, "ulimit": wall, "oom-kill-disable": wall, "oom-score-adj": wall, "runtime": "the policy says it", "isolation": "the policy says it",
		"volume": host, "mount": host, "volumes-from": host, "device": host, "device-cgroup-rule": host, "gpus": host,
		"pid": host, "ipc": host, "uts": host, "env-file": host, "cidfile": host,
		"network": network, "net": network, "link": network, "ip": network, "ip6": network, "mac-address": network, "dns": network, "add-host": network,
		"network-alias": "a service is found by its key in services",
		"name":          "a service is found by its key in services",
		"hostname":      "a service is found by its key in services",
		"publish":       `write it under "ports"`, "publish-all": `write it under "ports"`,
		"platform": "a box is of this machine's kind",
	}
}

// letters are the short names.
func letters() map[string]string {
	return map[string]string{"m": "memory", "e": "env", "u": "user", "w": "workdir", "l": "label", "v": "volume", "p": "publish", "P": "publish-all", "h": "hostname", "c": "cpu-shares"}
}

// parseOptions reads the options of a service, or of the job's own container.
// An option that is not known is refused by name.
func parseOptions(text string, own bool) (Options, error) {
	o := Options{Env: map[string]string{}, Health: Health{Interval: 30 * time.Second, Timeout: 30 * time.Second, Retries: 3}}
	words, err := splitWords(text)
	if err != nil {
		return o, err
	}
	options := known()
	if own {
		maps.DeleteFunc(options, func(name string, _ option) bool { return !slices.Contains(forContainer(), name) })
	}
	for len(words) > 0 {
		name, value, given := cutOption(words[0])
		words = words[1:]
		if name == "" {
			return o, errors.New("an option begins with -, and what belongs to one needs quotes around it")
		}
		opt, ok := options[name]
		if !ok {
			return o, refuse(name, options)
		}
		switch {
		case opt.bare && given:
			if value != "true" {
				return o, fmt.Errorf("option --%s: it has no value", name)
			}
		case !opt.bare && !given:
			if len(words) == 0 {
				return o, fmt.Errorf("option --%s: its value is missing", name)
			}
			value, words = words[0], words[1:]
		}
		if opt.set == nil {
			continue
		}
		if err := opt.set(&o, value); err != nil {
			return o, fmt.Errorf("option --%s: %w", name, err)
		}
	}
	if own && o.User != "" && o.User != "root" && o.User != "0" && o.User != "0:0" && o.User != "root:root" {
		return o, errors.New("option --user: steps run as root of their box, who is nobody outside of it; remove it")
	}
	return o, nil
}

func refuse(name string, options map[string]option) error {
	if why, ok := refusals()[name]; ok {
		return fmt.Errorf("option --%s is refused: %s", name, why)
	}
	if _, ok := known()[name]; ok {
		return fmt.Errorf("option --%s is for services", name)
	}
	return fmt.Errorf("option --%s is not supported; these are: %s", excerpt(name), strings.Join(slices.Sorted(maps.Keys(options)), ", "))
}

// cutOption splits --name=value, --name, -mVALUE and -m. The name is "" of what
// is no option.
func cutOption(word string) (name, value string, given bool) {
	if long, ok := strings.CutPrefix(word, "--"); ok {
		return cutLong(long)
	}
	if len(word) < 2 || word[0] != '-' {
		return "", "", false
	}
	name, ok := letters()[word[1:2]]
	if !ok {
		name = word[1:2]
	}
	value, _ = strings.CutPrefix(word[2:], "=")
	return name, value, len(word) > 2
}

func cutLong(word string) (name, value string, given bool) {
	name, value, given = strings.Cut(word, "=")
	if name == "" {
		name = "-" // so that it is refused by what stands there
	}
	return name, value, given
}

// splitWords cuts a command line as a shell does, without its expansions.
func splitWords(text string) ([]string, error) {
	var words []string
	var word strings.Builder
	begun, quote := false, rune(0)
	escaped := false
	for _, r := range text {
		switch {
		case escaped:
			if quote == '"' && r != '"' && r != '\\' && r != '$' {
				word.WriteByte('\\')
			}
			word.WriteRune(r)
			escaped = false
		case r == '\\' && quote != '\'':
			begun, escaped = true, true
		case quote != 0 && r == quote:
			quote = 0
		case quote != 0:
			word.WriteRune(r)
		case r == '"' || r == '\'':
			begun, quote = true, r
		case r == ' ' || r == '\t' || r == '\n' || r == '\r':
			if begun {
				words = append(words, word.String())
			}
			word.Reset()
			begun = false
		default:
			begun = true
			word.WriteRune(r)
		}
	}
	if quote != 0 || escaped {
		return nil, errors.New("a quote is not closed")
	}
	if begun {
		words = append(words, word.String())
	}
	return words, nil
}

// span reads a duration as engines do.
func span(to *time.Duration, v string) error {
	d, err := time.ParseDuration(v)
	if err != nil || d < 0 || d > 24*time.Hour {
		return fmt.Errorf("%q is not a duration up to a day: write 10s or 1m", excerpt(v))
	}
	*to = d
	return nil
}

func retries(to *int, v string) error {
	var n int64
	if err := number(&n, v); err != nil {
		return err
	}
	*to = int(min(n, 1<<20))
	return nil
}

func number(to *int64, v string) error {
	n, err := strconv.ParseInt(v, 10, 32)
	if err != nil || n < 1 {
		return fmt.Errorf("%q is not a whole number from 1", excerpt(v))
	}
	*to = n
	return nil
}

// bytes reads a size as engines do: 512m, 1g; the units are binary.
func bytes(to *int64, v string) error {
	digits := strings.TrimRight(strings.ToLower(v), "bikmgt")
	shift, ok := map[string]uint{"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40}[strings.TrimSuffix(strings.TrimSuffix(strings.ToLower(v[len(digits):]), "b"), "i")]
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || !ok || n < 1 || n > math.MaxInt64>>shift {
		return fmt.Errorf("%q is not a size: write 512m or 1g", excerpt(v))
	}
	*to = n << shift
	return nil
}

func cores(to *int64, v string) error {
	f, err := strconv.ParseFloat(v, 64)
	if err != nil || !(f >= 0.001 && f <= 1024) {
		return fmt.Errorf("%q is not a number of cores", excerpt(v))
	}
	*to = int64(f * 1000)
	return nil
}

func variable(o *Options, v string) error {
	name, value, given := strings.Cut(v, "=")
	if !given || !validName(name) {
		return errors.New("write NAME=VALUE")
	}
	o.Env[name] = value
	return nil
}

func directory(o *Options, v string) error {
	if !strings.HasPrefix(v, "/") {
		return fmt.Errorf("%q is not absolute", excerpt(v))
	}
	o.Dir = v
	return nil
}
