package policy

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/configs/strict"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// The values of a policy file. Each reads its own text and refuses all that it
// does not know, so that a slip of the pen is an error and not a grant.

// size is a number of bytes.
type size = strict.Size

// count is a whole number from 1.
type count int64

func (c *count) UnmarshalText(b []byte) error {
	n, err := natural(string(b))
	if err != nil {
		return fmt.Errorf("%q is not a whole number from 1", b)
	}
	*c = count(n)
	return nil
}

func natural(digits string) (int64, error) {
	if digits == "" || strings.Trim(digits, "0123456789") != "" || digits[0] == '0' {
		return 0, errors.New("not a natural number")
	}
	return strconv.ParseInt(digits, 10, 64)
}

// cores is thousandths of a processor core, written as cores: 2, 0.5.
type cores int64

const maxCores = 1024

func (c *cores) UnmarshalText(b []byte) error {
	whole, frac, point := strings.Cut(string(b), ".")
	milli, err := strconv.ParseUint(whole+(frac + "000")[:3], 10, 32)
	switch {
	case err != nil || whole == "" || len(frac) > 3 || point && frac == "",
		milli < 1, milli > maxCores*1000:
		return fmt.Errorf("%q is not a number of cores: write 0.001 to %d, such as 2 or 0.5", b, maxCores)
	}
	*c = cores(milli)
	return nil
}

// span is a duration that bounds something, so neither 0 nor for ever.
type span time.Duration

// maxSpan is the longest that a job may run: a week, which is longer than any
// build and shorter than any rotation of credentials that deserves its name.
const maxSpan = 7 * 24 * time.Hour

func (s *span) UnmarshalText(b []byte) error {
	d, err := duration(b, maxSpan)
	*s = span(d)
	return err
}

func duration(b []byte, most time.Duration) (time.Duration, error) {
	d, err := time.ParseDuration(string(b))
	if err != nil {
		return 0, fmt.Errorf("%q is not a duration: write 90s, 10m or 1h30m", b)
	}
	if d < time.Second || d > most {
		return 0, fmt.Errorf("%s is out of range: 1s to %s", b, most)
	}
	return d, nil
}

// keepSpan is how long a box is kept for somebody to look at.
type keepSpan time.Duration

// maxKeep is a day: a failure of the evening can be looked at in the morning.
// Whoever needs longer wants a copy and not a box.
const maxKeep = 24 * time.Hour

func (k *keepSpan) UnmarshalText(b []byte) error {
	d, err := duration(b, maxKeep)
	*k = keepSpan(d)
	return err
}

type port uint16

func (p *port) UnmarshalText(b []byte) error {
	n, err := natural(string(b))
	if err != nil || n > math.MaxUint16 {
		return fmt.Errorf("%q is not a port: write 1 to 65535", b)
	}
	*p = port(n)
	return nil
}

type protocol egress.Protocol

func (p *protocol) UnmarshalText(b []byte) error {
	if !slices.Contains([]egress.Protocol{egress.TCP, egress.TLS, egress.HTTP, egress.HTTPS, egress.SSH, egress.Postgres}, egress.Protocol(b)) {
		return fmt.Errorf("unknown protocol %q (known: tcp, tls, http, https, and in login: of a lease ssh, postgres)", b)
	}
	*p = protocol(b)
	return nil
}

// runtime is a name of the agent's configuration, which alone knows them all.
type runtime string

func (r *runtime) UnmarshalText(b []byte) error {
	*r = runtime(b)
	return word(b, "the name of a runtime", `[a-z][a-z0-9-]{0,62}`)
}

// image names what a box has below it, for runtimes with images: a tag, a
// digest or an id.
type image string

func (i *image) UnmarshalText(b []byte) error {
	*i = image(b)
	return word(b, "an image", `[A-Za-z0-9][A-Za-z0-9._/:@-]{0,254}`)
}

// mode says what becomes of what no rule allows. Refusal has no word: it is what
// is left when there is none.
type mode string

func (m *mode) UnmarshalText(b []byte) error {
	if string(b) != egress.ModeAudit {
		return fmt.Errorf("unknown mode %q (known: audit, which lets the job reach any name and writes it down; without the key egress is enforced)", b)
	}
	*m = mode(b)
	return nil
}

// isolation is the wall of a box.
type isolation sandbox.Isolation

func (i *isolation) UnmarshalText(b []byte) error {
	walls := map[string]sandbox.Isolation{"kernel": sandbox.Kernel, string(sandbox.GVisor): sandbox.GVisor}
	wall, ok := walls[string(b)]
	if !ok {
		return fmt.Errorf("unknown isolation %q (known: kernel, gvisor)", b)
	}
	*i = isolation(wall)
	return nil
}

// delivery is what a job has of its provider's token.
type delivery Delivery

func (d *delivery) UnmarshalText(b []byte) error {
	*d = delivery(b)
	return oneWord(b, "word for the provider's token", string(Brokered), string(Clear), string(Withheld))
}

type tier providers.Trust

func (t *tier) UnmarshalText(b []byte) error {
	known := []providers.Trust{
		providers.TrustFork, providers.TrustBranch, providers.TrustTag, providers.TrustProtected,
		providers.TrustEnvironment, providers.TrustLocal,
	}
	if !slices.Contains(known, providers.Trust(b)) {
		return fmt.Errorf("unknown trust %q (known: fork, branch, tag, protected, environment, local)", b)
	}
	*t = tier(b)
	return nil
}

// prefix is an address or a CIDR. An address is a prefix of itself alone.
type prefix netip.Prefix

func (p *prefix) UnmarshalText(b []byte) error {
	if a, err := netip.ParseAddr(string(b)); err == nil && a.Zone() == "" && !a.Is4In6() {
		*p = prefix(netip.PrefixFrom(a, a.BitLen()))
		return nil
	}
	cidr, err := netip.ParsePrefix(string(b))
	if err != nil || cidr.Addr().Is4In6() {
		return fmt.Errorf("%q is not an address or CIDR: write 10.1.2.3 or 10.1.0.0/16", b)
	}
	if cidr != cidr.Masked() {
		return fmt.Errorf("%s has bits behind its mask: write %s", b, cidr.Masked())
	}
	*p = prefix(cidr)
	return nil
}

// word checks text against a pattern and says the pattern when it fails.
func word(b []byte, what string, re string) error {
	if ok, err := regexp.Match("^(?:"+re+")$", b); err != nil || !ok {
		return fmt.Errorf("%q is not %s: it must match %s", b, what, re)
	}
	return nil
}

type ruleName string

func (r *ruleName) UnmarshalText(b []byte) error {
	*r = ruleName(b)
	return word(b, "the name of a rule", `[a-z][a-z0-9-]{0,62}`)
}

type leaseName string

func (l *leaseName) UnmarshalText(b []byte) error {
	*l = leaseName(b)
	return word(b, "the name of a lease", `[a-z][a-z0-9-]{0,15}`)
}

type issuerName string

func (i *issuerName) UnmarshalText(b []byte) error {
	*i = issuerName(b)
	return word(b, "the name of an issuer", `[a-z][a-z0-9-]{0,62}`)
}

// stepID is the id of a step, as GitHub spells it (workflow syntax,
// jobs.<job_id>.steps[*].id).
type stepID string

func (s *stepID) UnmarshalText(b []byte) error {
	*s = stepID(b)
	return word(b, "the id of a step", `[A-Za-z_][A-Za-z0-9_-]{0,99}`)
}

// field names a value or fact of a lease.
type field string

func (f *field) UnmarshalText(b []byte) error {
	*f = field(b)
	return word(b, "the name of a value or fact", `[a-z][a-z0-9_-]{0,31}`)
}

// fileName is one file below the directory of secrets. It is no path, so that
// nothing can climb out.
type fileName string

func (f *fileName) UnmarshalText(b []byte) error {
	*f = fileName(b)
	return word(b, "a file name (one name, no directories)", `[A-Za-z0-9_][A-Za-z0-9._-]{0,63}`)
}

type purpose string

func (p *purpose) UnmarshalText(b []byte) error {
	*p = purpose(b)
	return word(b, "a purpose", `[\pL\pN\pP\pS ]{1,200}`)
}

// variable is an environment variable that a lease may fill.
type variable string

func (v *variable) UnmarshalText(b []byte) error {
	*v = variable(b)
	if err := word(b, "an environment variable", `[A-Za-z_][A-Za-z0-9_]{0,127}`); err != nil {
		return err
	}
	if reserved(string(b)) {
		return fmt.Errorf("environment variable %s is reserved: the agent, the shell or the loader gives it its meaning", b)
	}
	return nil
}

// reserved reports whether a credential in this variable would change how
// programs are found or started, or what a step believes about its job.
func reserved(name string) bool {
	for _, p := range []string{"LD_", "DYLD_", "GITHUB_", "RUNNER_", "ACTIONS_", "MAYFLY_", "BASH_", "GLIBC_", "MALLOC_"} {
		if strings.HasPrefix(name, p) {
			return true
		}
	}
	return slices.Contains([]string{
		"PATH", "HOME", "USER", "LOGNAME", "SHELL", "PWD", "OLDPWD", "TMPDIR", "LANG", "CI",
		"IFS", "ENV", "CDPATH", "PS4", "SHELLOPTS", "BASHOPTS", "PROMPT_COMMAND",
		"GCONV_PATH", "GETCONF_DIR", "HOSTALIASES", "LOCALDOMAIN", "LOCPATH", "NIS_PATH",
		"NLSPATH", "RES_OPTIONS", "RESOLV_HOST_CONF", "TZDIR",
	}, name)
}
