package policy

import (
	"errors"
	"net/netip"
	"strings"

	"github.com/mayfly-ci/mayfly/configs/strict"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// loginNode is an entry of a lease's list of logins: a destination that is no
// HTTP, where the gateway logs in with a value of the lease.
type loginNode struct {
	Self     strict.Node      `yaml:",self"`
	Protocol loginProtocol    `yaml:"protocol,required"`
	Name     host             `yaml:"name,required"`
	Port     port             `yaml:"port,required"`
	Value    field            `yaml:"value,required"`
	As       account          `yaml:"as"`
	User     field            `yaml:"user"`
	Database field            `yaml:"database"`
	HostKeys []hostKey        `yaml:"host-keys"`
	Commands []commandPattern `yaml:"commands"`
	Shell    bool             `yaml:"shell"`
	SFTP     bool             `yaml:"sftp"`
	Resolve  *[]prefix        `yaml:"resolve"`
	CA       certificates     `yaml:"ca"`
	Purpose  purpose          `yaml:"purpose"`
}

type loginProtocol egress.Protocol

func (p *loginProtocol) UnmarshalText(b []byte) error {
	*p = loginProtocol(b)
	return oneWord(b, "protocol of a login", string(egress.SSH), string(egress.Postgres))
}

// account is a user of the destination.
type account string

func (a *account) UnmarshalText(b []byte) error {
	*a = account(b)
	return word(b, "a user", `[A-Za-z0-9_][A-Za-z0-9._@-]{0,62}`)
}

// hostKey is one of a destination, and commandPattern what it may be asked to
// run. Their checks are the gateway's own.
type (
	hostKey        string
	commandPattern string
)

func (k *hostKey) UnmarshalText(b []byte) error {
	*k = hostKey(b)
	return egress.CheckHostKey(string(b))
}

// UnmarshalText knows what variables stand for a word.
func (c *commandPattern) UnmarshalText(b []byte) error {
	*c = commandPattern(b)
	filled, err := pathPattern(b).fill(func(string) (string, error) { return "x", nil })
	if err != nil {
		return errors.New(strings.ReplaceAll(err.Error(), "path", "command"))
	}
	return egress.CheckCommand(filled)
}

// broker is what the gateway gets, and what the policy says is where.
func (n loginNode) broker(l leaseNode) (Broker, placed, error) {
	out := egressNode{
		Self: n.Self, Name: n.Name, Port: n.Port, Protocol: protocol(n.Protocol), Resolve: n.Resolve, CA: n.CA, Step: l.Step, Purpose: n.Purpose,
	}
	e, err := out.egress()
	e.Rule.Inject = &egress.Injection{Lease: string(l.Name), As: egress.Password, User: string(n.As), Uses: int(l.Uses)}
	b := Broker{Value: string(n.Value), User: string(n.User), Database: string(n.Database)}
	errs := []error{err, n.checkKeys()}
	switch egress.Protocol(n.Protocol) {
	case egress.SSH:
		e.Rule.Inject.As = egress.SSHKey
		e.Rule.Session = &egress.Session{HostKeys: texts(n.HostKeys), Commands: texts(n.Commands), Shell: n.Shell, SFTP: n.SFTP}
		errs = append(errs, n.checkSession())
	case egress.Postgres:
		b.User, b.Database = orDefault(b.User, "username"), orDefault(b.Database, "database")
	}
	if _, aerr := netip.ParseAddr(string(n.Name)); aerr == nil {
		errs = append(errs, n.Self.At("name").Errorf("a credential is for a name: name the host and add resolve: [%s]", n.Name))
	} else {
		errs = append(errs, out.checkResolve())
	}
	if strings.HasPrefix(string(n.Name), "*") {
		errs = append(errs, n.Self.At("name").Errorf("a credential is for one name: what is below %s may be anybody's", n.Name[2:]))
	}
	b.Rule = e.Rule
	return b, placed{e, n.Self}, strict.Join(errs...)
}

// checkSession wants what an SSH login cannot be without.
func (n loginNode) checkSession() error {
	var errs []error
	if len(n.HostKeys) == 0 {
		errs = append(errs, n.Self.At("host-keys").Errorf("host-keys is missing: who answers is not known otherwise; ssh-keyscan %s prints them, and whoever runs the host confirms them", n.Name))
	}
	if (n.As == "") == (n.User == "") {
		errs = append(errs, n.Self.At("as").Errorf("write as: and the user who logs in, such as git, or user: and the fact of the lease that names one"))
	}
	if len(n.Commands) == 0 && !n.Shell && !n.SFTP {
		errs = append(errs, n.Self.At("commands").Errorf("nothing may be done there: name commands, or shell: true, or sftp: true (commands: [\"*\"] is any command)"))
	}
	return strict.Join(errs...)
}

// checkKeys refuses what is of the other protocol.
func (n loginNode) checkKeys() error {
	var errs []error
	for _, of := range []struct {
		protocol egress.Protocol
		keys     []string
	}{{egress.SSH, []string{"as", "host-keys", "commands", "shell", "sftp"}}, {egress.Postgres, []string{"database", "ca"}}} {
		for _, key := range of.keys {
			if n.Protocol != "" && egress.Protocol(n.Protocol) != of.protocol && !n.Self.Get(key).IsZero() {
				errs = append(errs, n.Self.At(key).Errorf("%s is for protocol: %s", key, of.protocol))
			}
		}
	}
	return strict.Join(errs...)
}

// checkLogin sends an entry of egress to where its credential is.
func (e egressNode) checkLogin() error {
	if p := egress.Protocol(e.Protocol); p == egress.SSH || p == egress.Postgres {
		return e.Self.At("protocol").Errorf("protocol %s: the gateway logs in with a lease: write it into login: of that lease; a job that has a credential of its own needs protocol: tcp", p)
	}
	return nil
}

// fillSession gives the commands of a rule the job's own facts.
func fillSession(s *egress.Session, j providers.Job) (*egress.Session, error) {
	if s == nil {
		return nil, nil
	}
	filled := *s
	filled.Commands = nil
	for _, c := range s.Commands {
		text, err := pathPattern(c).fill(func(name string) (string, error) { return safeFact(name, j) })
		if err != nil {
			return nil, errors.New(strings.Replace(err.Error(), "path", "command", 1))
		}
		filled.Commands = append(filled.Commands, text)
	}
	return &filled, filled.Check()
}
