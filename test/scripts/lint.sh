#!/bin/bash
# Format, modules, vet, staticcheck, errcheck. The tools are pinned in
# test/tools/go.mod; go builds and caches them.
set -euo pipefail

failed=0

# check runs a command, and goes on with the next one if it fails.
check() {
	printf 'lint: %.70s\n' "${1##*/} ${*:2}"
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

# checked fails if the packages drop an error. A deferred Close is let through:
# what was only read from has nothing to say, and what is written to is closed
# where its error can be returned.
checked() { # tags
	local dropped status=0
	dropped=$("$errcheck" -ignoretests -tags="$1" "${shipped[@]}") || status=$?
	((status < 2)) || return 1 # the packages do not compile: said already
	dropped=$(grep -vE '\sdefer .*\.Close\(' <<<"$dropped") || return 0
	[[ -z $dropped ]] || {
		echo "$dropped" >&2
		return 1
	}
}

gofumpt=$(tool gofumpt) staticcheck=$(tool staticcheck) errcheck=$(tool errcheck)
check formatted
check go mod tidy -diff
# Tests, and what only tests use, may drop an error.
mapfile -t shipped < <(go list ./... | grep -vE '/test(/|$)|test$')
for tags in '' failpoint; do
	check go vet -tags="$tags" ./...
	check "$staticcheck" -tags="$tags" -checks=all ./...
	check checked "$tags"
done
for script in .ci/run test/scripts/*.sh; do
	check bash -n "$script"
done
exit $failed
