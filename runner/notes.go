package runner

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
)

const (
	// notesMax bounds the annotations of a job. GitHub shows 50.
	notesMax = 500

	// noteBytes bounds each text of an annotation; GitHub's is about as large.
	noteBytes = 4096
)

// annotate gives an annotation to a provider that keeps them. The log has its
// line already.
func (s *stream) annotate(a providers.Annotation) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	keeper, ok := s.log.(providers.Annotator)
	if !ok || s.err != nil {
		return s.err
	}
	if s.notes++; s.notes > notesMax {
		if s.notes == notesMax+1 {
			return s.say(fmt.Sprintf("more than %d annotations: the rest stand in the log alone", notesMax))
		}
		return nil
	}
	for _, text := range []*string{&a.Title, &a.Message, &a.File} {
		// Masked before it is cut: half a secret would not be found.
		*text = s.hidden(*text)
		if len(*text) > noteBytes {
			*text = strings.ToValidUTF8((*text)[:noteBytes], "") + "…"
		}
	}
	if err := keeper.Annotate(a); err != nil {
		s.err = fmt.Errorf("annotation: %w", err)
	}
	return s.err
}

// summary gives what a step says of itself to the provider, or into the log if
// the provider has no place for it.
func (s *stream) summary(step int, markdown string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.log == nil || s.err != nil {
		return s.err
	}
	markdown = s.hidden(markdown)
	if keeper, ok := s.log.(providers.Annotator); ok {
		if err := keeper.Summary(step, []byte(markdown)); err != nil {
			s.err = fmt.Errorf("summary: %w", err)
		}
		return s.err
	}
	if s.left -= int64(len(markdown)); s.left <= 0 {
		return s.say("the summary is dropped: the log has reached its limit (limits.log in the policy)")
	}
	if !strings.HasSuffix(markdown, "\n") {
		markdown += "\n"
	}
	start := ""
	if s.midline {
		start = "\n"
	}
	s.at, s.index = time.Now(), step
	err := errors.Join(s.out.Flush(), s.send([]byte(start+"::group::Summary of the step\n"+markdown+"::endgroup::\n")))
	if s.err == nil {
		s.err = err
	}
	return s.err
}
