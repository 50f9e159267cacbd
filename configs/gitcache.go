package configs

import (
	"path/filepath"
	"time"

	"github.com/mayfly-ci/mayfly/configs/strict"
)

// DefaultGitDir is where git objects are kept if the file does not say. It is not
// below the state, which only root may enter: git does not run as root.
const DefaultGitDir = "/var/cache/mayfly/git"

// A GitCache says where git objects of repositories are kept for clones in
// boxes. The zero value is nowhere; of the others zero is the cache's default.
type GitCache struct {
	Dir  string
	Size int64         // bytes of all repositories together
	Age  time.Duration // after which one that no job used is removed
	Time time.Duration // bounds one filling
}

type gitNode struct {
	Self strict.Node    `yaml:",self"`
	Dir  string         `yaml:"dir"`
	Size strict.Size    `yaml:"size"`
	Age  *time.Duration `yaml:"age"`
	Time *time.Duration `yaml:"time"`
}

func (n *gitNode) fill(dir string, g *GitCache) error {
	if n == nil {
		return nil
	}
	g.Dir, g.Size = resolve(dir, n.Dir), int64(n.Size)
	var errs []error
	if n.Dir == "" {
		g.Dir = DefaultGitDir
	}
	if n.Dir == "" && !n.Self.Get("dir").IsZero() {
		errs = append(errs, n.Self.At("dir").Errorf("name of the directory is empty"))
	}
	if filepath.Clean(g.Dir) == "/" {
		errs = append(errs, n.Self.At("dir").Errorf("want a directory of its own"))
	}
	errs = append(errs, more(n.Self, "age", n.Age, &g.Age), more(n.Self, "time", n.Time, &g.Time))
	return strict.Join(errs...)
}

// more takes a time that must be more than nothing, if it is there.
func more(n strict.Node, key string, from, into *time.Duration) error {
	if from == nil {
		return nil
	}
	if *into = *from; *from <= 0 {
		return n.At(key).Errorf("%s is out of range: write more than 0s, or remove the key for the default", *from)
	}
	return nil
}
