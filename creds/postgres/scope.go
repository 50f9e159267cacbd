package postgres

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"

	"github.com/mayfly-ci/mayfly/creds"
)

// Connections of a role: the default lets a test suite run in parallel, the
// maximum leaves a server of default size usable for others.
const (
	defaultConnections = 10
	maxConnections     = 50
)

const maxIdentifierBytes = 63 // PostgreSQL cuts what is longer, and names something else

// A Scope is what a grant asks for: the issuer's section of a policy. Empty
// asks for a login without any privilege but those that everybody has.
type Scope struct {
	Database    string   `json:"database"`    // "" is the administrator's
	Privileges  []string `json:"privileges"`  // on the database: connect, temporary, create
	Schemas     []Schema `json:"schemas"`     //
	Roles       []string `json:"roles"`       // membership, of Config.AllowedRoles only
	Connections int      `json:"connections"` // at a time; 0 is 10
	SearchPath  []string `json:"search_path"` // schemas; empty is the database's own
}

// A Schema is what a scope asks for in one schema. Being named is USAGE.
type Schema struct {
	Name       string    `json:"name"`
	Privileges []string  `json:"privileges"` // usage, create
	Tables     []Objects `json:"tables"`     // select, insert, update, delete, truncate
	Sequences  []Objects `json:"sequences"`  // usage, select, update
}

// Objects are tables or sequences with the same privileges. The name "*" alone
// is all that exist when the lease is issued.
type Objects struct {
	Names      []string `json:"names"`
	Privileges []string `json:"privileges"`
}

// The closed lists. TRIGGER is missing because a trigger runs with the rights
// of whoever touches the table next, long after the job; REFERENCES because it
// lets a job keep others from deleting their rows.
func databasePrivileges() []string { return []string{"connect", "temporary", "create"} }
func schemaPrivileges() []string   { return []string{"usage", "create"} }
func tablePrivileges() []string {
	return []string{"select", "insert", "update", "delete", "truncate"}
}
func sequencePrivileges() []string { return []string{"usage", "select", "update"} }

// parseScope reads and checks a scope. Its errors wrap creds.ErrBadScope.
func (i *Issuer) parseScope(raw []byte) (Scope, error) {
	var s Scope
	if len(bytes.TrimSpace(raw)) > 0 {
		d := json.NewDecoder(bytes.NewReader(raw))
		d.DisallowUnknownFields()
		if err := d.Decode(&s); err != nil {
			return Scope{}, fmt.Errorf("%w: %w", creds.ErrBadScope, err)
		}
		if _, err := d.Token(); !errors.Is(err, io.EOF) {
			return Scope{}, fmt.Errorf("%w: text after the end", creds.ErrBadScope)
		}
	}
	if s.Database == "" {
		s.Database = i.config.Database
	}
	if s.Connections == 0 {
		s.Connections = defaultConnections
	}
	if err := s.check(i.config.AllowedRoles); err != nil {
		return Scope{}, fmt.Errorf("%w: %w", creds.ErrBadScope, err)
	}
	return s, nil
}

func (s Scope) check(allowedRoles []string) error {
	errs := []error{
		at("database", checkIdentifier(s.Database)),
		at("privileges", checkPrivileges(s.Privileges, databasePrivileges())),
	}
	if s.Connections < 1 || s.Connections > maxConnections {
		errs = append(errs, fmt.Errorf("connections %d: want 1 to %d", s.Connections, maxConnections))
	}
	for _, role := range s.Roles {
		if !slices.Contains(allowedRoles, role) {
			errs = append(errs, fmt.Errorf("roles: %q is not in the allowed_roles of the issuer's configuration", role))
		}
	}
	for _, name := range s.SearchPath {
		errs = append(errs, at("search_path", checkIdentifier(name)))
	}
	for _, schema := range s.Schemas {
		where := fmt.Sprintf("schema %q", schema.Name)
		errs = append(errs, at(where, checkIdentifier(schema.Name)), at(where, checkPrivileges(schema.Privileges, schemaPrivileges())))
		for _, o := range schema.Tables {
			errs = append(errs, at(where+": tables", o.check(tablePrivileges())))
		}
		for _, o := range schema.Sequences {
			errs = append(errs, at(where+": sequences", o.check(sequencePrivileges())))
		}
	}
	return errors.Join(errs...)
}

func (o Objects) check(privileges []string) error {
	if len(o.Names) == 0 || len(o.Privileges) == 0 {
		return errors.New("want names and privileges")
	}
	errs := []error{checkPrivileges(o.Privileges, privileges)}
	if !o.all() {
		for _, name := range o.Names {
			errs = append(errs, checkIdentifier(name))
		}
		if slices.Contains(o.Names, "*") {
			errs = append(errs, errors.New(`"*" stands alone`))
		}
	}
	return errors.Join(errs...)
}

func (o Objects) all() bool { return slices.Equal(o.Names, []string{"*"}) }

func at(where string, err error) error {
	if err != nil {
		return fmt.Errorf("%s: %w", where, err)
	}
	return nil
}

// checkPrivileges compares with a closed list, so that what is written into a
// statement is one of our own words.
func checkPrivileges(asked, known []string) error {
	for _, p := range asked {
		if !slices.Contains(known, p) {
			return fmt.Errorf("privilege %q: want some of %s", p, strings.Join(known, ", "))
		}
	}
	return nil
}

func checkIdentifier(name string) error {
	if name == "" || len(name) > maxIdentifierBytes || !utf8.ValidString(name) || strings.ContainsRune(name, 0) {
		return fmt.Errorf("identifier %q: want 1 to %d bytes of UTF-8", name, maxIdentifierBytes)
	}
	return nil
}

// statements give role what s asks for. They run in the database of s.
func (s Scope) statements(role string) []string {
	to := " TO " + quote(role)
	out := []string{"GRANT " + list(append([]string{"connect"}, s.Privileges...)) + " ON DATABASE " + quote(s.Database) + to}
	for _, schema := range s.Schemas {
		in := quote(schema.Name)
		out = append(out, "GRANT "+list(append([]string{"usage"}, schema.Privileges...))+" ON SCHEMA "+in+to)
		for _, kind := range []struct {
			word    string
			objects []Objects
		}{{"TABLE", schema.Tables}, {"SEQUENCE", schema.Sequences}} {
			for _, o := range kind.objects {
				out = append(out, "GRANT "+list(o.Privileges)+" ON "+o.target(kind.word, schema.Name)+to)
			}
		}
	}
	for _, member := range s.Roles {
		out = append(out, "GRANT "+quote(member)+to)
	}
	if len(s.SearchPath) > 0 {
		var path []string
		for _, name := range s.SearchPath {
			path = append(path, quote(name))
		}
		out = append(out, "ALTER ROLE "+quote(role)+" SET search_path TO "+strings.Join(path, ", "))
	}
	return out
}

func (o Objects) target(kind, schema string) string {
	if o.all() {
		return "ALL " + kind + "S IN SCHEMA " + quote(schema)
	}
	var names []string
	for _, name := range o.Names {
		names = append(names, quote(schema, name))
	}
	return kind + " " + strings.Join(names, ", ")
}

func list(privileges []string) string {
	slices.Sort(privileges)
	return strings.ToUpper(strings.Join(slices.Compact(privileges), ", "))
}

// quote makes an identifier of parts, whatever they contain.
func quote(parts ...string) string { return pgx.Identifier(parts).Sanitize() }
