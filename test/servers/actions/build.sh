#!/bin/bash
# Installs the library that actions on GitHub are written with, as the archive of
# what a job needs of it. Its versions are pinned, with their digests.
set -euo pipefail
command -v npm >/dev/null || {
	echo "npm is missing: make deps" >&2
	exit 1
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp package.json package-lock.json "$work"
npm --prefix "$work" ci --ignore-scripts --no-audit --no-fund
tar -C "$work" -czf "$1/actions.tar.gz" node_modules
