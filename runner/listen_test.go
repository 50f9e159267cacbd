package runner

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/mask"
	"github.com/mayfly-ci/mayfly/providers"
)

// notingLog is a log that keeps notes.
type notingLog struct {
	textLog
	notes   []providers.Annotation
	summary []string
}

func (l *notingLog) Annotate(a providers.Annotation) error {
	l.notes = append(l.notes, a)
	return nil
}

func (l *notingLog) Summary(_ int, markdown []byte) error {
	l.summary = append(l.summary, string(markdown))
	return nil
}

func newListener(log providers.Log) (*listener, *steps) {
	s := &stream{log: log, set: mask.New(nil), shown: map[refusal]bool{}, left: 1 << 30}
	s.out = mask.NewWriter(s.send, s.set)
	job := &steps{life: &life{out: s}}
	return job.listen(&current{}), job
}

// listened is what a job's log shows of parts that a step prints, and what else
// came of them.
func listened(t *testing.T, parts ...string) (string, *listener, *notingLog) {
	t.Helper()
	log := &notingLog{}
	l, job := newListener(log)
	out := l.output()
	for _, p := range parts {
		if err := out(time.Now(), []byte(p)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(l.finish(), job.out.flush()); err != nil {
		t.Fatal(err)
	}
	return log.String(), l, log
}

func TestCommands(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"plain ::x::y\n":                         "plain ::x::y\n",
		"::add-mask::s3cret\ns3cret\n":           "::add-mask::***\n***\n",
		"::add-mask::a%0Ab1234%25\r\nb1234%\n":   "::add-mask::***\r\n***\n",
		"::add-mask::s3cret":                     "::add-mask::***",
		"::ADD-MASK::s3cret\ns3cret":             "::add-mask::***\n***",
		"::add-mask::\nx\n":                      "::add-mask::***\nx\n",
		"::add-mask::abc\nabc\n":                 "mayfly: add-mask: a value under 4 bytes is not masked: too much else would be\n::add-mask::***\nabc\n",
		"::debug::x\r\ny\n::debug::z\n::debug::": "y\n",
		"::group::a\nb\n::endgroup::\n":          "::group::a\nb\n::endgroup::\n",
		"::echo::on\n::unknown::x\n":             "::echo::on\n::unknown::x\n",
		"::stop-commands::T\n::add-mask::s3cret\n::debug::d\n::t::\n::add-mask::s3cret\ns3cret": "::stop-commands::T\n::add-mask::***\n::debug::d\n::t::\n::add-mask::***\n***",
		"::stop-commands::debug\n::debug::d\n":                                                  "::stop-commands::debug\nmayfly: stop-commands: the token is empty or the name of a command: anybody could guess it\n",
		"::set-output name=a::b\n":                                                              "::set-output name=a::b\n",
	} {
		if strings.Contains(text, "stop-commands::T") {
			// What is printed while nobody listens is shown as it stands.
			want = strings.Replace(want, "::add-mask::***\n", "::add-mask::s3cret\n", 1)
		}
		for cut := range len(text) + 1 {
			if got, _, _ := listened(t, text[:cut], text[cut:]); got != want {
				t.Errorf("%q cut at %d: got %q, want %q", text, cut, got, want)
			}
		}
	}
}

func TestCommandsThatFailTheStep(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"::set-env name=a::b\n": "write NAME=VALUE to the file $GITHUB_ENV", "::add-path::/x\n": "write the directory to the file $GITHUB_PATH",
		"::set-output::b\n": "the property name is missing", "::save-state name=::b\n": "the property name is missing",
		"::stop-commands::\n": "the token is empty", "::set-output name=a::" + strings.Repeat("x", 1<<19) + "\n::set-output name=a::" + strings.Repeat("y", 1<<19) + "\n": "at most 1 MiB",
	} {
		got, l, _ := listened(t, text)
		if l.refused == nil || !strings.Contains(got, want) || len(l.outputs) > 1 {
			t.Errorf("%.40q: refused %v, log %.80q; want it refused with %q", text, l.refused, got, want)
		}
	}
	_, l, _ := listened(t, "::set-output name=A::1\n::set-output name=b::two%0Alines\n::set-output name=A::2\n::save-state name=x::y\n")
	if want := map[string]string{"A": "2", "b": "two\nlines"}; l.refused != nil || !reflect.DeepEqual(l.outputs, want) {
		t.Errorf("outputs: got %v, %v; want %v", l.outputs, l.refused, want)
	}
}

func TestAnnotations(t *testing.T) {
	t.Parallel()
	_, _, log := listened(t, "::add-mask::s3cret\n::error file=/workspace/a.go,line=1,endLine=2,col=3,endColumn=4,title=A s3cret::the s3cret%0Aline\n"+
		"::warning line=x,col=-1::w\n::Notice::n\n::error file=s3cret.go::"+strings.Repeat("x", noteBytes-2)+" s3cret\n")
	want := []providers.Annotation{
		{Level: "error", Title: "A ***", Message: "the ***\nline", File: "a.go", Line: 1, EndLine: 2, Column: 3, EndColumn: 4},
		{Level: "warning", Message: "w"},
		{Level: "notice", Message: "n"},
		{Level: "error", File: "***.go", Message: strings.Repeat("x", noteBytes-2) + " *…"},
	}
	if !reflect.DeepEqual(log.notes, want) {
		t.Errorf("got %+v\nwant %+v", log.notes, want)
	}
	shown, _, log := listened(t, strings.Repeat("::notice::n\n", notesMax+10))
	if len(log.notes) != notesMax || strings.Count(shown, "mayfly: more than") != 1 {
		t.Errorf("got %d annotations, want %d, and one line that says so", len(log.notes), notesMax)
	}
}

// A line of one output must not become part of a command of the other.
func TestOutputsDoNotMix(t *testing.T) {
	t.Parallel()
	log := &notingLog{}
	l, job := newListener(log)
	stdout, stderr := l.output(), l.output()
	for i, p := range []string{"::add-", "a warning\n", "mask::s3cret\n", "s3cret\n"} {
		out := stdout
		if i%2 == 1 {
			out = stderr
		}
		if err := out(time.Now(), []byte(p)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(l.finish(), job.out.flush()); err != nil {
		t.Fatal(err)
	}
	if got, want := log.String(), "a warning\n::add-mask::***\n***\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// What can be masked no more ends the job instead of being shown.
func TestMasksAreBounded(t *testing.T) {
	t.Parallel()
	log := &notingLog{}
	l, _ := newListener(log)
	out := l.output()
	var err error
	for i := range masksMax + 1 {
		text := "::add-mask::value-" + strings.Repeat("x", i) + "\n"
		if err = out(time.Now(), []byte(text+text)); err != nil && i < masksMax {
			t.Fatalf("value %d: %v", i, err)
		}
	}
	if !errors.Is(err, errMasks) {
		t.Errorf("got %v after %d values, want %v", err, masksMax+1, errMasks)
	}
	l, _ = newListener(log)
	if err := l.output()(time.Now(), []byte("::add-mask::"+strings.Repeat("x", maskBytes-20)+"\n::add-mask::"+strings.Repeat("y", 30)+"\n")); !errors.Is(err, errMasks) {
		t.Errorf("got %v, want %v", err, errMasks)
	}
}

func TestSummary(t *testing.T) {
	t.Parallel()
	log := &notingLog{}
	_, job := newListener(log)
	plain := &textLog{}
	_, other := newListener(plain)
	for _, s := range []*steps{job, other} {
		s.out.concealNext(newSecret())
		if err := errors.Join(s.out.write(time.Now(), 0, []byte("midline")), s.out.summary(2, "# s3cret")); err != nil {
			t.Fatal(err)
		}
	}
	if want := []string{"# ***"}; !reflect.DeepEqual(log.summary, want) || log.String() != "midline" {
		t.Errorf("an Annotator got %q and the log %q, want %q and no more in the log", log.summary, log.String(), want)
	}
	if want := "midline\n::group::Summary of the step\n# ***\n::endgroup::\n"; plain.String() != want {
		t.Errorf("a log that is no Annotator: got %q, want %q", plain.String(), want)
	}
	other.out.limit(3)
	if err := other.out.summary(2, "more than that"); err != nil || strings.Contains(plain.String(), "more than that") || !strings.Contains(plain.String(), "dropped") {
		t.Errorf("a summary beyond the limit of the log: %v, log %q; want it dropped, and said", err, plain.String())
	}
}

// BenchmarkOutput is all that a chunk of output goes through, with the secrets
// of a large job: the budget is 500 MB/s.
func BenchmarkOutput(b *testing.B) {
	text := []byte(strings.Repeat("2026-11-24T08:00:00Z compiling std::vector of package runner, 12 of 340 files\n", 800))[:32<<10]
	for _, secrets := range []int{0, 100} {
		b.Run(strconv.Itoa(secrets), func(b *testing.B) {
			l, job := newListener(&discard{})
			job.out.limit(1 << 62)
			for i := range secrets {
				sum := sha256.Sum256([]byte{byte(i)})
				job.out.concealNext(creds.NewSecret(hex.EncodeToString(sum[:20])))
			}
			out := l.output()
			b.SetBytes(int64(len(text)))
			for b.Loop() {
				if err := out(time.Time{}, text); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkMasks is the worst that a job can do with add-mask.
func BenchmarkMasks(b *testing.B) {
	for b.Loop() {
		l, _ := newListener(&discard{})
		out := l.output()
		for i := range masksMax {
			if err := out(time.Time{}, fmt.Appendf(nil, "::add-mask::value-%040d\nx\n", i)); err != nil {
				b.Fatal(err)
			}
		}
	}
}

type discard struct{ providers.Log }

func (discard) Write(time.Time, int, []byte) error { return nil }
