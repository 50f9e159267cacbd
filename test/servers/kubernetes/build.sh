#!/bin/bash
# Builds the API server of Kubernetes, and kubectl, into a directory.
set -euo pipefail
v=k8s.io/component-base/version
for program in kube-apiserver kubectl; do
	CGO_ENABLED=0 go build -p 2 -trimpath -buildvcs=false \
		-ldflags "-s -w -X $v.gitVersion=v1.34.4 -X $v.gitMajor=1 -X $v.gitMinor=34" \
		-o "$1/$program" k8s.io/kubernetes/cmd/$program
done
