#!/bin/bash
# Builds containerd and its shim for runc into a directory.
set -euo pipefail
for p in containerd containerd-shim-runc-v2; do
	CGO_ENABLED=0 go build -p 2 -trimpath -buildvcs=false -ldflags '-s -w' -o "$1/$p" "github.com/containerd/containerd/v2/cmd/$p"
done
