package runner

import (
	"slices"
	"strings"
	"testing"
)

func TestParsePath(t *testing.T) {
	t.Parallel()
	if got, want := parsePath("/a\r\n\n/b\n/c"), []string{"/c", "/b", "/a"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q: the last line is searched first", got, want)
	}
}

// A step may fill GITHUB_PATH with the shortest lines there are; the work must
// grow with them, not with their square.
func TestParsePathIsLinear(t *testing.T) { // not parallel: it counts allocations
	const lines = 4000
	text := strings.Repeat("a\n", lines)
	n := testing.AllocsPerRun(1, func() { parsePath(text) })
	if n > 100 { // copying the list for each line would be one each
		t.Errorf("%d lines take %v allocations, want a few", lines, n)
	}
}
