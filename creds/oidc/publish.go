package oidc

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"encoding/json"
	"fmt"
	"math/big"
	"net/http"
	"time"
)

// Where the documents are, below the issuer's URL.
const (
	DiscoveryPath = "/.well-known/openid-configuration"
	KeysPath      = "/.well-known/jwks.json"
)

// maxAge is how long a verifier may keep a document; it is far below the time
// that a key is published before it signs.
const maxAge = 5 * time.Minute

// Discovery is the issuer's metadata (OpenID Connect Discovery 1.0, section 3),
// as far as a verifier of tokens needs it.
func (i *Issuer) Discovery() ([]byte, error) {
	return json.MarshalIndent(map[string]any{
		"issuer":                                i.config.URL,
		"jwks_uri":                              i.config.URL + KeysPath,
		"response_types_supported":              []string{"id_token"},
		"subject_types_supported":               []string{"public"},
		"id_token_signing_alg_values_supported": []string{es256, rs256},
		"claims_supported":                      append([]string{"iss", "sub", "aud", "exp", "nbf", "iat", "jti"}, claimNames()...),
	}, "", "  ")
}

// Keys is the set of public keys (RFC 7517, section 5), the next one too.
func (i *Issuer) Keys() ([]byte, error) {
	ring, err := i.keys(i.config.Now())
	if err != nil {
		return nil, err
	}
	set := []map[string]string{}
	for _, k := range ring.Keys {
		private, err := k.private()
		if err != nil {
			return nil, err
		}
		public := map[string]string{"kid": k.ID, "alg": k.Algorithm, "use": "sig"}
		switch p := private.Public().(type) {
		case *ecdsa.PublicKey:
			point, err := p.Bytes() // 4, x, y
			if err != nil {
				return nil, fmt.Errorf("key %s: %w", k.ID, err)
			}
			public["kty"], public["crv"] = "EC", "P-256"
			public["x"], public["y"] = encode(point[1:33]), encode(point[33:])
		case *rsa.PublicKey:
			public["kty"], public["n"], public["e"] = "RSA", encode(p.N.Bytes()), encode(big.NewInt(int64(p.E)).Bytes())
		}
		set = append(set, public)
	}
	return json.MarshalIndent(map[string]any{"keys": set}, "", "  ")
}

// NextKey is when the next key begins to sign. Copies of the documents must be
// renewed before.
func (i *Issuer) NextKey() (time.Time, error) {
	ring, err := i.keys(i.config.Now())
	if err != nil {
		return time.Time{}, err
	}
	return ring.Keys[len(ring.Keys)-1].Begin, nil
}

// Documents are both, by their paths.
func (i *Issuer) Documents() (map[string][]byte, error) {
	discovery, err := i.Discovery()
	if err != nil {
		return nil, err
	}
	keys, err := i.Keys()
	if err != nil {
		return nil, err
	}
	return map[string][]byte{DiscoveryPath: discovery, KeysPath: keys}, nil
}

// ServeHTTP serves the documents to anybody; they are public.
func (i *Issuer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	documents, err := i.Documents()
	if err != nil {
		http.Error(w, "the keys cannot be read", http.StatusServiceUnavailable)
		return
	}
	b, ok := documents[r.URL.Path]
	if !ok || r.Method != http.MethodGet && r.Method != http.MethodHead {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", fmt.Sprintf("public, max-age=%d", int(maxAge.Seconds())))
	_, _ = w.Write(b) // who asked has gone
}
