package oidc

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"
)

// The algorithms of RFC 7518, section 3.1.
const (
	es256 = "ES256"
	rs256 = "RS256"
)

const rsaBits = 2048

// A key signs from Begin on, until the next one does.
type key struct {
	ID        string    `json:"id"`
	Algorithm string    `json:"algorithm"`
	Begin     time.Time `json:"begin"`
	End       time.Time `json:"end,omitzero"` // of its publication; zero while it may sign
	PKCS8     []byte    `json:"pkcs8"`
}

// A ring is the keys that are published: old ones, the one that signs, and the
// next.
type ring struct {
	Keys []key `json:"keys"` // in the order of Begin
}

// signer is the key that signs now. Keys are saved before they are used.
func (i *Issuer) signer(now time.Time) (key, error) {
	r, err := i.keys(now)
	if err != nil {
		return key{}, err
	}
	for _, k := range slices.Backward(r.Keys) {
		if !k.Begin.After(now) {
			return k, nil
		}
	}
	return r.Keys[0], nil // the clock went back
}

// keys are those of now. They are read again each time: another command of the
// same installation may have made the first.
func (i *Issuer) keys(now time.Time) (*ring, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.ring == nil {
		r, err := i.load()
		if err != nil {
			return nil, err
		}
		i.ring = r
	}
	next := &ring{slices.Clone(i.ring.Keys)}
	changed, err := next.turn(now, i.config.Algorithm, i.config.Rotate)
	if err != nil || !changed {
		return i.ring, err
	}
	if err := i.save(next); err != nil {
		if len(i.ring.Keys) > 0 && i.ring.Keys[len(i.ring.Keys)-1].Algorithm == i.config.Algorithm {
			return i.ring, nil // a reader beside the agent, which turns them itself
		}
		return nil, fmt.Errorf("keys: %w", err)
	}
	i.ring = next
	return next, nil
}

func (i *Issuer) load() (*ring, error) {
	b, err := i.config.Store.Load()
	if err != nil {
		return nil, fmt.Errorf("keys: %w", err)
	}
	r := &ring{}
	if b != nil {
		if err := json.Unmarshal(b, r); err != nil {
			return nil, errors.New("keys: not written by this program: remove the file to begin afresh")
		}
	}
	for _, k := range r.Keys {
		if _, err := k.private(); err != nil {
			return nil, err
		}
	}
	return r, nil
}

func (i *Issuer) save(r *ring) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return i.config.Store.Save(b)
}

// turn drops keys whose time is over and makes those that are missing.
func (r *ring) turn(now time.Time, algorithm string, period time.Duration) (changed bool, _ error) {
	now = now.UTC().Truncate(time.Second)
	before := len(r.Keys)
	r.Keys = slices.DeleteFunc(r.Keys, func(k key) bool { return !k.End.IsZero() && k.End.Before(now) })
	changed = len(r.Keys) != before
	begin := now
	if n := len(r.Keys); n > 0 && r.Keys[n-1].Algorithm == algorithm {
		last := r.Keys[n-1].Begin
		if last.After(now) {
			return changed, nil // the next one is there
		}
		begin = last.Add(period)
		if begin.Before(now.Add(overlap)) {
			begin = now.Add(overlap) // nobody has seen it yet
		}
	} else if n > 0 { // another algorithm: what was to come does not
		r.Keys = slices.DeleteFunc(r.Keys, func(k key) bool { return k.Begin.After(now) })
	}
	for len(r.Keys) == 0 || !r.Keys[len(r.Keys)-1].Begin.After(now) {
		k, err := newKey(algorithm, begin)
		if err != nil {
			return false, err
		}
		if n := len(r.Keys); n > 0 && r.Keys[n-1].End.IsZero() {
			r.Keys[n-1].End = begin.Add(overlap)
		}
		r.Keys = append(r.Keys, k)
		begin = begin.Add(period)
	}
	return true, nil
}

func newKey(algorithm string, begin time.Time) (key, error) {
	var private crypto.Signer
	var err error
	if algorithm == rs256 {
		private, err = rsa.GenerateKey(rand.Reader, rsaBits)
	} else {
		private, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	}
	if err != nil {
		return key{}, fmt.Errorf("key: %w", err)
	}
	b, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return key{}, fmt.Errorf("key: %w", err)
	}
	k := key{Algorithm: algorithm, Begin: begin, PKCS8: b}
	public, err := x509.MarshalPKIXPublicKey(private.Public())
	if err != nil {
		return key{}, fmt.Errorf("key: %w", err)
	}
	sum := sha256.Sum256(public)
	k.ID = encode(sum[:12])
	return k, nil
}

func (k key) private() (crypto.Signer, error) {
	parsed, err := x509.ParsePKCS8PrivateKey(k.PKCS8)
	if err != nil {
		return nil, fmt.Errorf("key %s: not readable: remove the file of the keys to begin afresh", k.ID)
	}
	switch private := parsed.(type) {
	case *ecdsa.PrivateKey:
		if k.Algorithm == es256 && private.Curve == elliptic.P256() {
			return private, nil
		}
	case *rsa.PrivateKey:
		if k.Algorithm == rs256 && private.N.BitLen() >= rsaBits {
			return private, nil
		}
	}
	return nil, fmt.Errorf("key %s: not one of %s", k.ID, k.Algorithm)
}

// sign is the compact serialization of RFC 7515, section 7.1.
func sign(k key, claims map[string]any) (string, error) {
	header, err := json.Marshal(map[string]string{"alg": k.Algorithm, "typ": "JWT", "kid": k.ID})
	if err != nil {
		return "", err
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		return "", err
	}
	private, err := k.private()
	if err != nil {
		return "", err
	}
	text := encode(header) + "." + encode(payload)
	sum := sha256.Sum256([]byte(text))
	var signature []byte
	switch private := private.(type) {
	case *ecdsa.PrivateKey:
		r, s, err := ecdsa.Sign(rand.Reader, private, sum[:])
		if err != nil {
			return "", err
		}
		signature = append(fixed(r), fixed(s)...)
	case *rsa.PrivateKey:
		if signature, err = rsa.SignPKCS1v15(rand.Reader, private, crypto.SHA256, sum[:]); err != nil {
			return "", err
		}
	}
	return text + "." + encode(signature), nil
}

// fixed is a number of P-256 as RFC 7518 section 3.4 wants it: all 32 bytes.
func fixed(n *big.Int) []byte { return n.FillBytes(make([]byte, 32)) }

func encode(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }
