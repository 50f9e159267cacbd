// Command mayfly-guest is process 1 of every box. It is not run by hand: a
// runtime puts it into the box and speaks to it (see sandbox/guest).
//
//	mayfly-guest serve [EXPIRES]    the stream is descriptor 3
//	mayfly-guest enter [EXPIRES]    as serve, in a kernel of its own (gVisor)
//	mayfly-guest box                makes the box of the native runtime, then serves
//	mayfly-guest stdio [EXPIRES]    the stream is descriptors 0 and 1
//	mayfly-guest listen [EXPIRES]   the stream is the first connection to it
//	mayfly-guest keep [EXPIRES]     as listen, for an enter in a kernel of its own
//
// EXPIRES is the Unix time, in seconds, at which it exits whatever happens. It
// exits with 0 when the stream ends, 1 on an error, 2 if it is called wrongly.
package main

import (
	"os"
	"strconv"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox/guest/serve"
	"github.com/mayfly-ci/mayfly/sandbox/gvisor/keeper"
	"github.com/mayfly-ci/mayfly/sandbox/native/boxinit"
)

func main() {
	os.Exit(run(os.Args[1:]))
}

func run(args []string) int {
	if len(args) < 1 || len(args) > 2 {
		return usage()
	}
	var o serve.Options
	if len(args) == 2 {
		seconds, err := strconv.ParseInt(args[1], 10, 64)
		if err != nil {
			return usage()
		}
		o.Expires = time.Unix(seconds, 0)
	}
	var err error
	switch args[0] {
	case "box":
		err = boxinit.Run()
	case "serve":
		err = serve.OnDescriptor(3, o)
	case "enter":
		o.Direct = true
		if err = keeper.Enter(); err == nil {
			err = serve.OnDescriptor(3, o)
		}
	case "keep":
		expires := uint64(0)
		if !o.Expires.IsZero() {
			expires = uint64(o.Expires.Unix())
		}
		err = keeper.OnListener(boxinit.Host, expires)
	case "stdio":
		err = serve.OnStdio(o)
	case "listen":
		err = serve.OnListener(o)
	default:
		return usage()
	}
	if err != nil {
		return fail("mayfly-guest: "+err.Error()+"\n", 1)
	}
	return 0
}

func usage() int {
	return fail("usage: mayfly-guest box | serve|enter|stdio|listen|keep [EXPIRES]\n", 2)
}

// fail prints what is wrong. If that cannot be printed there is nobody to read it.
func fail(text string, status int) int {
	_, _ = os.Stderr.WriteString(text)
	return status
}
