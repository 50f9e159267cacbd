// Command clients runs real libraries of services in a job, for tests: what a
// step would do with them. Each line of its output is something that worked, or
// how it failed.
package main

import (
	"context"
	"fmt"
	"os"
)

func main() {
	ctx := context.Background()
	switch args := os.Args[1:]; {
	case len(args) == 3 && args[0] == "s3":
		s3Client(ctx, args[1], args[2])
	case len(args) == 3 && args[0] == "s3-session":
		session(ctx, args[1], args[2])
	case len(args) == 3 && args[0] == "image":
		imageClient(ctx, args[1], args[2])
	default:
		fmt.Fprintln(os.Stderr, "usage: clients s3|s3-session URL BUCKET, or image REPOSITORY OTHER")
		os.Exit(2)
	}
}

// tell prints what became of something.
func tell(what string, err error) {
	if err != nil {
		fmt.Printf("%s: failed: %v\n", what, err)
		return
	}
	fmt.Printf("%s: ok\n", what)
}
