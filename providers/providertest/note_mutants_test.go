package providertest

import "github.com/mayfly-ci/mayfly/providers"

// A faultyNotes is a log whose notes are broken.
type faultyNotes struct {
	*fakeLog
	annotate func(providers.Annotation) error
	summary  func(int, []byte) error
}

func (l *faultyNotes) Annotate(a providers.Annotation) error {
	if l.annotate != nil {
		return l.annotate(a)
	}
	return l.fakeLog.Annotate(a)
}

func (l *faultyNotes) Summary(step int, markdown []byte) error {
	if l.summary != nil {
		return l.summary(step, markdown)
	}
	return l.fakeLog.Summary(step, markdown)
}

func noteMutants() map[string]func(*faulty) {
	broken := func(change func(own *fakeLog, l *faultyNotes)) func(*faulty) {
		return func(p *faulty) {
			p.log = func(l providers.Log) providers.Log {
				own := l.(*fakeLog)
				notes := &faultyNotes{fakeLog: own}
				change(own, notes)
				return notes
			}
		}
	}
	return map[string]func(*faulty){
		"annotations are kept": broken(func(own *fakeLog, l *faultyNotes) {
			l.annotate = func(a providers.Annotation) error {
				a.EndColumn = 0
				return own.Annotate(a)
			}
		}),
		"summaries are kept in order": broken(func(own *fakeLog, l *faultyNotes) {
			var first []byte
			l.summary = func(step int, markdown []byte) error {
				if first == nil {
					first = append(first, markdown...)
					return nil
				}
				markdown = append(append([]byte(nil), markdown...), first...)
				first = []byte{}
				return own.Summary(step, markdown)
			}
		}),
	}
}
