package runner

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/runner/internal/glob"
	"github.com/mayfly-ci/mayfly/sandbox"
)

const (
	// hashTime bounds one hashFiles(), as on GitHub.
	hashTime = 2 * time.Minute

	// listingMax bounds the names that a box hands out for it, in bytes.
	listingMax = 16 << 20

	// argsMax bounds the arguments of one sha256sum, in bytes: any kernel
	// takes as many.
	argsMax = 100 << 10
)

var (
	errHashTime = fmt.Errorf("it took more than %v", hashTime)
	errListing  = errors.New("there are too many files below these patterns: name directories in them")
)

// hashFiles is the function of that name: the SHA-256 of the SHA-256 of each
// file of the workspace that matches, as GitHub's runner computes it. The box
// lists and hashes its own files, with its own programs; what it answers is
// compared and hashed here, and leads nowhere else.
func (s *steps) hashFiles(ctx context.Context, patterns []string) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, hashTime, errHashTime)
	defer cancel()
	set, err := glob.Compile(sandbox.Workspace, patterns)
	if err != nil {
		return "", err
	}
	roots := set.Roots()
	if len(roots) == 0 {
		return "", nil
	}
	// A link to a file is that file, and a link to a directory is not followed.
	find := append([]string{"find"}, roots...)
	find = append(find, "(", "-type", "f", "-o", "-type", "l", "-exec", "test", "-f", "{}", ";", ")", "-print0")
	listing, err := s.ask(ctx, find)
	if err != nil {
		return "", err
	}
	files, err := set.Select(strings.Split(strings.TrimSuffix(string(listing), "\x00"), "\x00"))
	if err != nil || len(files) == 0 {
		return "", err
	}
	total := sha256.New()
	for len(files) > 0 {
		n, size := 0, 0
		for n < len(files) && (n == 0 || size+len(files[n]) < argsMax) {
			size += len(files[n])
			n++
		}
		sums, err := s.ask(ctx, append([]string{"sha256sum"}, files[:n]...))
		if err != nil {
			return "", err
		}
		digests, err := parseSums(sums, n)
		if err != nil {
			return "", err
		}
		total.Write(digests)
		files = files[n:]
	}
	return hex.EncodeToString(total.Sum(nil)), nil
}

// ask runs a program of the box for its output. That find misses a file is no
// error: a pattern may name one that is not there.
func (s *steps) ask(ctx context.Context, args []string) ([]byte, error) {
	var out bytes.Buffer
	p := sandbox.Process{Args: args, Env: []string{"PATH=" + basePath, "LC_ALL=C"}, Stdout: func(_ time.Time, b []byte) error {
		if out.Len()+len(b) > listingMax {
			return errListing
		}
		out.Write(b)
		return nil
	}}
	exit, err := s.box.Run(ctx, p)
	switch {
	case err != nil:
		return nil, err
	case exit.Code == statusNotFound:
		return nil, fmt.Errorf("the box has no %s", args[0])
	}
	return out.Bytes(), nil
}

// parseSums reads n lines of sha256sum: the digest stands first, behind a
// backslash if the name of the file has one.
func parseSums(sums []byte, n int) ([]byte, error) {
	var digests []byte
	for line := range bytes.Lines(sums) {
		line = bytes.TrimPrefix(line, []byte(`\`))
		d, err := hex.DecodeString(string(line[:min(len(line), 2*sha256.Size)]))
		if err != nil || len(d) != sha256.Size {
			break
		}
		digests = append(digests, d...)
	}
	if len(digests) != n*sha256.Size {
		return nil, fmt.Errorf("sha256sum gave %d digests for %d files: were they removed meanwhile?", len(digests)/sha256.Size, n)
	}
	return digests, nil
}
