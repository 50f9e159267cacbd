package providertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/mayfly-ci/mayfly/providers"
)

// noted opens the log of a claimed job, lets write say something, closes it
// and returns what the service keeps. A log that is no Annotator says nothing.
func noted(ctx context.Context, s Service, write func(providers.Annotator) error) (notes []providers.Annotation, summary []byte, kept bool, err error) {
	p, job, id, err := claimed(ctx, s, "c-1")
	if err != nil {
		return nil, nil, false, err
	}
	log, err := logOf(ctx, p, job.Ref)
	if err != nil {
		return nil, nil, false, err
	}
	a, ok := log.(providers.Annotator)
	if !ok {
		return nil, nil, false, log.Close(ctx)
	}
	if s.Notes == nil {
		return nil, nil, false, errors.New("the log is an Annotator, and the test has no Notes")
	}
	if err := errors.Join(write(a), log.Close(ctx)); err != nil {
		return nil, nil, false, err
	}
	notes, summary, err = s.Notes(id)
	return notes, summary, true, err
}

func notesKept(ctx context.Context, s Service) error {
	want := []providers.Annotation{
		{Step: 0, Level: providers.LevelError, Title: "a title", Message: "two\nlines, \"quoted\" ü", File: "a/b.go", Line: 3, EndLine: 4, Column: 5, EndColumn: 6},
		{Step: 1, Level: providers.LevelWarning, Message: "no place"},
		{Step: 1, Level: providers.LevelNotice, Message: "a file", File: "c d.go"},
	}
	got, _, kept, err := noted(ctx, s, func(a providers.Annotator) error {
		for _, w := range want {
			if err := a.Annotate(w); err != nil {
				return fmt.Errorf("Annotate = %w", err)
			}
		}
		return nil
	})
	if err == nil && kept && !slices.Equal(got, want) {
		err = fmt.Errorf("the annotations are %+v, want %+v", got, want)
	}
	return err
}

func summariesKept(ctx context.Context, s Service) error {
	said := [][]byte{[]byte("# one\n"), bytes.Repeat([]byte("*two* "), 1<<17), []byte("\n| three |\n")}
	_, got, kept, err := noted(ctx, s, func(a providers.Annotator) error {
		for i, b := range said {
			if err := a.Summary(i/2, b); err != nil {
				return fmt.Errorf("Summary = %w", err)
			}
		}
		return nil
	})
	if err != nil || !kept {
		return err
	}
	// A service may put something between them.
	rest := got
	for i, b := range said {
		at := bytes.Index(rest, b)
		if at < 0 {
			return fmt.Errorf("summary %d of %d is not in the %d bytes that are kept, behind the one before it", i+1, len(said), len(got))
		}
		rest = rest[at+len(b):]
	}
	return nil
}
