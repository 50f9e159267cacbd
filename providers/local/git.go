package local

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/workflow"
)

// gitTimeout bounds one reading of a repository, which takes milliseconds and
// on a cold network disk perhaps seconds.
const gitTimeout = 30 * time.Second

// source returns the commit of a job and the text of its workflow.
func (p *Provider) source(ctx context.Context, j Job) (sha, text string, err error) {
	repository := p.directory(j.Repository)
	if info, err := os.Stat(repository); err != nil || !info.IsDir() {
		return "", "", bad("repository %s: there is no such directory, or it may not be read", repository)
	}
	if j.Worktree {
		if text, err = worktreeFile(repository, j.Workflow); err != nil || j.SHA != "" || j.Ref == "" {
			return j.SHA, text, err
		}
	}
	rev := j.SHA
	if rev == "" {
		rev = j.Ref
	}
	file := j.Workflow
	if j.Worktree {
		file = ""
	}
	sha, blob, err := readCommit(ctx, repository, rev, file)
	if !j.Worktree {
		text = blob
	}
	return sha, text, err
}

func (p *Provider) directory(repository string) string {
	if filepath.IsAbs(repository) {
		return repository
	}
	return filepath.Join(p.config.Repositories, repository)
}

// Source is the directory of the repository.
func (p *Provider) Source(j providers.Job) (providers.Source, error) {
	u := url.URL{Scheme: "file", Path: p.directory(j.Subject.Repository)}
	if strings.ContainsAny(u.Path, "%?#") || !filepath.IsAbs(u.Path) { // git undoes some escapes of a file's URL and not others
		return providers.Source{}, fmt.Errorf("local: the name of the directory %q has characters of URLs", u.Path)
	}
	return providers.Source{URL: "file://" + u.Path}, nil
}

// worktreeFile reads the file that lies in the directory, and not one that a
// link there leads out to.
func worktreeFile(dir, name string) (string, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return "", bad("repository %s: %v", dir, err)
	}
	text, err := regularFile(root, name)
	return text, errors.Join(err, root.Close())
}

func regularFile(root *os.Root, name string) (string, error) {
	f, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return "", bad("workflow %s: %v", name, err)
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = bad("workflow %s is not a regular file", name)
	}
	var b []byte
	if err == nil {
		// One byte more than is allowed, for workflow.Load to see.
		b, err = io.ReadAll(io.LimitReader(f, workflow.MaxSource+1))
	}
	return string(b), errors.Join(err, f.Close())
}

// readCommit resolves rev to a commit and reads a file of it ("" reads none).
// It asks one child, "git cat-file --batch-command" (git 2.36), whose input is
// lines and no arguments.
func readCommit(ctx context.Context, repository, rev, file string) (sha, text string, err error) {
	ctx, cancel := context.WithTimeout(ctx, gitTimeout)
	defer cancel()
	gitDir := filepath.Join(repository, ".git")
	if _, err := os.Lstat(gitDir); errors.Is(err, fs.ErrNotExist) {
		gitDir = repository // bare
	}
	cmd := exec.CommandContext(ctx, "git", "--git-dir="+gitDir, "cat-file", "--batch-command")
	cmd.Dir = "/"
	cmd.Env = gitEnvironment()
	cmd.WaitDelay = time.Second
	complaint := &limited{most: 1000}
	cmd.Stderr = complaint
	in, err := cmd.StdinPipe()
	if err != nil {
		return "", "", fmt.Errorf("git: %w", err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return "", "", fmt.Errorf("git: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return "", "", fmt.Errorf("git: it is needed to read the workflow, install it: %w", err)
	}
	b := &batch{in: in, out: bufio.NewReader(out)}
	sha, text, err = b.read(rev, file)
	closed := in.Close() // which ends git
	waited := cmd.Wait()
	if err == nil {
		err = errors.Join(closed, waited)
	}
	if err != nil && ctx.Err() == nil && errors.Is(err, io.ErrUnexpectedEOF) {
		return "", "", bad("repository %s: git: %s", repository, strings.TrimSpace(complaint.String()))
	}
	if err != nil {
		return "", "", fmt.Errorf("repository %s: %w", repository, errors.Join(err, context.Cause(ctx)))
	}
	return sha, text, nil
}

// gitEnvironment keeps the repository's and the user's settings from making
// git do anything but read: no system or user configuration, no transport to
// fetch a missing object with, no replaced objects, no prompt. The owner of
// the repository may be another user than the agent's.
func gitEnvironment() []string {
	return []string{
		"PATH=" + os.Getenv("PATH"),
		"HOME=/nonexistent",
		"LC_ALL=C",
		"GIT_CONFIG_NOSYSTEM=1",
		"GIT_CONFIG_GLOBAL=/dev/null",
		"GIT_CONFIG_COUNT=1",
		"GIT_CONFIG_KEY_0=safe.directory",
		"GIT_CONFIG_VALUE_0=*",
		"GIT_NO_LAZY_FETCH=1",
		"GIT_ALLOW_PROTOCOL=none", // older versions do not know the line above
		"GIT_NO_REPLACE_OBJECTS=1",
		"GIT_OPTIONAL_LOCKS=0",
		"GIT_TERMINAL_PROMPT=0",
	}
}

// A batch talks to one git cat-file --batch-command.
type batch struct {
	in  io.Writer
	out *bufio.Reader
}

func (b *batch) read(rev, file string) (sha, text string, err error) {
	sha, kind, _, err := b.ask("info", rev+"^{commit}")
	if err != nil {
		return "", "", err
	}
	if kind != "commit" {
		return "", "", bad("there is no commit %s in the repository", rev)
	}
	if file == "" {
		return sha, "", nil
	}
	_, kind, size, err := b.ask("info", sha+":"+file)
	if err != nil {
		return "", "", err
	}
	if kind != "blob" {
		return "", "", bad("there is no file %s in commit %s", file, sha)
	}
	if size > workflow.MaxSource {
		return "", "", bad("workflow %s has %d bytes, more than the %d that one may have", file, size, workflow.MaxSource)
	}
	if _, _, _, err := b.ask("contents", sha+":"+file); err != nil {
		return "", "", err
	}
	src := make([]byte, size)
	if _, err := io.ReadFull(b.out, src); err != nil {
		return "", "", noEOF(err)
	}
	return sha, string(src), nil
}

// ask sends a command and reads the line "ID KIND SIZE" of the answer. An
// object that is missing or ambiguous has no such line, and no kind.
func (b *batch) ask(command, object string) (id, kind string, size int64, err error) {
	if _, err := io.WriteString(b.in, command+" "+object+"\n"); err != nil {
		return "", "", 0, fmt.Errorf("git: %w", io.ErrUnexpectedEOF) // it has ended: its complaint says why
	}
	line, err := b.out.ReadString('\n')
	if err != nil {
		return "", "", 0, noEOF(err)
	}
	fields := strings.Fields(line)
	if len(fields) != 3 || !fullSHA(fields[0]) {
		return "", "", 0, nil
	}
	size, err = strconv.ParseInt(fields[2], 10, 64)
	if err != nil {
		return "", "", 0, fmt.Errorf("git: answer %q: %w", line, err)
	}
	return fields[0], fields[1], size, nil
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("git: %w", err)
}

// limited keeps the beginning of what is written to it.
type limited struct {
	strings.Builder
	most int
}

func (l *limited) Write(b []byte) (int, error) {
	_, _ = l.Builder.Write(b[:min(len(b), l.most-l.Len())])
	return len(b), nil
}
