package oidc_test

import (
	"context"
	"sync"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/oidc"
)

// named knows which lease a request token is of, as whoever serves a job does.
type named struct {
	*oidc.Leases
	mu    sync.Mutex
	names map[string]string
}

func (n *named) Issue(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
	l, err := n.Leases.Issue(ctx, name, g)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.names[l.Values[creds.RequestToken].Reveal()] = name
	return l, err
}

func (n *named) nameOf(l creds.Lease) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.names[l.Values[creds.RequestToken].Reveal()]
}
