#!/bin/bash
# Installs the Debian packages named as arguments, those that are missing.
# What cannot be installed ends the run: no test is skipped for want of a tool.
set -euo pipefail

# missing prints the arguments that are not installed.
missing() {
	local p
	for p; do
		[[ $(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null) == installed ]] || echo "$p"
	done
}

if ! command -v dpkg-query >/dev/null; then
	echo "deps: not a Debian system; install the equivalents of: $*, then make DEBIAN=" >&2
	exit 1
fi
mapfile -t want < <(missing "$@")
((${#want[@]})) || exit 0
if ((EUID != 0)); then
	echo "deps: missing, and only root may install: apt-get install ${want[*]}" >&2
	exit 1
fi
echo "deps: installing ${want[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq -y -o Dpkg::Use-Pty=0 --no-install-recommends "${want[@]}" </dev/null
mapfile -t still < <(missing "$@")
if ((${#still[@]})); then
	echo "deps: still missing after apt-get install: ${still[*]}" >&2
	exit 1
fi
