package aws

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
)

// maxPolicy is what the STS takes as a session policy, in characters.
const maxPolicy = 2048

// A Scope is what a lease of the policy asks for: statements, or all of the role.
type Scope struct {
	// Statements are those of a session policy. What the role itself may not do, no
	// statement allows.
	Statements []Statement `json:"statements,omitempty"`
	// WholeRole gives all that the role may do.
	WholeRole bool `json:"whole_role,omitempty"`
}

// A Statement is one of an IAM policy, under its names there.
type Statement struct {
	Sid         string          `json:"Sid,omitempty"`
	Effect      string          `json:"Effect"`
	Action      words           `json:"Action,omitempty"`
	NotAction   words           `json:"NotAction,omitempty"`
	Resource    words           `json:"Resource,omitempty"`
	NotResource words           `json:"NotResource,omitempty"`
	Condition   json.RawMessage `json:"Condition,omitempty"`
}

// words are one or several.
type words []string

// UnmarshalJSON implements json.Unmarshaler.
func (w *words) UnmarshalJSON(text []byte) error {
	var one string
	if json.Unmarshal(text, &one) == nil {
		*w = words{one}
		return nil
	}
	var many []string
	if err := json.Unmarshal(text, &many); err != nil {
		return err
	}
	*w = many
	return nil
}

// CheckScope implements creds.ScopeChecker. It asks no server.
func (i *Issuer) CheckScope(scope json.RawMessage) error {
	s, err := i.parseScope(scope)
	if err != nil {
		return err
	}
	_, err = i.policy(s, time.Unix(0, 0))
	return err
}

func (i *Issuer) parseScope(text json.RawMessage) (Scope, error) {
	var s Scope
	if len(text) == 0 {
		text = json.RawMessage("{}")
	}
	d := json.NewDecoder(strings.NewReader(string(text)))
	d.DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		return s, fmt.Errorf("%w: %w", creds.ErrBadScope, err)
	}
	bad := ""
	switch {
	case d.More():
		bad = "more than one value"
	case len(s.Statements) == 0 && !s.WholeRole:
		bad = "asks for nothing: write statements, or whole_role: true"
	case len(s.Statements) > 0 && s.WholeRole:
		bad = "want either statements or whole_role"
	}
	for n, st := range s.Statements {
		if why := i.badStatement(st); why != "" {
			bad = fmt.Sprintf("statement %d: %s", n+1, why)
		}
	}
	if bad != "" {
		return s, fmt.Errorf("%w: %s", creds.ErrBadScope, bad)
	}
	return s, nil
}

// badStatement says what is wrong with one. At MinIO a session may hold rights of
// the object store only: with those of "admin:" it could make itself an access key
// that lives on.
func (i *Issuer) badStatement(s Statement) string {
	switch {
	case s.Effect != "Allow" && s.Effect != "Deny":
		return fmt.Sprintf("Effect %q: want Allow or Deny", s.Effect)
	case (len(s.Action) == 0) == (len(s.NotAction) == 0):
		return "want Action or NotAction"
	case (len(s.Resource) == 0) == (len(s.NotResource) == 0):
		return "want Resource or NotResource"
	case i.config.minio() && len(s.NotAction) > 0:
		return "NotAction: not at minio"
	}
	for _, action := range s.Action {
		if i.config.minio() && !strings.HasPrefix(action, "s3:") {
			return fmt.Sprintf("Action %q: want one of s3: at minio", action)
		}
	}
	return ""
}

// policy is the session's: what the scope says, until end.
func (i *Issuer) policy(s Scope, end time.Time) (string, error) {
	everything, resource := "*", "*"
	if i.config.minio() {
		everything, resource = "s3:*", "arn:aws:s3:::*"
	}
	statements := s.Statements
	if s.WholeRole {
		statements = []Statement{{Effect: "Allow", Action: words{everything}, Resource: words{resource}}}
	}
	over, err := json.Marshal(map[string]any{"DateGreaterThanEquals": map[string]string{"aws:CurrentTime": end.UTC().Format(time.RFC3339)}})
	if err != nil {
		return "", err
	}
	statements = append(statements[:len(statements):len(statements)],
		Statement{Effect: "Deny", Action: words{everything}, Resource: words{resource}, Condition: over})
	if !i.config.minio() {
		statements = append(statements, Statement{Effect: "Deny", Action: words{"sts:AssumeRole"}, Resource: words{"*"}})
	}
	text, err := json.Marshal(map[string]any{"Version": "2012-10-17", "Statement": statements})
	if err != nil {
		return "", fmt.Errorf("%w: %w", creds.ErrBadScope, err)
	}
	if len(text) > maxPolicy {
		return "", fmt.Errorf("%w: session policy of %d characters, %d at most: name fewer resources, or give the role less and write whole_role: true", creds.ErrBadScope, len(text), maxPolicy)
	}
	return string(text), nil
}

// denial is the policy of a role that ends one session. A session's name follows
// the last colon of aws:userid, and is given once in the life of an installation,
// so that sessions which are being made now are meant too: there is no condition
// on the time of issue.
func denial(name string) (string, error) {
	text, err := json.Marshal(map[string]any{"Version": "2012-10-17", "Statement": map[string]any{
		"Effect": "Deny", "Action": "*", "Resource": "*",
		"Condition": map[string]any{"StringLike": map[string]string{"aws:userid": "*:" + name}},
	}})
	return string(text), err
}
