package providers

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// CheckLabels refuses labels that promise what boxes are not: a service hands a
// job to whoever says that he can run it, and it would fail there. Boxes are
// Linux, of the machine's architecture, which is a GOARCH. Case does not matter,
// as it does not to the services.
func CheckLabels(labels []string, arch string) error {
	var errs []error
	for _, l := range labels {
		if why := otherSystem(l, arch); why != "" {
			errs = append(errs, fmt.Errorf("labels: %.64q: %s, a job that asks for it would fail in them: remove it", l, why))
		}
	}
	return errors.Join(errs...)
}

// otherSystem says why a box is not what a label means: "windows-latest",
// "macos-14-xlarge", "self-hosted-win", "ubuntu-24.04-arm" on amd64.
func otherSystem(label, arch string) string {
	full := regexp.MustCompile(`^(windows|macos|osx|darwin|freebsd|openbsd|netbsd)\d*$`)
	short := regexp.MustCompile(`^(win|mac)\d*$`) // words of other meanings too, unless they begin or end a label
	words := strings.FieldsFunc(strings.ToLower(label), func(r rune) bool { return strings.ContainsRune("-._/ ", r) })
	for i, w := range words {
		if full.MatchString(w) || short.MatchString(w) && (i == 0 || i == len(words)-1) {
			return "this agent's boxes are Linux"
		}
		if of := architecture(w); of != "" && of != arch {
			return "this agent's boxes are " + arch
		}
	}
	return ""
}

// architecture is the GOARCH that a word of a label names, as GitHub, Docker and
// uname write them; "" if it names none. What every amd64 runs too is amd64.
func architecture(word string) string {
	switch word {
	case "x64", "amd64", "x86", "i386", "i686":
		return "amd64"
	case "arm64", "aarch64", "arm", "armv7", "armv8":
		return "arm64"
	case "riscv64", "s390x", "ppc64le", "loong64":
		return word
	}
	return ""
}
