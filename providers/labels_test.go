package providers_test

import (
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/providers"
)

// A label is refused if no box of this agent is what it says.
func TestCheckLabels(t *testing.T) {
	t.Parallel()
	for _, l := range []string{
		"windows", "Windows", "WINDOWS-latest", "windows-2022", "windows-11-arm", "windows_2019", "win", "win11", "win-2022", "self-hosted-windows",
		"gpu-win", "macos", "macOS", "macos-14", "macos-latest", "macos-13-xlarge", "macOS14", "mac", "mac-mini", "osx", "darwin", "Darwin-x64", "freebsd-14",
		"arm64", "ARM64", "aarch64", "linux-arm64", "ubuntu-24.04-arm", "self-hosted.arm", "s390x",
	} {
		if err := providers.CheckLabels([]string{"linux", l}, "amd64"); err == nil || !strings.Contains(err.Error(), `"`+l+`"`) || !strings.Contains(err.Error(), "boxes are") {
			t.Errorf("%q on amd64: got %v, want it refused by name", l, err)
		}
	}
	for _, l := range []string{
		"linux", "ubuntu-latest", "ubuntu-22.04", "self-hosted", "x64", "X64", "linux-amd64", "x86_64", "docker", "darwinia", "windowsill", "winter-2022",
		"wine-builder", "macro", "machine", "alarm", "team-win-2", "gpu",
	} {
		if err := providers.CheckLabels([]string{l}, "amd64"); err != nil {
			t.Errorf("%q on amd64: got %v, want it allowed", l, err)
		}
	}
	for l, want := range map[string]bool{"arm64": true, "ubuntu-24.04-arm": true, "x64": false, "linux-amd64": false, "macos-14": false, "linux": true} {
		if err := providers.CheckLabels([]string{l}, "arm64"); (err == nil) != want {
			t.Errorf("%q on arm64: got %v, want allowed %v", l, err, want)
		}
	}
}
