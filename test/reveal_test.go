package test

import (
	"go/ast"
	"slices"
	"testing"
)

// revealers are the functions that may turn a creds.Secret into a string, and
// why. Everything else handles the Secret, which prints as "[secret]".
var revealers = map[string]string{
	"creds/aws/issue.go (*Issuer).assume":                        "the job's identity leaves for the STS, over TLS",
	"creds/aws/revoke.go (*Issuer).revoker":                      "the access key signs the policy that ends a session, and does not leave",
	"creds/gitea/client.go (*Issuer).asBot":                      "the bot's password leaves for the server that it is of, over TLS",
	"creds/githubapp/client.go (*Issuer).key":                    "the App's private key signs who it is, and does not leave",
	"creds/kubernetes/client.go (*Issuer).asAgent":               "the agent's own token leaves for the API server, over TLS",
	"creds/mask/encodings.go needlesOf":                          "the mask must know what to hide",
	"creds/mask/mask.go (*Set).With":                             "and what is too short to be hidden, which it refuses",
	"creds/oauth2/issue.go (*minting).ask":                       "the client's secret and the job's identity leave for the server that they are for, over TLS",
	"creds/oauth2/revoke.go (*Issuer).form":                      "the client's secret leaves for that server",
	"creds/postgres/config.go (Config).password":                 "the administrator's password leaves for the server, which proves who it is first",
	"creds/ssh/ssh.go (*Issuer).authority":                       "the authority's key is parsed, to sign with",
	"creds/vault/issue.go (*Issuer).enter":                       "the job's identity leaves for the server that it is for, over TLS",
	"providers/gitea/claim.go (*claim).reference":                "what a later life needs to end the job; the journal seals it",
	"providers/gitea/client.go (identity).sign":                  "the runner's token leaves for the server that gave it",
	"providers/gitea/file.go (*Provider).getOnce":                "the job's token leaves for the server that gave it",
	"providers/gitea/gitea.go digest":                            "only whether the registration token is another one than before is kept",
	"providers/gitea/register.go (*Provider).register":           "the registration token leaves for the server",
	"providers/workflow/value.go (*evaluator).canonical":         "an expression of the workflow computes with it: ${{ secrets.X }}",
	"runner/broker.go (*steps).broker":                           "a certificate is no secret; issuers may give it among their values",
	"runner/broker.go contains":                                  "a field that has a brokered value in it is not given to the job",
	"runner/broker.go placeholder":                               "a placeholder has the length and the kinds of characters",
	"runner/ask.go (*door).shown":                                "what the job shows is compared with it",
	"runner/ask.go askFor":                                       "the token leaves for the job that may ask for it",
	"runner/broker.go (holding).field":                           "the value becomes a variable or a file of the step that the policy named",
	"runner/tools.go (*steps).serveAWS":                          "what the job has to show becomes a variable of the step",
	"runner/tools.go (*steps).serveOIDC":                         "what the job has to show becomes a variable of the step",
	"runner/gitcache/git.go (*Cache).way":                        "the password of the relay that git goes out by leaves for that git, in a file in memory",
	"runner/gitcache/git.go (Want).file":                         "the token leaves for the git that fetches with it, in a file in memory",
	"runner/outbound/dial.go (*Way).authorization":               "the proxy's password leaves for the proxy that the configuration names",
	"runner/safe.go (*State).Seal":                               "the secret is written so that only this installation can read it",
	"runner/safe.go (*State).Unseal":                             "what a file has is looked at: it may be sealed",
	"runner/token.go (*life).replace":                            "the job's own token is found where the job has it, and replaced",
	"runner/token.go withToken":                                  "what the job has in place of its token, for the gateway",
	"sandbox/containerd/pull.go (*Runtime).fetch":                "the password leaves for the registry that it is for",
	"sandbox/docker/pull.go authorization":                       "a password leaves for the daemon, which pulls with it, and is hidden in what the daemon then says",
	"sandbox/egress/gateway/inject.go (*injected).apply":         "the credential leaves for the destination that its rule names, whose certificate was verified",
	"sandbox/egress/gateway/inject.go newInjection":              "a user and the credential encoded together are hidden together",
	"sandbox/egress/gateway/login.go clientKey":                  "the key signs in this process, to a destination whose host key the rule has",
	"sandbox/egress/gateway/oci.go (*injected).fillForm":         "the password leaves for the realm that its rule names, whose certificate was verified",
	"sandbox/egress/gateway/pglogin.go (*session).loginPostgres": "the password proves itself by SCRAM to the destination, whose certificate was verified",
	"sandbox/egress/gateway/resign.go (*injected).resign":        "the key signs a request for the destination; its secret part is not sent",
	"sandbox/egress/inject.go (Injection).checkValue":            "a private key must be that of its certificate",
	"sandbox/egress/inject.go checkCredential":                   "what no header carries, or could not be hidden in an answer, is refused",
	"sandbox/image/registry.go (*Store).registry":                "what an image is pulled with leaves for its registry; the guard below sends it nowhere else",
}

// TestReveal finds every mention of a Reveal method, called or not.
func TestReveal(t *testing.T) {
	t.Parallel()
	used := map[string]bool{}
	rule{
		name: "Reveal", why: "a secret leaves its wrapping only where it leaves for its user; revealers in reveal_test.go lists the places",
		check: func(s *source) []string {
			var found []string
			for _, in := range revealsIn(s) {
				used[in.place] = true
				if _, ok := revealers[in.place]; !ok {
					found = append(found, s.at(in.node.Pos(), "%s reveals a secret", in.place))
				}
			}
			return found
		},
		bad: [][2]string{
			code("a/b.go", "func f(s creds.Secret) string { return s.Reveal() }"),
			code("a/b.go", "func f(s creds.Secret) func() string { return s.Reveal }"),
			code("a/b.go", "var reveal = creds.Secret.Reveal"),
			code("a/b.go", "type i interface{ Reveal() string }"),
		},
		good: [][2]string{
			code("a/b_test.go", "func f(s creds.Secret) string { return s.Reveal() }"),
			code("creds/secret.go", "func (s Secret) Reveal() string { return *s.v }"),
		},
	}.hold(t)
	t.Cleanup(func() {
		for place := range revealers {
			if !used[place] {
				t.Errorf("%s may reveal secrets and does not", place)
			}
		}
	})
}

type revelation struct {
	place string // "runner/environ.go (*steps).field"
	node  ast.Node
}

// revealsIn are the places of a file, tests excepted, that name a Reveal method.
func revealsIn(s *source) []revelation {
	if isTest(s) {
		return nil
	}
	var found []revelation
	for _, d := range s.file.Decls {
		place := s.path
		if fn, ok := d.(*ast.FuncDecl); ok {
			place += " " + funcName(fn)
		}
		ast.Inspect(d, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.SelectorExpr:
				if n.Sel.Name == "Reveal" {
					found = append(found, revelation{place, n})
				}
			case *ast.InterfaceType:
				for _, m := range n.Methods.List {
					if slices.ContainsFunc(m.Names, func(id *ast.Ident) bool { return id.Name == "Reveal" }) {
						found = append(found, revelation{place, n})
					}
				}
			}
			return true
		})
	}
	return found
}
