#!/bin/bash
# Builds Gitea and Gitea's own runner into a directory, with the files that
# Gitea reads at run time.
set -euo pipefail
out=$1

version() { go list -m -f '{{if .Replace}}{{.Replace.Version}}{{else}}{{.Version}}{{end}}' "$1"; }

build() { CGO_ENABLED=0 go build -p 2 -trimpath -buildvcs=false -ldflags "-s -w -X $3" -o "$out/$1" "$2"; }

gitea=$(version gitea.dev) runner=$(version gitea.com/gitea/runner)
build gitea gitea.dev "main.Version=${gitea#v}"
build gitea-runner gitea.com/gitea/runner "gitea.com/gitea/runner/internal/pkg/ver.version=$runner"
source=$(go list -m -f '{{.Dir}}' gitea.dev)
mkdir "$out/static"
cp -r --no-preserve=mode "$source"/{templates,options,public} "$out/static"
