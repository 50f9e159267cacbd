#!/bin/bash
# Builds the program that runs real client libraries in the box of a job. They
# are no part of Mayfly: their modules are their own.
set -euo pipefail
CGO_ENABLED=0 go build -p 2 -trimpath -buildvcs=false -ldflags '-s -w' -o "$1/clients" .
