#!/bin/bash
# Runs every fuzz test of the module for FUZZTIME each.
set -euo pipefail

found=0
while IFS=: read -r file func; do
	name=${func#func }
	name=${name%%(*}
	dir=$(dirname "$file")
	echo "fuzz: $dir $name for ${FUZZTIME:=10s}"
	go test -run='^$' -fuzz="^$name\$" -fuzztime="$FUZZTIME" "$dir"
	found=$((found + 1))
done < <(grep -rEo --include='*_test.go' '^func Fuzz[A-Za-z0-9_]*\(f \*testing\.F' . | sort)
if ((found == 0)); then
	echo "fuzz: no fuzz test found" >&2
	exit 1
fi
echo "fuzz: $found fuzz tests, nothing found"
