# Everything that can be done with this repository. Bare `make` lists it.

SHELL       := /bin/bash
.SHELLFLAGS := -eo pipefail -c
GOARCH      := $(or $(GOARCH),$(shell go env GOARCH))
VERSION     := $(or $(VERSION),$(shell git -c safe.directory='*' describe --tags --always --dirty),unknown)
FUZZTIME    ?= 10s
TESTTIMEOUT ?= 15m
CRASHTIMEOUT ?= 60m
# Without the VCS stamp go asks git nothing, which refuses strangers' clones.
GOFLAGS     := $(shell go env GOFLAGS) -buildvcs=false
export GOARCH GOFLAGS FUZZTIME

# No stamp and no paths: the same source gives the same bytes anywhere.
BUILD := CGO_ENABLED=0 go build -trimpath
GUEST := sandbox/guest/bin/mayfly-guest-$(GOARCH)

# Debian packages that the tests, the demo and the benchmark use.
DEBIAN := bsdutils ca-certificates ca-certificates-java curl debconf e2fsprogs gcc git iproute2 libc6-dev \
	make nodejs openjdk-17-jdk-headless openssh-client openssh-server openssl passwd postgresql python3 python3-pip runc squid strace systemd util-linux

# npm comes with some packages of Node.js, which the one of that name is not for.
DEBIAN += $(shell command -v npm >/dev/null || echo npm)

# And those of the tests of the runtimes over engines, which start daemons of
# their own.
ENGINE := busybox-static containerd debootstrap docker.io docker-registry etcd-server

# Real servers that the tests and the benchmark run against, each a directory of
# test/servers. They are built once and kept outside of the tree.
SERVERS := gitea containerd dockerd runsc openbao minio kubernetes oauth clients actions

# The packages whose tests take longest begin first, so that the run does not end
# with one of them alone.
LONG := ./sandbox/containerd ./test/gitea ./sandbox/docker ./sandbox/sandboxtest ./cmd/mayfly ./test/chaos

# Directories that hold crash tests.
CRASH := $(addsuffix /...,$(wildcard ./test/crash ./runner))

.DEFAULT_GOAL := help
.PHONY: help build guest demo test cross bench crash fuzz lint release deps engine servers

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: guest ## bin/mayfly, one static binary
	$(BUILD) -ldflags='-s -w -X main.version=$(VERSION)' -o bin/mayfly ./cmd/mayfly

guest: # process 1 of a box; mayfly embeds the one of its own architecture
	@rm -f $(filter-out $(GUEST),$(wildcard sandbox/guest/bin/mayfly-guest-*))
	$(BUILD) -ldflags='-s -w' -o $(GUEST) ./cmd/mayfly-guest

demo: deps build ## a real job from claim to report, and what is left of it (nothing)
	go run ./test/demo

test: deps engine servers guest cross ## every test, with the race detector, as root
	go vet ./...
	go test -race -count=1 -timeout=$(TESTTIMEOUT) $(LONG) ./...

cross: # the other architecture compiles, tests included
	GOARCH=arm64 $(BUILD) ./...
	CGO_ENABLED=0 GOARCH=arm64 go vet ./...

bench: deps engine servers build ## the budgets of the design; JSON to the file that BENCH_JSON names
	go run ./test/bench

crash: deps engine servers guest ## kill the agent at every point of a job's life and of the recovery
	go vet -tags failpoint ./...
	go test -tags failpoint -count=1 -timeout=$(CRASHTIMEOUT) $(CRASH)
	go test -tags failpoint -count=1 -timeout=$(CRASHTIMEOUT) ./test/mutants

fuzz: guest ## every fuzz test for FUZZTIME (10s) each
	test/scripts/fuzz.sh

lint: ## format, modules, vet, staticcheck, errcheck
	test/scripts/lint.sh

release: ## dist/: static binaries for amd64 and arm64, built twice and compared
	test/scripts/release.sh

deps: # Debian packages; silent and quick when nothing is missing
	@test/scripts/deps.sh $(DEBIAN)

engine: # a Docker Engine, containerd, and what its test image is made with
	@test/scripts/deps.sh $(ENGINE)

servers: # built once, which takes minutes; silent and quick after that
	@$(foreach s,$(SERVERS),test/scripts/server.sh $(s) >/dev/null &&) true
