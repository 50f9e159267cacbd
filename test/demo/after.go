package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/mayfly-ci/mayfly/providers/local"
	"github.com/mayfly-ci/mayfly/runner/audit"
)

func (s *stage) connect(ctx context.Context) (*pgx.Conn, error) {
	c, err := pgx.ParseConfig(fmt.Sprintf("host=127.0.0.1 port=%d user=postgres dbname=postgres sslmode=disable", s.database.Port()))
	if err != nil {
		return nil, err
	}
	c.Password = s.database.Password()
	return pgx.ConnectConfig(ctx, c)
}

func (s *stage) prepareDatabase(ctx context.Context) error {
	db, err := s.connect(ctx)
	if err != nil {
		return err
	}
	_, err = db.Exec(ctx, `create table builds (at timestamptz default now(), who text, what text)`)
	return errors.Join(err, db.Close(ctx))
}

// after shows what is left of the job.
func (s *stage) after(ctx context.Context, result local.Result) error {
	say("what the job wrote is there, and the role that wrote it is not")
	if err := s.showDatabase(ctx); err != nil {
		return err
	}
	say("the receipt: revoked at its issuer, then used once more and refused")
	if err := s.showReceipt(); err != nil {
		return err
	}
	say("mayfly jobs: what is still owed")
	if err := s.show(ctx, "jobs"); err != nil {
		return err
	}
	boxes, err := filepath.Glob(filepath.Join(s.dir, "state", "boxes-*", "boxes", "*"))
	if err != nil || len(boxes) > 0 {
		return fmt.Errorf("boxes left: %v, %w", boxes, err)
	}
	fmt.Println("  boxes left: none")
	say("the ledger: every attempt to reach something")
	if err := s.showLedger(result.Name); err != nil {
		return err
	}
	say("mayfly audit verify")
	if err := s.show(ctx, "audit", "verify"); err != nil {
		return err
	}
	say("how long each stage took")
	return s.showStages(result)
}

func (s *stage) showDatabase(ctx context.Context) error {
	db, err := s.connect(ctx)
	if err != nil {
		return err
	}
	var who string
	var roles int
	err = db.QueryRow(ctx, `select who, (select count(*) from pg_roles where rolname = who) from builds`).Scan(&who, &roles)
	if err := errors.Join(err, db.Close(ctx)); err != nil {
		return err
	}
	fmt.Printf("  builds: a row by %s; roles of that name: %d\n", who, roles)
	if roles != 0 {
		return fmt.Errorf("role %s is still there", who)
	}
	// PostgreSQL says the same to an absent role and to a wrong password.
	login := exec.CommandContext(ctx, "psql", "-w", "-h", "127.0.0.1", "-p", fmt.Sprint(s.database.Port()), "-U", who, "-d", "postgres", "-c", "select 1")
	login.Env = []string{"PATH=/usr/bin:/bin", "PGPASSWORD=anything"}
	out, err := login.CombinedOutput()
	if err == nil {
		return fmt.Errorf("%s could log in", who)
	}
	fmt.Print(indent("psql -U " + who + "\n" + strings.TrimSpace(string(out))))
	return nil
}

func (s *stage) events(only audit.Filter, do func(audit.Event) error) error {
	for e, err := range audit.Read(filepath.Join(s.dir, "state", "audit"), only) {
		if err != nil {
			return err
		}
		if err := do(e); err != nil {
			return err
		}
	}
	return nil
}

func (s *stage) showReceipt() error {
	found := false
	err := s.events(audit.Filter{Action: "lease.revoke"}, func(e audit.Event) error {
		found = found || e.Result == "ok" && e.Detail["refusal"] != ""
		fmt.Printf("  %s: %s\n    probe:   %s\n    refusal: %s\n    at:      %s\n", e.Object, e.Result, e.Detail["probe"], e.Detail["refusal"], e.Detail["refused_at"])
		return nil
	})
	if err == nil && !found {
		err = errors.New("no receipt in the audit")
	}
	return err
}

func (s *stage) showLedger(job string) error {
	return s.events(audit.Filter{Job: job, Action: "egress."}, func(e audit.Event) error {
		verdict := e.Detail["verdict"]
		if e.Result != "ok" {
			verdict = e.Result
		}
		fmt.Printf("  %-4s %-24s %-5s %s\n", strings.TrimPrefix(e.Action, "egress."), e.Object+":"+e.Detail["port"], e.Detail["protocol"], verdict)
		return nil
	})
}

func (s *stage) showStages(result local.Result) error {
	return s.events(audit.Filter{Job: result.Name, Action: "job.end"}, func(e audit.Event) error {
		b, err := json.MarshalIndent(e.Detail, "  ", "  ")
		fmt.Printf("  %s\n  claimed → reported, with everything gone: %v\n", b, result.CompletedAt.Sub(result.ClaimedAt))
		return err
	})
}
