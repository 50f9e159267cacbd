#!/bin/bash
# Builds a Docker Engine newer than Debian's into a directory. It needs a
# containerd beside it: test/servers/containerd.
set -euo pipefail
for p in dockerd docker-proxy; do
	CGO_ENABLED=0 go build -p 2 -trimpath -buildvcs=false -ldflags '-s -w' -o "$1/$p" "github.com/moby/moby/v2/cmd/$p"
done
