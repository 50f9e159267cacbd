package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/configs"
	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/runner/audit"
	"github.com/mayfly-ci/mayfly/runner/outbound"
	"github.com/mayfly-ci/mayfly/sandbox/egress/gateway"
)

// outbound makes the way out of everything that the agent asks itself. record is
// nil where nothing is asked.
func (w *wiring) outbound(record audit.Sink) error {
	c, authorities, err := outboundConfig(w.config.Outbound)
	if err != nil {
		return exitError{exitUsage, err}
	}
	c.Audit, w.authorities = record, authorities
	if w.out, err = outbound.New(c); err != nil {
		return exitError{exitUsage, w.config.Outbound.Errorf("", "%w", err)}
	}
	w.closers = append(w.closers, w.out.Close)
	return nil
}

// outboundConfig is the section, and its authorities with the system's as PEM.
func outboundConfig(section configs.Section) (c outbound.Config, authorities string, err error) {
	var own struct {
		Proxy        string       `yaml:"proxy"`
		User         string       `yaml:"proxy_user"`
		PasswordFile string       `yaml:"proxy_password_file"`
		NoProxy      []string     `yaml:"no_proxy"`
		CAFile       string       `yaml:"ca_file"`
		Metadata     []netip.Addr `yaml:"metadata"`
	}
	if err := section.Decode(&own); err != nil {
		return c, "", err
	}
	c = outbound.Config{
		Proxy: own.Proxy, User: own.User, NoProxy: own.NoProxy, Metadata: own.Metadata,
		Forbidden: gateway.Forbidden, Shape: gateway.Shape,
	}
	if own.PasswordFile != "" {
		c.Password = func() (creds.Secret, error) { return configs.ReadSecret(section.Path(own.PasswordFile)) }
	}
	if own.CAFile == "" {
		return c, "", nil
	}
	c.Roots, authorities, err = withAuthorities(section.Path(own.CAFile))
	if err != nil {
		err = section.Errorf("ca_file", "%w", err)
	}
	return c, authorities, err
}

// withAuthorities are those of a file beside the system's.
func withAuthorities(path string) (*x509.CertPool, string, error) {
	own, err := os.ReadFile(path)
	if err != nil {
		return nil, "", err
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		return nil, "", fmt.Errorf("certificates of the system: %w", err)
	}
	if !pool.AppendCertsFromPEM(own) {
		return nil, "", fmt.Errorf("%s: no certificate in it", path)
	}
	// The same for git, which takes one file.
	for _, bundle := range []string{"/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"} {
		if b, err := os.ReadFile(bundle); err == nil {
			return pool, string(b) + "\n" + string(own), nil
		}
	}
	return pool, string(own), nil
}

// parent is the proxy for what gateways dial for jobs.
func (w *wiring) parent() *gateway.Parent {
	if w.out.Proxy() == "" {
		return nil
	}
	return &gateway.Parent{Covers: w.out.Proxied, Connect: w.out.Tunnel, Address: w.out.Proxy()}
}

// examineOutbound says which way the agent goes, and whether there is somebody.
func (w *wiring) examineOutbound(ctx context.Context) []finding {
	about := "outbound"
	f := finding{about, "proxy", stateOK, "none: the agent and the gateways dial directly"}
	if proxy := w.out.Proxy(); proxy != "" {
		f.Detail = proxy + ", for the agent and for what jobs may reach; it looks names up, so rules with resolve: need no_proxy"
		ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
		conn, err := (&net.Dialer{Timeout: 10 * time.Second}).DialContext(ctx, "tcp", proxy)
		cancel()
		if err == nil {
			err = conn.Close()
		}
		if err != nil {
			f.State, f.Detail = stateMissing, errors.Join(errors.New("nothing is reached without it"), err).Error()
		}
	}
	found := []finding{f}
	var ignored []string
	for _, name := range []string{"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"} {
		for _, name := range []string{name, strings.ToLower(name)} {
			if os.Getenv(name) != "" {
				ignored = append(ignored, name)
			}
		}
	}
	if len(ignored) > 0 {
		found = append(found, finding{about, "environment", stateOK, strings.Join(ignored, ", ") + ": set, and ignored; only outbound.proxy of the configuration counts"})
	}
	return found
}
