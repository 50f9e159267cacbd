package postgres

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/mayfly-ci/mayfly/creds"
)

const defaultPort = 5432

// connectTimeout bounds one connection attempt of the administrator, so that a
// server that takes connections and says nothing does not use up the whole
// time that a release has. A login takes milliseconds; set 2026-11-23.
const connectTimeout = 10 * time.Second

// lockTimeout bounds the wait for a lock of somebody else; a revocation tries
// again until its context ends. Set 2026-11-23.
const lockTimeout = time.Second

// A Config says how the administrator reaches the server and what leases may
// have. The zero value of every field that may be zero is the safe one.
type Config struct {
	Host     string `yaml:"host" json:"host"` // name, address, or directory of a socket
	Port     int    `yaml:"port" json:"port"` // 0 is 5432
	Database string `yaml:"database" json:"database"`
	User     string `yaml:"user" json:"user"`

	// PasswordFile is read at every connection, so that the password can be
	// changed under a running agent. It must not be open to all users.
	PasswordFile string       `yaml:"password_file" json:"password_file"`
	Password     creds.Secret `yaml:"-" json:"-"` // used if there is no file

	// SSLMode is verify-full (the default), verify-ca, require or disable, as
	// in libpq. The last two do not say who the server is: then only SCRAM,
	// which tells the other side nothing, is used to log in.
	SSLMode string `yaml:"sslmode" json:"sslmode"`
	RootCA  string `yaml:"root_ca" json:"root_ca"` // PEM file; "" trusts the system's

	// JobHost and JobPort are where jobs find the server, if that is not where
	// the agent does.
	JobHost string `yaml:"job_host" json:"job_host"`
	JobPort int    `yaml:"job_port" json:"job_port"`

	// AllowedRoles are the roles that a scope may ask membership of.
	AllowedRoles []string `yaml:"allowed_roles" json:"allowed_roles"`

	// DropDependents lets a revocation drop what others made on top of the
	// job's objects (a view over its table). Without it such a role is left
	// without login, password and sessions, and Revoke says what is in the way.
	DropDependents bool `yaml:"drop_dependents" json:"drop_dependents"`

	Owner string             `yaml:"-" json:"-"` // installation id
	Trace func(point string) `yaml:"-" json:"-"` // called between outside effects; nil is none
	Now   func() time.Time   `yaml:"-" json:"-"` // clock of the agent; nil is time.Now
}

// Validate reports everything that is wrong with c, by the names of the file.
func (c Config) Validate() error {
	var errs []error
	wrong := func(bad bool, format string, args ...any) {
		if bad {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	wrong(c.Host == "" || strings.Contains(c.Host, ","), "host %q: want one name, address or socket directory", c.Host)
	wrong(c.Port < 0 || c.Port > 65535, "port %d: want 1 to 65535", c.Port)
	wrong(c.Database == "", "database: missing; name the one the administrator connects to")
	wrong(c.User == "", "user: missing; name the administrator's role")
	wrong(!c.Password.IsZero() && c.PasswordFile != "", "password_file: there is a password already; give one of them")
	wrong(!slices.Contains([]string{"", "verify-full", "verify-ca", "require", "disable"}, c.SSLMode),
		"sslmode %q: want verify-full, verify-ca, require or disable", c.SSLMode)
	wrong(c.RootCA != "" && !c.verified(), "root_ca: not used with sslmode %s; want verify-full or verify-ca", c.SSLMode)
	wrong(strings.HasPrefix(c.Host, "/") && c.JobHost == "", "job_host: missing; jobs cannot reach the socket of %s", c.Host)
	wrong(strings.ContainsAny(c.JobHost, ",/ "), "job_host %q: want a name or address", c.JobHost)
	wrong(c.JobPort < 0 || c.JobPort > 65535, "job_port %d: want 1 to 65535", c.JobPort)
	wrong(c.Owner == "", "owner: missing; it is the installation's id")
	for _, text := range []string{c.Host, c.Database, c.User, c.RootCA, c.JobHost} {
		wrong(strings.ContainsRune(text, 0), "%q contains a zero byte", text)
	}
	for _, role := range c.AllowedRoles {
		if err := checkIdentifier(role); err != nil {
			errs = append(errs, fmt.Errorf("allowed_roles: %w", err))
		}
	}
	return errors.Join(errs...)
}

// verified says whether a connection proves who the server is.
func (c Config) verified() bool { return c.sslMode() == "verify-full" || c.sslMode() == "verify-ca" }

func (c Config) sslMode() string {
	if c.SSLMode == "" {
		return "verify-full"
	}
	return c.SSLMode
}

func (c Config) port() int {
	if c.Port == 0 {
		return defaultPort
	}
	return c.Port
}

// jobAddress is where a job finds the server.
func (c Config) jobAddress() (host, port string) {
	host, p := c.JobHost, c.JobPort
	if host == "" {
		host = c.Host
	}
	if p == 0 {
		p = c.port()
	}
	return host, strconv.Itoa(p)
}

// address is where the agent finds the server, for people.
func (c Config) address() string { return net.JoinHostPort(c.Host, strconv.Itoa(c.port())) }

// connection is the configuration of a connection, without a password. Nothing
// of it comes from the environment or the home directory, which pgx reads as
// libpq does.
func (c Config) connection() (*pgx.ConnConfig, error) {
	var dsn strings.Builder
	quote := strings.NewReplacer(`\`, `\\`, `'`, `\'`)
	for _, p := range [][2]string{
		{"host", c.Host},
		{"port", strconv.Itoa(c.port())},
		{"dbname", c.Database},
		{"user", c.User},
		{"sslmode", c.sslMode()},
		{"sslrootcert", c.RootCA},
		{"sslcert", ""},
		{"sslkey", ""},
		{"sslcertmode", "disable"},
		{"sslnegotiation", "postgres"},
		{"sslsni", "1"},
		{"passfile", ""},
		{"target_session_attrs", "any"},
		{"connect_timeout", "0"},
		{"min_protocol_version", "3.0"},
		{"max_protocol_version", "3.0"},
		{"channel_binding", "prefer"},
		{"require_auth", ""},
	} {
		fmt.Fprintf(&dsn, "%s='%s' ", p[0], quote.Replace(p[1]))
	}
	conf, err := pgx.ParseConfig(dsn.String()) // holds no password that an error could show
	if err != nil {
		return nil, fmt.Errorf("connection to %s: %w", c.address(), err)
	}
	conf.Password = ""
	conf.Fallbacks = nil
	conf.RuntimeParams = map[string]string{"application_name": "mayfly"}
	conf.ConnectTimeout = connectTimeout
	if !c.verified() {
		conf.RequireAuth = "scram-sha-256,none"
	}
	return conf, nil
}

// A Way is how an issuer leaves this machine. The zero value dials directly, and
// believes whom the system does.
type Way struct {
	// Dial reaches the server, by its name.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Roots verify the server's certificate where there is no Config.RootCA.
	Roots *x509.CertPool
}

// connection is that of the configuration, by the issuer's way.
func (i *Issuer) connection() (*pgx.ConnConfig, error) {
	conf, err := i.config.connection()
	if err != nil {
		return nil, err
	}
	if i.Way.Dial != nil {
		conf.DialFunc = i.Way.Dial
		conf.LookupFunc = func(_ context.Context, host string) ([]string, error) { return []string{host}, nil } // a proxy wants the name
	}
	if conf.TLSConfig != nil && i.config.RootCA == "" && i.Way.Roots != nil {
		conf.TLSConfig.RootCAs = i.Way.Roots
	}
	return conf, nil
}

// password is the administrator's.
func (c Config) password() (string, error) {
	if c.PasswordFile == "" {
		return c.Password.Reveal(), nil
	}
	info, err := os.Stat(c.PasswordFile)
	if err != nil {
		return "", fmt.Errorf("password_file: %w", err)
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o007 != 0 {
		return "", fmt.Errorf("password_file %s: %w: mode %v; want a file that is closed to others (chmod o-rwx)", c.PasswordFile, fs.ErrPermission, info.Mode())
	}
	b, err := os.ReadFile(c.PasswordFile)
	if err != nil {
		return "", fmt.Errorf("password_file: %w", err)
	}
	return strings.TrimRight(string(b), "\r\n"), nil
}

// connect opens a connection of the administrator. A job may own functions,
// operators and settings: the search path keeps its names out of our
// statements, and the server closes connections that nobody uses any more.
func (i *Issuer) connect(ctx context.Context, database string) (*pgx.Conn, error) {
	conf, err := i.connection()
	if err != nil {
		return nil, err
	}
	if conf.Password, err = i.config.password(); err != nil {
		return nil, err
	}
	conf.Database = database
	conf.RuntimeParams = map[string]string{
		"application_name": "mayfly", "search_path": "pg_catalog, pg_temp", "client_encoding": "UTF8",
		"standard_conforming_strings": "on", "timezone": "UTC", "datestyle": "ISO", "statement_timeout": "0",
		"lock_timeout":         strconv.FormatInt(lockTimeout.Milliseconds(), 10),
		"idle_session_timeout": "5min", "idle_in_transaction_session_timeout": "1min",
	}
	conf.OnNotice = func(c *pgconn.PgConn, n *pgconn.Notice) {
		if n.Code == notGranted {
			c.CustomData()[notGranted] = n.Message
		}
	}
	conn, err := pgx.ConnectConfig(ctx, conf)
	if err != nil {
		return nil, fmt.Errorf("administrator: %w", err)
	}
	return conn, nil
}
