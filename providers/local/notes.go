package local

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"

	"github.com/mayfly-ci/mayfly/providers"
)

const (
	notesFile   = "annotations.jsonl"
	summaryFile = "summary.md"
)

// note appends to a file beside the log, which is made for the first of them.
func (l *jobLog) note(file string, b []byte) error {
	f := l.notes[file]
	if f == nil {
		var err error
		if f, err = l.open(file); err != nil {
			return err
		}
		if l.notes == nil {
			l.notes = map[string]*os.File{}
		}
		l.notes[file] = f
	}
	if _, err := f.Write(b); err != nil {
		return fmt.Errorf("%s of %s: %w", file, l.id, err)
	}
	return nil
}

// Annotate implements providers.Annotator.
func (l *jobLog) Annotate(a providers.Annotation) error {
	b, err := json.Marshal(a)
	if err != nil {
		return fmt.Errorf("%s of %s: %w", notesFile, l.id, err)
	}
	return l.note(notesFile, fmt.Appendf(nil, "\n%s\n", b)) // as in Step
}

// Summary implements providers.Annotator. Each begins on a line of its own.
func (l *jobLog) Summary(_ int, markdown []byte) error {
	if !bytes.HasSuffix(markdown, []byte("\n")) {
		markdown = append(bytes.Clone(markdown), '\n')
	}
	return l.note(summaryFile, markdown)
}

// ReadNotes returns the annotations of a job and its summary in Markdown, as
// far as they have been written. A line that was torn is left out.
func ReadNotes(dir, id string) (notes []providers.Annotation, summary []byte, err error) {
	err = withSpool(dir, id, func(root *os.Root) error {
		b, err := readOptional(root, path.Join(dirDone, id, notesFile))
		if err != nil {
			return err
		}
		for line := range bytes.Lines(b) {
			var a providers.Annotation
			if json.Unmarshal(line, &a) == nil {
				notes = append(notes, a)
			}
		}
		summary, err = readOptional(root, path.Join(dirDone, id, summaryFile))
		return err
	})
	return notes, summary, err
}

func readOptional(root *os.Root, file string) ([]byte, error) {
	b, err := root.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("notes: %w", err)
	}
	return b, nil
}
