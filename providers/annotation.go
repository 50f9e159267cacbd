package providers

// A Level says how bad what an annotation says is.
type Level string

// Levels, worst first.
const (
	LevelError   Level = "error"
	LevelWarning Level = "warning"
	LevelNotice  Level = "notice"
)

// An Annotation is what a step said about a place in the code.
type Annotation struct {
	Step    int    `json:"step"` // index of the step
	Level   Level  `json:"level"`
	Title   string `json:"title,omitempty"`
	Message string `json:"message"`
	// File is relative to the workspace if it is in it. Lines and columns
	// begin at 1; 0 is not known.
	File      string `json:"file,omitempty"`
	Line      int    `json:"line,omitempty"`
	EndLine   int    `json:"end_line,omitempty"`
	Column    int    `json:"column,omitempty"`
	EndColumn int    `json:"end_column,omitempty"`
}

// An Annotator is a Log that keeps beside its lines what a user should see
// first. The log has the line of an annotation too, and the agent writes the
// summary into a log that is no Annotator. Everything is masked already. Calls
// are not concurrent with those of the Log.
type Annotator interface {
	// Annotate adds an annotation.
	Annotate(a Annotation) error
	// Summary adds Markdown, at most 1 MiB, to what a step says of itself. It
	// is called once for each script of the step that said something.
	Summary(step int, markdown []byte) error
}
