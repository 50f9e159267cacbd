#!/bin/bash
# Builds OpenBao, a server with Vault's API, into a directory.
set -euo pipefail
CGO_ENABLED=0 go build -p 2 -trimpath -buildvcs=false \
	-ldflags '-s -w -X github.com/openbao/openbao/version.fullVersion=2.4.0' -o "$1/openbao" github.com/openbao/openbao
