package sandboxtest

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/mayfly-ci/mayfly/sandbox"
)

func transferClauses() []clause {
	return []clause{
		{"put makes directories and files with their modes", "", checkPut},
		{"put replaces what is there", "", checkReplace},
		{"put refuses names that leave the directory", "", checkPutNames},
		{"put refuses links that leave the directory", "", checkPutLinks},
		{"put does not follow links of the job", "", checkPutPlanted},
		{"put refuses what is no archive", "", checkPutGarbage},
		{"get returns all of a file", "", checkGet},
		{"get returns no more than asked", "", checkGetMax},
		{"get of an absent file is ErrNotExist", "", checkGetAbsent},
		{"get follows no link", "", checkGetLinks},
		{"get of what is no file is refused", "", checkGetOther},
	}
}

const in = sandbox.Workspace + "/in"

func checkPut(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		big := strings.Repeat("0123456789abcdef", 1<<16)
		err := b.Put(ctx, in, archive(
			entry{name: "d/", mode: 0o750, kind: tar.TypeDir},
			entry{name: "d/e/f/run", mode: 0o755, content: "#!/bin/sh\necho ran\n"},
			entry{name: "d/secret", mode: 0o600, content: "s"},
			entry{name: "big", mode: 0o644, content: big},
			entry{name: "link", link: "d/secret", kind: tar.TypeSymlink},
			entry{name: "hard", link: "d/secret", kind: tar.TypeLink}))
		if err != nil {
			return fmt.Errorf("Put: %w", err)
		}
		got, err := b.Get(ctx, in+"/big", int64(len(big)))
		if err != nil || string(got) != big {
			return fmt.Errorf("Get of a megabyte: got %d bytes, %w", len(got), err)
		}
		return b.script(ctx, "cd in && stat -c '%a %n' d d/e d/e/f/run d/secret && cat link hard && echo && d/e/f/run").
			printed("750 d\n755 d/e\n755 d/e/f/run\n600 d/secret\nss\nran\n")
	})
}

func checkReplace(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		for _, text := range []string{"first, and longer", "second"} {
			if err := b.Put(ctx, sandbox.Run, archive(entry{name: "f", content: text, mode: 0o644})); err != nil {
				return fmt.Errorf("Put: %w", err)
			}
		}
		return b.script(ctx, "cat /run/mayfly/f").printed("second")
	})
}

// refusedPut wants an archive refused, and nothing where it would have led.
func (b *box) refusedPut(ctx context.Context, trap string, entries ...entry) error {
	err := b.Put(ctx, in, archive(entries...))
	if r := b.run(ctx, shell(`test ! -e "$1" -a ! -L "$1"`, trap)); r.succeeded() != nil {
		return fmt.Errorf("%+v made %s (Put said %w)", entries, trap, err)
	}
	if err == nil {
		return fmt.Errorf("Put of %+v: got nil, want refused", entries)
	}
	if errors.Is(err, sandbox.ErrDied) {
		return fmt.Errorf("Put of %+v: %w", entries, err)
	}
	return nil
}

func checkPutNames(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		for _, name := range []string{"../evil", "a/../../evil", "./../evil"} {
			if err := b.refusedPut(ctx, sandbox.Workspace+"/evil", entry{name: name, content: "x", mode: 0o644}); err != nil {
				return err
			}
		}
		if err := b.refusedPut(ctx, sandbox.Workspace+"/evil", entry{name: "../evil/", mode: 0o755, kind: tar.TypeDir}); err != nil {
			return err
		}
		return b.refusedPut(ctx, "/tmp/evil", entry{name: "/tmp/evil", content: "x", mode: 0o644})
	})
}

func checkPutLinks(ctx context.Context, h Harness) error {
	file := func(name string) entry { return entry{name: name, content: "x", mode: 0o644} }
	link := func(name, to string) entry { return entry{name: name, link: to, kind: tar.TypeSymlink} }
	return h.within(ctx, func(b *box) error {
		if err := b.script(ctx, "echo outside > /tmp/outside").succeeded(); err != nil {
			return err
		}
		err := errors.Join(
			b.refusedPut(ctx, "/tmp/evil", link("l1", "/tmp"), file("l1/evil")),
			b.refusedPut(ctx, "/tmp/evil", link("l2", "../../tmp"), file("l2/evil")),
			b.refusedPut(ctx, "/tmp/evil", link("l3", "/tmp/evil"), file("l3/x")),
			b.refusedPut(ctx, sandbox.Workspace+"/evil", entry{name: "d/", mode: 0o755, kind: tar.TypeDir}, link("d/up", ".."), link("up2", "d/up/.."), file("up2/evil")),
			b.refusedPut(ctx, in+"/hard", entry{name: "hard", link: "/tmp/outside", kind: tar.TypeLink}),
			b.refusedPut(ctx, in+"/hard", entry{name: "hard", link: "../../tmp/outside", kind: tar.TypeLink}))
		if err != nil {
			return err
		}
		return b.script(ctx, "cat /tmp/outside").printed("outside\n")
	})
}

func checkPutPlanted(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		if err := b.script(ctx, "mkdir in /tmp/real && ln -s /tmp/real in/sub && ln -s /tmp/evil in/file && echo mine > /tmp/evil").succeeded(); err != nil {
			return err
		}
		// To refuse and to replace the link are both right.
		_ = b.Put(ctx, in, archive(entry{name: "file", content: "x", mode: 0o644}))
		_ = b.Put(ctx, in, archive(entry{name: "sub/f", content: "x", mode: 0o644}))
		return b.script(ctx, "cat /tmp/evil; ls -A /tmp/real").printed("mine\n")
	})
}

func checkPutGarbage(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		if err := b.Put(ctx, in, strings.NewReader(strings.Repeat("garbage ", 1000))); err == nil || errors.Is(err, sandbox.ErrDied) {
			return fmt.Errorf("Put of garbage: got error %w, want one, and the box alive", err)
		}
		if err := b.Put(ctx, in, &broken{fs.ErrClosed}); !errors.Is(err, fs.ErrClosed) {
			return fmt.Errorf("Put of a stream that breaks: got error %w, want its own", err)
		}
		return b.script(ctx, "echo fine").printed("fine\n")
	})
}

func (b *box) got(ctx context.Context, name, want string) error {
	content, err := b.Get(ctx, name, 1<<20)
	if err != nil || string(content) != want {
		return fmt.Errorf("Get of %s: got %.100q, %w, want %.100q", name, content, err, want)
	}
	return nil
}

func checkGet(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		if err := b.script(ctx, `printf 'a\000b' > f; : > empty; printf secret > /run/mayfly/s; chmod 0 f`).succeeded(); err != nil {
			return err
		}
		return errors.Join(b.got(ctx, "/workspace/f", "a\x00b"), b.got(ctx, "/workspace/empty", ""), b.got(ctx, "/run/mayfly/s", "secret"))
	})
}

func checkGetMax(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		if err := b.script(ctx, "printf 0123456789 > f").succeeded(); err != nil {
			return err
		}
		if content, err := b.Get(ctx, "/workspace/f", 10); err != nil || len(content) != 10 {
			return fmt.Errorf("10 of 10 bytes: got %q, %w", content, err)
		}
		if content, err := b.Get(ctx, "/workspace/f", 9); err == nil || len(content) > 9 {
			return fmt.Errorf("9 of 10 bytes: got %q, nil, want an error", content)
		}
		return nil
	})
}

func checkGetAbsent(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		for _, name := range []string{"/workspace/none", "/no/such/directory/f"} {
			if _, err := b.Get(ctx, name, 10); !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("Get of %s: got error %w, want ErrNotExist", name, err)
			}
		}
		return nil
	})
}

// notGot wants an error and no content.
func (b *box) notGot(ctx context.Context, name string) error {
	content, err := b.Get(ctx, name, 1<<20)
	if err == nil || len(content) > 0 || errors.Is(err, sandbox.ErrDied) {
		return fmt.Errorf("Get of %s: got %.100q, error %w, want refused", name, content, err)
	}
	return nil
}

func checkGetLinks(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		if err := b.script(ctx, "mkdir d && echo x > d/f && ln -s d/f link && ln -s d dir && ln -s /etc/passwd far").succeeded(); err != nil {
			return err
		}
		return errors.Join(b.notGot(ctx, "/workspace/link"), b.notGot(ctx, "/workspace/dir/f"), b.notGot(ctx, "/workspace/far"))
	})
}

func checkGetOther(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		if err := b.script(ctx, "mkfifo fifo").succeeded(); err != nil {
			return err
		}
		return errors.Join(b.notGot(ctx, "/workspace/fifo"), b.notGot(ctx, "/workspace"), b.notGot(ctx, "/dev/zero"))
	})
}
