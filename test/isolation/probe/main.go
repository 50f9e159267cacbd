// Command probe is what the isolation tests run inside a box and, to see that
// the attack is one, in a setting where the control is missing.
//
//	probe NAME ARGUMENT...
//
// It exits 0 if it got what it was after, 1 with the reason if it was refused,
// and 2 if it was called wrongly.
package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"
)

// A probe is one attack or measurement. It takes args strings and returns nil
// if it got what it was after.
type probe struct {
	args int
	run  func(args []string) error
}

var errUsage = errors.New("usage: probe NAME and its arguments")

func main() {
	err := call(os.Args[1:])
	switch {
	case errors.Is(err, errUsage):
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	case err != nil:
		fmt.Println("refused:", err)
		os.Exit(1)
	}
}

func call(args []string) error {
	if len(args) == 0 {
		return errUsage
	}
	for _, table := range []map[string]probe{network(), files(), processes(), kernel(), load()} {
		if p, ok := table[args[0]]; ok {
			if len(args)-1 != p.args {
				return fmt.Errorf("%s takes %d arguments: %w", args[0], p.args, errUsage)
			}
			return p.run(args[1:])
		}
	}
	return fmt.Errorf("no probe %q: %w", args[0], errUsage)
}

// number is an argument that the tests wrote.
func number(s string) int {
	n, err := strconv.ParseInt(s, 0, 64)
	if err != nil {
		return -1
	}
	return int(n)
}
