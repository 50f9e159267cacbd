// Command oauth is an OAuth 2.0 server for tests: the protocol is that of
// github.com/zitadel/oidc, which is certified; the clients, and what tokens
// there are, are in this file. It serves the socket that is its descriptor 3.
//
//	oauth ADDRESS SUBJECT-KEYS
//
// SUBJECT-KEYS is the URL of the keys that the subject tokens of exchanges are
// signed with. The clients are "agent" with the secret "agent-secret", and
// "generous", with "generous-secret", whose tokens have a scope more than they
// were asked for. "/api" is a resource that wants a token. "POST /test/down"
// makes the server drop every connection but this, "POST /test/up" ends that.
package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/zitadel/oidc/v3/example/server/storage"
	"github.com/zitadel/oidc/v3/pkg/client/rp"
	"github.com/zitadel/oidc/v3/pkg/oidc"
	"github.com/zitadel/oidc/v3/pkg/op"
)

// lifetime of a token; one with the scope "brief" has a tenth of it.
const lifetime = 5 * time.Minute

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "want: oauth ADDRESS SUBJECT-KEYS")
		os.Exit(2)
	}
	if err := serve(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func serve(address, keys string) error {
	issuer := "http://" + address
	s := &store{
		Storage: storage.NewStorage(storage.NewUserStore(issuer)),
		keys:    keys, issuer: issuer, tokens: map[string]token{},
	}
	provider, err := op.NewProvider(&op.Config{
		CryptoKey: sha256.Sum256([]byte("test")), CryptoKeyId: "key1", AuthMethodPost: true, GrantTypeRefreshToken: true,
	}, s, op.StaticIssuer(issuer), op.WithAllowInsecure(), op.WithLogger(slog.New(slog.NewTextHandler(os.Stderr, nil))))
	if err != nil {
		return err
	}
	var down atomic.Bool
	mux := http.NewServeMux()
	mux.Handle("/", provider)
	mux.HandleFunc("/api", s.resource(provider))
	mux.HandleFunc("POST /test/down", func(http.ResponseWriter, *http.Request) { down.Store(true) })
	mux.HandleFunc("POST /test/up", func(http.ResponseWriter, *http.Request) { down.Store(false) })
	l, err := net.FileListener(os.NewFile(3, "listener"))
	if err != nil {
		return err
	}
	return http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if down.Load() && !strings.HasPrefix(r.URL.Path, "/test/") {
			if c, _, err := w.(http.Hijacker).Hijack(); err == nil {
				_ = c.Close()
			}
			return
		}
		mux.ServeHTTP(w, r)
	}))
}

// A token is one that was given and not revoked.
type token struct {
	client, subject string
	scopes          []string
	expires         time.Time
}

// A store is what the protocol asks. What is not below, the example's has, and
// no test gets there.
type store struct {
	*storage.Storage
	keys, issuer string

	mu     sync.Mutex
	tokens map[string]token
}

func secretOf(client string) string { return client + "-secret" }

func (s *store) check(client, secret string) error {
	if !slices.Contains([]string{"agent", "generous"}, client) || secret != secretOf(client) {
		return oidc.ErrInvalidClient().WithDescription("wrong client or secret")
	}
	return nil
}

// A client may do what the tests do.
type client struct{ *storage.Client }

func (client) GrantTypes() []oidc.GrantType {
	return []oidc.GrantType{oidc.GrantTypeClientCredentials, oidc.GrantTypeTokenExchange}
}

func (s *store) AuthorizeClientIDSecret(_ context.Context, id, secret string) error {
	return s.check(id, secret)
}

func (s *store) GetClientByClientID(_ context.Context, id string) (op.Client, error) {
	return client{storage.WebClient(id, secretOf(id))}, s.check(id, secretOf(id))
}

func (s *store) ClientCredentials(ctx context.Context, id, secret string) (op.Client, error) {
	if err := s.check(id, secret); err != nil {
		return nil, err
	}
	return s.GetClientByClientID(ctx, id)
}

func (s *store) ClientCredentialsTokenRequest(_ context.Context, id string, scopes []string) (op.TokenRequest, error) {
	scopes, err := given(id, scopes)
	return &oidc.JWTTokenRequest{Subject: id, Audience: []string{id}, Scopes: scopes}, err
}

// given are the scopes that a client gets.
func given(id string, asked []string) ([]string, error) {
	for _, scope := range asked {
		if !slices.Contains([]string{"api:read", "api:write", "brief"}, scope) {
			return nil, oidc.ErrInvalidScope().WithDescription("no scope %q", scope)
		}
	}
	if id == "generous" {
		asked = append(slices.Clone(asked), "api:admin")
	}
	return asked, nil
}

// VerifyExchangeSubjectToken wants a token of the other issuer for this server.
func (s *store) VerifyExchangeSubjectToken(ctx context.Context, text string, kind oidc.TokenType) (string, string, map[string]any, error) {
	if kind != oidc.JWTTokenType {
		return "", "", nil, errors.New("no JWT")
	}
	claims := new(oidc.IDTokenClaims)
	payload, err := oidc.ParseToken(text, claims)
	if err != nil {
		return "", "", nil, err
	}
	set := rp.NewRemoteKeySet(http.DefaultClient, s.keys)
	if err := oidc.CheckSignature(ctx, text, payload, claims, []string{"ES256"}, set); err != nil {
		return "", "", nil, err
	}
	if err := errors.Join(oidc.CheckAudience(claims, s.issuer), oidc.CheckExpiration(claims, 0)); err != nil {
		return "", "", nil, err
	}
	return claims.JWTID, claims.Subject, claims.Claims, nil
}

func (s *store) VerifyExchangeActorToken(context.Context, string, oidc.TokenType) (string, string, map[string]any, error) {
	return "", "", nil, errors.New("no actors")
}

// ValidateTokenExchangeRequest gives jobs of the main branch something, and no
// other.
func (s *store) ValidateTokenExchangeRequest(_ context.Context, r op.TokenExchangeRequest) error {
	if r.GetExchangeSubjectTokenClaims()["ref"] != "refs/heads/main" {
		return oidc.ErrInvalidGrant().WithDescription("not for this branch")
	}
	scopes, err := given(r.GetClientID(), r.GetScopes())
	r.SetCurrentScopes(scopes)
	r.SetSubject("job") // the library's tokens take no subject with a colon
	r.SetRequestedTokenType(oidc.AccessTokenType)
	return err
}

func (s *store) CreateAccessToken(_ context.Context, r op.TokenRequest) (string, time.Time, error) {
	t := token{client: r.GetSubject(), subject: r.GetSubject(), scopes: r.GetScopes(), expires: time.Now().Add(lifetime)}
	if x, ok := r.(op.TokenExchangeRequest); ok {
		t.client = x.GetClientID()
	}
	if slices.Contains(t.scopes, "brief") {
		t.expires = time.Now().Add(lifetime / 10)
	}
	id := uuid.NewString()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tokens[id] = t
	return id, t.expires, nil
}

func (s *store) find(id string) (token, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t, ok := s.tokens[id]
	if !ok || !t.expires.After(time.Now()) {
		return t, errors.New("no such token")
	}
	return t, nil
}

func (s *store) RevokeToken(_ context.Context, id, _, client string) *oidc.Error {
	t, err := s.find(id)
	if err == nil && t.client != client {
		return oidc.ErrInvalidClient().WithDescription("token of another client")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.tokens, id)
	return nil
}

func (s *store) SetIntrospectionFromToken(_ context.Context, i *oidc.IntrospectionResponse, id, subject, client string) error {
	t, err := s.find(id)
	if err == nil && t.client != client {
		err = errors.New("token of another client")
	}
	i.Subject, i.Scope, i.ClientID, i.Expiration = subject, t.scopes, t.client, oidc.FromTime(t.expires)
	return err
}

// resource is an API that asks this server about the token of each request.
func (s *store) resource(provider op.OpenIDProvider) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		id, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		if plain, err := provider.Crypto().Decrypt(id); err == nil {
			id, _, _ = strings.Cut(plain, ":")
		}
		t, err := s.find(id)
		if err != nil {
			w.Header().Set("WWW-Authenticate", `Bearer realm="api", error="invalid_token"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		_ = json.NewEncoder(w).Encode(map[string]any{"subject": t.subject, "scopes": t.scopes})
	}
}
