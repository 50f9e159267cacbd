#!/bin/bash
# Prints the directory of a server that tests run against, such as "gitea":
# built once, by test/servers/NAME/build.sh, and kept outside of the tree for as
# long as its modules, its own source, that script and Go stay what they are.
# When it is there, this takes no time. What cannot be built ends the run.
set -euo pipefail
shopt -s nullglob # most are built of nothing but modules
cd "$(dirname "$0")/../servers/${1:?the name of a directory in test/servers}"
unset GOARCH GOOS # the server runs here, whatever is being compiled for

key=$({ go env GOVERSION GOARCH && cat *.mod *.sum build.sh *.go *.json; } | sha256sum | cut -c 1-16)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/mayfly
dir=$cache/$1-$key
if [[ ! -e $dir ]]; then
	mkdir -p "$cache"
	exec 9>"$cache/$1.lock"
	flock 9 # two tests may want it at once
fi
if [[ ! -e $dir ]]; then
	printf 'server: building %s, once; minutes on a small machine\n' "$1" >&2
	unfinished=$(mktemp -d "$cache/$1.XXXXXX")
	trap 'rm -rf "$unfinished"' EXIT
	chmod 755 "$unfinished"
	nice ./build.sh "$unfinished" >&2 || {
		printf 'server: %s cannot be built, and its tests need it\n' "$1" >&2
		exit 1
	}
	mv -T "$unfinished" "$dir"
fi
echo "$dir"
