package sandboxtest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
)

func besideClauses() []clause {
	return []clause{
		{"a process runs beside another", "", checkBeside},
		{"a process is the user that it shall be", "user id range", checkUser},
	}
}

func checkBeside(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		ctx, cancel := context.WithTimeout(ctx, clauseTimeout/4)
		defer cancel()
		first := make(chan result, 1)
		begun := make(chan struct{}, 1)
		go func() {
			p := shell(`echo begun; until [ -e /tmp/go ]; do sleep 0.02; done; echo first; exit 3`)
			var r result
			p.Stdout = func(_ time.Time, b []byte) error {
				r.out += string(b)
				select {
				case begun <- struct{}{}:
				default:
				}
				return nil
			}
			r.exit, r.err = b.Run(ctx, p)
			first <- r
		}()
		select {
		case <-begun:
		case r := <-first:
			return fmt.Errorf("the first process: got %v before it was told to end", r)
		}
		if r := b.run(ctx, shell("true")); r.err == nil {
			return errors.New("a second process that is not to be beside the first: got no error")
		}
		p := shell("echo beside; echo wrong >&2; exit 4")
		p.Beside = true
		if r := b.run(ctx, p); r.err != nil || r.exit.Code != 4 || r.out != "beside\n" || r.errs != "wrong\n" {
			return fmt.Errorf("the process beside: got %v, want its own output and code 4", r)
		}
		p = shell("touch /tmp/go")
		p.Beside = true
		if err := b.run(ctx, p).succeeded(); err != nil {
			return fmt.Errorf("a further process beside: %w", err)
		}
		if r := <-first; r.err != nil || r.exit.Code != 3 || r.out != "begun\nfirst\n" {
			return fmt.Errorf("the first process: got %v, want its own output and code 3", r)
		}
		return nil
	})
}

func checkUser(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		for user, want := range map[string]string{"": "0 0", "nobody": "65534 65534", "1234": "1234 0", "1234:4321": "1234 4321"} {
			p := shell(`echo "$(id -u) $(id -g)" >/dev/stdout; echo "$HOME"; touch /root/mine 2>/dev/null && echo root`)
			p.User = user
			r := b.run(ctx, p)
			ids, rest, _ := strings.Cut(r.out, "\n")
			if r.err != nil || ids != want {
				return fmt.Errorf("user %q: got %v, want the ids %s", user, r, want)
			}
			if user != "" && (strings.Contains(rest, "root") || strings.TrimSpace(rest) == "") {
				return fmt.Errorf("user %q: got %v, want a HOME of his own and none of root's rights", user, r)
			}
		}
		return b.notStarted(ctx, sandbox.Process{Args: []string{"/bin/true"}, User: "no-such-user"}, 126)
	})
}
