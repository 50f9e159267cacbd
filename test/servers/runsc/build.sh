#!/bin/bash
# Builds gVisor's runsc, and its shim for containerd, into a directory.
set -euo pipefail
version=$(go list -m -f '{{.Version}}' gvisor.dev/gvisor) # else it says none, as no release does
build() {
	CGO_ENABLED=0 go build -p 2 -trimpath -buildvcs=false \
		-ldflags "-s -w -X gvisor.dev/gvisor/runsc/version.version=$version" -o "$1" "$2"
}
build "$1/runsc" gvisor.dev/gvisor/runsc
build "$1/containerd-shim-runsc-v1" gvisor.dev/gvisor/shim
