package configs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"

	"github.com/mayfly-ci/mayfly/configs/strict"
	"github.com/mayfly-ci/mayfly/creds"
)

// maxSecret bounds a secret, in bytes: a chain of certificates with its key
// fits, a disk image named by mistake does not.
const maxSecret = 64 << 10

// secretKey are the keys whose value is a secret, or with _file (or -file, for
// owners that write it so) names one.
const secretKey = `(?i)(?:^|[_-])(?:password|passwd|passphrase|secret|token|(?:private|api)[_-]?key|credentials?)`

// ReadSecret reads a file that holds one secret, and takes off the newline that
// editors put at its end. A file that everybody can read is refused: whatever
// was in it is no secret. No error contains any of it.
func ReadSecret(path string) (creds.Secret, error) {
	// O_NONBLOCK: a FIFO must not hold the agent up.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return creds.Secret{}, fmt.Errorf("secret: %w", err)
	}
	b, err := readSecret(f)
	if err := errors.Join(err, f.Close()); err != nil {
		return creds.Secret{}, fmt.Errorf("secret: %s: %w", path, err)
	}
	return creds.NewSecret(b), nil
}

func readSecret(f *os.File) (string, error) {
	info, err := f.Stat()
	if err == nil {
		err = checkSecret(info)
	}
	if err != nil {
		return "", err
	}
	b, err := io.ReadAll(io.LimitReader(f, maxSecret+1))
	if err != nil {
		return "", err
	}
	text := strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), "\r")
	switch {
	case len(b) > maxSecret:
		return "", fmt.Errorf("larger than %d bytes", maxSecret)
	case text == "":
		return "", errors.New("file is empty")
	}
	return text, nil
}

func checkSecret(info fs.FileInfo) error {
	switch {
	case !info.Mode().IsRegular():
		return errors.New("not a regular file")
	case info.Mode()&0o007 != 0:
		return fmt.Errorf("everybody on this machine can use it (mode %04o): chmod o= it, and replace the secret", info.Mode().Perm())
	}
	return nil
}

// Validate looks at the machine: the policy file is there and nobody else can
// write it or the configuration, and each file that holds a secret is there and
// cannot be read by everybody. It reports every problem.
func (c *Config) Validate() error {
	var errs []error
	if path := c.node.Pos().File; path != "" {
		errs = append(errs, checkOwn(path, c.node))
	}
	if c.Policy != "" {
		errs = append(errs, checkOwn(c.Policy, c.node.At("policy")))
	}
	errs = append(errs, walk(c.node, func(key, value strict.Node) error {
		if !matches(secretKey+`[_-]file$`, key.Text()) || value.Text() == "" {
			return nil
		}
		path := resolve(filepath.Dir(value.Pos().File), value.Text())
		info, err := os.Stat(path)
		if err != nil {
			return value.Errorf("%w", err)
		}
		if err := checkSecret(info); err != nil {
			return value.Errorf("%s: %w", path, err)
		}
		return nil
	}))
	return strict.Join(errs...)
}

// checkOwn checks a file that says what jobs may do.
func checkOwn(path string, n strict.Node) error {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return n.Errorf("%w", err)
	case !info.Mode().IsRegular():
		return n.Errorf("%s: not a regular file", path)
	case info.Mode()&0o002 != 0:
		return n.Errorf("%s: everybody on this machine can change it (mode %04o): chmod o-w it", path, info.Mode().Perm())
	}
	return nil
}

// inlineSecrets finds secrets in the file itself. The errors do not show them.
func inlineSecrets(root strict.Node) error {
	return walk(root, func(key, value strict.Node) error {
		switch text := value.Text(); {
		case text == "":
		case matches(secretKey+`$`, key.Text()):
			return value.Errorf("secret in the configuration: put it into a file that only the agent can read, and name that as %s_file", key.Text())
		case matches(`://[^/@\s]*:[^/@\s]+@`, text):
			return value.Errorf("password in a URL: put it into a file that only the agent can read, and name that with a key that ends in _file")
		}
		return nil
	})
}

// walk calls each for every key of every mapping below n.
func walk(n strict.Node, each func(key, value strict.Node) error) error {
	var errs []error
	for key, value := range n.Pairs() {
		errs = append(errs, each(key, value), walk(value, each))
	}
	for _, item := range n.Items() {
		if item != n {
			errs = append(errs, walk(item, each))
		}
	}
	return strict.Join(errs...)
}

func matches(re, text string) bool {
	ok, err := regexp.MatchString(re, text)
	return err == nil && ok
}
