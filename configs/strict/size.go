package strict

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// A Size is a number of bytes. A bare number is refused: "512" may have meant
// MiB, and "MB" is two different things.
type Size int64

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *Size) UnmarshalText(b []byte) error {
	for i, unit := range []string{"KiB", "MiB", "GiB", "TiB"} {
		digits, ok := strings.CutSuffix(string(b), unit)
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(digits, 10, 63) // no sign
		shift := 10 * (i + 1)
		if err != nil || n > math.MaxInt64>>shift || digits[0] == '0' {
			break
		}
		*s = Size(n << shift)
		return nil
	}
	return fmt.Errorf("%q is not a size: write a whole number and KiB, MiB, GiB or TiB, such as 512MiB", b)
}
