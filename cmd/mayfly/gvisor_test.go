package main

import (
	"context"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/mayfly-ci/mayfly/test/servertest"
)

// runsc puts the path of gVisor's program into $RUNSC.
func runsc(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 {
		ts.Fatalf("usage: runsc")
	}
	program, err := servertest.Runsc(context.Background())
	ts.Check(err)
	ts.Setenv("RUNSC", program)
}
