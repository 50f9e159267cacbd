// Package configs reads the agent's configuration file.
//
// It knows what every agent has and splits the rest into named sections, which
// it hands, strict and with their places in the file, to whoever owns them:
// the command, which alone knows the implementations. Everything is optional
// but the policy and the providers, and what is not said is the safe choice.
//
// A secret is never in the file, only the name of a file that holds it. The
// examples beside this package are loaded by its tests.
package configs

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/configs/strict"
)

// Version is the only version of the file that this agent understands.
const Version = 1

// MaxSlots bounds how many jobs run at once, those whose boxes are kept and boxes
// that are ready for jobs included: the native runtime has a range of user ids
// for each.
const MaxSlots = 1024

// defaultKeep is one box to look at and one that fails meanwhile.
const defaultKeep = 2

// A Config is a configuration file. All paths in it are absolute, or relative
// to the working directory if the name of the file was.
type Config struct {
	State   string        // directory of the journal, the audit and the keys
	Slots   int           // jobs at once, at least 1
	Keep    int           // boxes of failed jobs that may be kept at once; 0 is none
	Policy  string        // policy file, "" only in a Default
	Drain   time.Duration // how long the first SIGTERM waits for running jobs; 0 is until they end
	Log     Log
	Quotas  Quotas
	Warm    Warm
	Monitor Monitor

	Providers map[string]Section
	Runtimes  map[string]Section // the key "sandbox"
	Issuers   map[string]Section
	Ways
	GitCache GitCache // the key "git_cache"

	node strict.Node
}

// Ways are those out of the machine: of the jobs, and of the agent itself.
type Ways struct {
	Gateway  Section
	Outbound Section
}

type waysNode struct {
	Gateway  strict.Node `yaml:"gateway"`
	Outbound strict.Node `yaml:"outbound"`
}

// A Log says what the operator's log looks like.
type Log struct {
	Level  string // debug, info, warn, error
	Format string // json, console
}

// Default is the configuration of a machine without a file: one job at a time
// in the native runtime, no providers, no issuers, and no policy.
func Default(state string) *Config {
	return &Config{
		State: state, Slots: 1, Keep: defaultKeep, Log: Log{Level: "info", Format: "json"},
		Runtimes: map[string]Section{"native": {Type: "native"}},
	}
}

// The shape of the file.
type file struct {
	Version   int                   `yaml:"version,required"`
	State     string                `yaml:"state"`
	Slots     *int                  `yaml:"slots"`
	Keep      *int                  `yaml:"keep"`
	Policy    string                `yaml:"policy,required"`
	Drain     *time.Duration        `yaml:"drain"`
	Providers map[name]*sectionNode `yaml:"providers,required"`
	Sandbox   map[name]*sectionNode `yaml:"sandbox"`
	Issuers   map[name]*sectionNode `yaml:"issuers"`
	Ways      waysNode              `yaml:",inline"`
	GitCache  *gitNode              `yaml:"git_cache"`
	Quotas    *quotasNode           `yaml:"quotas"`
	Warm      *warmNode             `yaml:"warm"`
	Monitor   *monitorNode          `yaml:"monitor"`
	Log       logNode               `yaml:"log"`
}

type logNode struct {
	Level  oneWord `yaml:"level"`
	Format oneWord `yaml:"format"`
}

// DefaultState is where the agent keeps what it owes and what it did.
const DefaultState = "/var/lib/mayfly"

// Load reads the file at path. Every problem of the file is reported, each as
// file:line:column. It does not look at the machine: Validate does.
func Load(path string) (*Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	src, err := io.ReadAll(io.LimitReader(f, strict.MaxSize+1))
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	return Parse(src, path)
}

// Parse is Load for a file that is already in memory. path is its name, for
// positions and for the paths in it.
func Parse(src []byte, path string) (*Config, error) {
	root, err := strict.Parse(src, path)
	if err != nil {
		return nil, err
	}
	var f file
	if err := root.Get("version").Decode(&f.Version); err == nil && f.Version != Version {
		return nil, root.Get("version").Errorf("version %d is not supported: this agent reads version: %d", f.Version, Version)
	}
	errs := []error{root.Decode(&f), inlineSecrets(root)}
	c := Default(DefaultState)
	c.node = root
	errs = append(errs, c.fill(f))
	if err := strict.Join(errs...); err != nil {
		return nil, err
	}
	return c, nil
}

// fill takes what the file says and checks what depends on a value.
func (c *Config) fill(f file) error {
	var errs []error
	wrong := func(key, format string, args ...any) {
		errs = append(errs, c.node.At(key).Errorf(format, args...))
	}
	dir := filepath.Dir(c.node.Pos().File)
	c.Policy = resolve(dir, f.Policy)
	if f.Policy == "" && !c.node.Get("policy").IsZero() {
		wrong("policy", "name of the policy file is empty")
	}
	if !c.node.Get("state").IsZero() {
		c.State = resolve(dir, f.State)
		if f.State == "" {
			wrong("state", "name of the state directory is empty")
		}
	}
	if f.Slots != nil {
		c.Slots = *f.Slots
		if c.Slots < 1 || c.Slots > MaxSlots {
			wrong("slots", "%d is out of range: 1 to %d", c.Slots, MaxSlots)
		}
	}
	c.Keep = max(0, min(c.Keep, MaxSlots-c.Slots))
	if f.Keep != nil {
		if *f.Keep < 0 || *f.Keep > max(0, MaxSlots-c.Slots) {
			wrong("keep", "%d is out of range: 0 to %d, so that with the slots there are at most %d", *f.Keep, max(0, MaxSlots-c.Slots), MaxSlots)
		}
		c.Keep = *f.Keep
	}
	if f.Drain != nil {
		c.Drain = *f.Drain
		if c.Drain <= 0 {
			wrong("drain", "%s is out of range: write more than 0s, or remove the key to wait until the jobs end", c.Drain)
		}
	}
	if len(f.Providers) == 0 && !c.node.Get("providers").IsZero() {
		wrong("providers", "no providers: the agent would have nobody to ask for jobs")
	}
	log := c.node.Get("log")
	errs = append(errs,
		f.Log.Level.choose(&c.Log.Level, log.At("level"), "debug", "info", "warn", "error"),
		f.Log.Format.choose(&c.Log.Format, log.At("format"), "json", "console"))
	c.Providers, c.Issuers = sections(f.Providers), sections(f.Issuers)
	if runtimes := sections(f.Sandbox); len(runtimes) > 0 {
		c.Runtimes = runtimes
	}
	c.Ways = Ways{Gateway: Section{node: f.Ways.Gateway}, Outbound: Section{node: f.Ways.Outbound}}
	errs = append(errs, f.Quotas.fill(&c.Quotas), f.Warm.fill(&c.Warm), f.Monitor.fill(&c.Monitor), f.GitCache.fill(dir, &c.GitCache))
	return strict.Join(errs...)
}

// oneWord is text of which only some words are allowed.
type oneWord string

func (w oneWord) choose(into *string, n strict.Node, words ...string) error {
	if w == "" {
		return nil
	}
	if !slices.Contains(words, string(w)) {
		return n.Errorf("unknown word %q (known: %s)", string(w), strings.Join(words, ", "))
	}
	*into = string(w)
	return nil
}

// name is the name of a section. It stands in the names of what the agent
// makes and in the rules of the policy.
type name string

func (n *name) UnmarshalText(b []byte) error {
	*n = name(b)
	if ok, err := regexp.Match(`^[a-z][a-z0-9-]{0,62}$`, b); err != nil || !ok {
		return fmt.Errorf("%q is not a name: write lower-case letters, digits and -", b)
	}
	return nil
}

// resolve makes a path relative to the file that names it.
func resolve(dir, path string) string {
	if path == "" || filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(dir, path)
}
