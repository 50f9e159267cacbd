// Command bench measures what the design has budgets for, on the machine that
// it runs on: "make bench". It starts a PostgreSQL and agents of its own, and
// the kernel's and runc's share in the same run for comparison. Arguments name
// the parts to run; none is all of them. BENCH_JSON names a file for programs.
//
// A missed budget is a figure and no failure: the exit status is 1 only if
// something could not be measured.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
)

// How often things are done. Each loop does everything that is compared once,
// so that what disturbs the machine disturbs all of it.
const (
	latencyRounds  = 60
	stepsOfAJob    = 50
	stepsJobs      = 10
	batches        = 3
	jobsOfABatch   = 200
	capacity       = 4
	warmBoxes      = 2
	idleBoxes      = 8
	idleRounds     = 3
	streams        = 10
	connectsOfAJob = 300
	tracedJobs     = 3
	maskRounds     = 5
	coldRounds     = 15
	readyBoxes     = 16 // of each runtime
	readyGroups    = 4  // in which they are made
	jobsOfAKind    = 30
	adoptions      = 6
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// A part measures some rows.
type part struct {
	name string
	run  func(context.Context, *world, *table) error
}

func parts() []part {
	return []part{
		{"latency", latency},
		{"steps", steps},
		{"throughput", throughput},
		{"memory", memory},
		{"masking", masking},
		{"gateway", throughGateway},
		{"http", plain},
		{"https", terminated},
		{"fsyncs", fsyncs},
		{"peers", peers},
		{"runtimes", runtimes},
	}
}

func run(ctx context.Context, only []string) (err error) {
	for _, name := range only {
		if !slices.ContainsFunc(parts(), func(p part) bool { return p.name == name }) {
			return fmt.Errorf("there is no part %q", name)
		}
	}
	w, err := newWorld(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	fmt.Printf("load before: %s\n", load())
	var t table
	for _, p := range parts() {
		if len(only) > 0 && !slices.Contains(only, p.name) {
			continue
		}
		if err := p.run(ctx, w, &t); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	fmt.Printf("load after: %s\n\n", load())
	if err := t.print(os.Stdout); err != nil {
		return err
	}
	if missed := t.missed(); len(missed) > 0 {
		fmt.Printf("\nmissed: %s\n", strings.Join(missed, "; "))
	}
	return t.save(os.Getenv("BENCH_JSON"))
}
