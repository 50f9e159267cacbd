#!/bin/bash
# Format, modules, vet, staticcheck, errcheck. The tools are pinned in
# test/tools/go.mod; go builds and caches them.
set -euo pipefail

failed=0

# check runs a command, and goes on with the next one if it fails.
check() {
	printf 'lint: %s\n' "${1##*/} ${*:2}"
	"$@" || failed=1
}

# tool prints the path of a pinned tool, built for this machine if needed.
tool() { GOARCH='' go -C test/tools tool -n "$1"; }

# formatted fails if gofumpt would change a file.
formatted() {
	local files
	files=$("$gofumpt" -l .) && [[ -z $files ]] || {
		printf '%s: run gofumpt -w\n' ${files:-gofumpt} >&2
		return 1
	}
}

# checked fails if the packages drop an error. Two things are let through: a
# deferred Close (what was only read from has nothing to say, and what is written
# to is closed where its error can be returned), and what a command prints.
checked() {
	local dropped status=0
	dropped=$("$errcheck" -ignoretests "${shipped[@]}") || status=$?
	((status < 2)) || return 1 # the packages do not compile: said already
	dropped=$(grep -vE '\sdefer .*\.Close\(|^cmd/.*\sfmt\.Fprint' <<<"$dropped") || return 0
	[[ -z $dropped ]] || {
		echo "$dropped" >&2
		return 1
	}
}

gofumpt=$(tool gofumpt) staticcheck=$(tool staticcheck) errcheck=$(tool errcheck)
check formatted
check go mod tidy -diff
for tags in '' failpoint; do
	check go vet -tags="$tags" ./...
	check "$staticcheck" -tags="$tags" -checks=all ./...
done
# Tests, and what only tests are built from, may drop an error.
mapfile -t shipped < <(go list ./... | grep -vE '/test(/|$)|test$')
check checked
for script in .ci/run test/scripts/*.sh test/servers/*/*.sh; do
	check bash -n "$script"
done
exit $failed
