#!/bin/bash
# Builds the OAuth 2.0 server of main.go into a directory.
set -euo pipefail
CGO_ENABLED=0 go build -p 2 -trimpath -buildvcs=false -ldflags '-s -w' -o "$1/oauth" .
