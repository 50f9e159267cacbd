package audit

import "os"

// SetFsync replaces fsync, so that tests count and break it.
func (f *File) SetFsync(fsync func(*os.File) error) { f.fsync = fsync }

// MakeReadOnly makes every later write of the open file fail, as a full disk
// does.
func (f *File) MakeReadOnly() error {
	f.turn <- struct{}{}
	defer func() { <-f.turn }()
	ro, err := os.Open(f.file.Name())
	if err != nil {
		return err
	}
	old := f.file
	f.file = ro
	return old.Close()
}

// Forge returns the line that would follow head, as somebody who knows the
// format would write it.
func Forge(head Head, e Event) []byte {
	line, _, err := encode(head, e)
	if err != nil {
		return nil
	}
	return line
}

// HashOf is the hash of a line without its hash.
func HashOf(body []byte) string { return hashOf(body) }
