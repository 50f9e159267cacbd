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
	case len(args) == 3 && args[0] == "s3-chain":
		chain(ctx, args[1], args[2])
	case len(args) == 3 && args[0] == "registry":
		registry(ctx, args[1], args[2])
	case len(args) == 4 && args[0] == "grpc":
		finish(call(ctx, args[1], args[2], args[3]))
	case len(args) == 3 && args[0] == "websocket":
		finish(exchange(args[1], args[2]))
	default:
		fmt.Fprintln(os.Stderr, "usage: clients s3|s3-chain|s3-session URL BUCKET, image REPOSITORY OTHER, registry HOST REPOSITORY, grpc HOST METHOD TEXT, or websocket URL TEXT")
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

// finish ends the program with what became of the one thing that it did.
func finish(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
