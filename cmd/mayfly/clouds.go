package main

import (
	"context"
	"time"

	"github.com/mayfly-ci/mayfly/configs"
	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/aws"
	"github.com/mayfly-ci/mayfly/creds/githubapp"
	"github.com/mayfly-ci/mayfly/creds/kubernetes"
	"github.com/mayfly-ci/mayfly/runner/outbound"
)

// audienceAWS is the one that AWS's own tools ask for.
const audienceAWS = "sts.amazonaws.com"

// aws shows the STS the agent's identity.
func (w *wiring) aws(_ string, section configs.Section, way *outbound.Exit) (closingIssuer, error) {
	var own struct {
		Service       string        `yaml:"service"`
		Endpoint      string        `yaml:"endpoint"`
		JobEndpoint   string        `yaml:"job_endpoint"`
		Region        string        `yaml:"region"`
		Role          string        `yaml:"role,required"`
		CAFile        string        `yaml:"ca_file"`
		Insecure      bool          `yaml:"insecure"`
		MaxSession    time.Duration `yaml:"max_session"`
		Audience      string        `yaml:"audience"`
		RevokerKey    string        `yaml:"revoker_key"`
		RevokerSecret string        `yaml:"revoker_secret_file"`
	}
	if err := section.Decode(&own); err != nil {
		return nil, err
	}
	mint, err := w.identityFor(own.Audience, audienceAWS)
	if err != nil {
		return nil, err
	}
	return aws.New(aws.Config{
		Service: own.Service, Endpoint: own.Endpoint, JobEndpoint: own.JobEndpoint, Region: own.Region, Role: own.Role,
		CAFile: section.Path(own.CAFile), Insecure: own.Insecure, MaxSession: own.MaxSession,
		Out: way.HTTP, RevokerKey: own.RevokerKey, RevokerSecret: secretFile(section, own.RevokerSecret),
		Sign: func(_ context.Context, s creds.Subject, lease string) (aws.Identity, error) {
			t, err := mint(s, lease)
			return aws.Identity{Token: t.Value, ID: t.ID}, err
		},
	})
}

// kubernetes asks an API server with the agent's own account there.
func (w *wiring) kubernetes(_ string, section configs.Section, way *outbound.Exit) (closingIssuer, error) {
	var own struct {
		Address    string `yaml:"address,required"`
		JobAddress string `yaml:"job_address"`
		CAFile     string `yaml:"ca_file"`
		Namespace  string `yaml:"namespace,required"`
		Account    string `yaml:"service_account"`
		Token      string `yaml:"token_file,required"`
	}
	if err := section.Decode(&own); err != nil {
		return nil, err
	}
	return kubernetes.New(kubernetes.Config{
		Address: own.Address, JobAddress: own.JobAddress, CAFile: section.Path(own.CAFile), Namespace: own.Namespace, Account: own.Account,
		Out: way.HTTP, Token: secretFile(section, own.Token), Owner: w.state.Owner,
	})
}

// githubApp is a GitHub App, with its private key.
func githubApp(_ string, section configs.Section, way *outbound.Exit) (closingIssuer, error) {
	var own struct {
		Address      string `yaml:"address"`
		CAFile       string `yaml:"ca_file"`
		App          string `yaml:"app,required"`
		Installation int64  `yaml:"installation,required"`
		Key          string `yaml:"private_key_file,required"`
	}
	if err := section.Decode(&own); err != nil {
		return nil, err
	}
	return githubapp.New(githubapp.Config{
		Address: own.Address, CAFile: section.Path(own.CAFile), Out: way.HTTP, App: own.App, Installation: own.Installation, Key: secretFile(section, own.Key),
	})
}

// secretFile reads a file anew at each use, so that a secret can be replaced while
// the agent runs. No file is nil.
func secretFile(section configs.Section, path string) func() (creds.Secret, error) {
	if path == "" {
		return nil
	}
	return func() (creds.Secret, error) { return configs.ReadSecret(section.Path(path)) }
}
