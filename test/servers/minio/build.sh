#!/bin/bash
# Builds MinIO, an object store that speaks S3 and STS, into a directory. It is
# licensed under the AGPL: a server that tests run, nothing that is linked.
set -euo pipefail
CGO_ENABLED=0 go build -p 2 -trimpath -buildvcs=false -ldflags '-s -w' -o "$1/minio" github.com/minio/minio
