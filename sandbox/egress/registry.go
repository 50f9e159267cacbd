package egress

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
)

// Registries of container images do not take a password with each request: they
// send the client to a realm, which gives it a token for a while (the
// distribution's token specification, "docker v2 authentication").
const (
	// OCIToken is at the realm of a registry: the password of Basic, or that of a
	// form (the specification's OAuth 2 flavour). What the realm gives is kept by
	// the gateway, and the job gets a placeholder in its place.
	OCIToken Place = "oci-token"
	// OCIRegistry is at the registry: Authorization: Bearer, with a token that the
	// realm gave. A request without one passes as it is, since the registry's
	// answer to it is what sends the client to the realm.
	OCIRegistry Place = "oci-registry"
)

// Tokens are what OCIToken and OCIRegistry of one registry have in common. Rules
// of both are opened together; they find each other by Lease, Realm and Service.
type Tokens struct {
	Realm   string // https URL of the token endpoint
	Service string // what the registry calls itself there
	// Scopes are what may be asked for, as "repository:acme/app:pull" or
	// "repository:acme/app:pull,push". "*" stands for one segment of a name.
	Scopes []string
}

// Endpoint is where the realm is: a name, a port and a path.
func (t Tokens) Endpoint() (name string, port uint16, path string, err error) {
	u, err := url.Parse(t.Realm)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" || u.Path == "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil || u.RawPath != "" {
		return "", 0, "", fmt.Errorf("realm %q: the URL of a token endpoint is needed, https://NAME/PATH", t.Realm)
	}
	port = 443
	if p := u.Port(); p != "" {
		if _, err := fmt.Sscanf(p+"\n", "%d\n", &port); err != nil || port == 0 {
			return "", 0, "", fmt.Errorf("realm %q: its port is a number from 1 to 65535", t.Realm)
		}
	}
	return u.Hostname(), port, u.Path, checkPattern(u.Path)
}

// Check says why the tokens cannot be asked for as it is written.
func (t Tokens) Check() error {
	_, _, _, err := t.Endpoint()
	all := []error{err}
	if t.Service == "" || strings.ContainsFunc(t.Service, unprintable) {
		all = append(all, errors.New("service: what the registry calls itself in its challenge is needed"))
	}
	if len(t.Scopes) == 0 {
		all = append(all, errors.New("scopes: what may be asked for is needed, as repository:NAME:pull"))
	}
	for _, s := range t.Scopes {
		kind, name, actions, ok := cutScope(s)
		if !ok || strings.ContainsFunc(kind, func(c rune) bool { return !tokenChar(c) }) || checkPattern("/"+name) != nil || strings.HasSuffix(name, "**") {
			all = append(all, fmt.Errorf("scope %q: TYPE:NAME:ACTIONS is needed, as repository:acme/app:pull,push", s))
		}
		for _, a := range actions {
			if a != "*" && (a == "" || strings.ContainsFunc(a, func(c rune) bool { return !tokenChar(c) })) {
				all = append(all, fmt.Errorf("scope %q: %q is no action", s, a))
			}
		}
	}
	return errors.Join(all...)
}

// Allows says whether a scope, as a client asks for it, is within Scopes.
func (t Tokens) Allows(scope string) bool {
	kind, name, actions, ok := cutScope(scope)
	return ok && !slices.ContainsFunc(actions, func(action string) bool {
		return !slices.ContainsFunc(t.Scopes, func(s string) bool {
			k, pattern, may, _ := cutScope(s)
			return k == kind && sameName(pattern, name) && (slices.Contains(may, action) || slices.Contains(may, "*"))
		})
	})
}

// sameName compares the name of a scope with a pattern. "*" stands for no ":" and no
// ",", since a realm may take a scope apart at its second colon, and we at its last.
func sameName(pattern, name string) bool {
	want, got := strings.Split(pattern, "/"), strings.Split(name, "/")
	return len(want) == len(got) && !slices.ContainsFunc(got, func(s string) bool { return s == "" }) &&
		slices.EqualFunc(want, got, func(w, g string) bool { return w == g || w == "*" && !strings.ContainsAny(g, ":,") })
}

// cutScope takes a scope apart. Names may have colons.
func cutScope(s string) (kind, name string, actions []string, ok bool) {
	kind, rest, first := strings.Cut(s, ":")
	i := strings.LastIndex(rest, ":")
	if !first || i <= 0 || kind == "" || strings.ContainsFunc(s, unprintable) {
		return "", "", nil, false
	}
	return kind, rest[:i], strings.Split(rest[i+1:], ","), true
}

// Asking are the requests that a client asks for a token with.
func (t Tokens) Asking() []Request {
	_, _, path, err := t.Endpoint()
	if err != nil {
		return nil
	}
	return []Request{
		{Methods: []string{http.MethodGet}, Path: path, Query: []string{"service", "scope", "account", "client_id", "offline_token"}},
		{Methods: []string{http.MethodPost}, Path: path, Query: []string{}, ContentTypes: []string{"application/x-www-form-urlencoded"}},
	}
}

// Using are the requests that tokens of these scopes are for (the distribution
// specification), each by its whole path: a repository may have others below its
// name, and a registry may look at scopes less closely than its specification says.
// Layers are not mounted out of other repositories.
func (t Tokens) Using() []Request {
	read := []string{http.MethodGet, http.MethodHead}
	all := []Request{{Methods: read, Path: "/v2/"}, {Methods: read, Path: "/v2"}}
	for _, s := range t.Scopes {
		kind, name, actions, _ := cutScope(s)
		may := func(action string) bool { return slices.Contains(actions, action) || slices.Contains(actions, "*") }
		switch {
		case kind == "registry":
			all = append(all, Request{Methods: read, Path: "/v2/_" + strings.TrimPrefix(name, "_")})
			continue
		case kind != "repository":
			continue
		}
		add := func(methods []string, kinds ...string) {
			for _, kind := range kinds {
				all = append(all, Request{Methods: methods, Path: "/v2/" + name + kind})
			}
		}
		if may("pull") || may("push") {
			add(read, "/manifests/*", "/blobs/*", "/tags/list", "/referrers/*")
		}
		if may("push") {
			all = append(all, Request{Methods: []string{http.MethodPost}, Path: "/v2/" + name + "/blobs/uploads/", Query: []string{"digest", "mount"}})
			add([]string{http.MethodPut}, "/manifests/*")
			// Where the registry says that an upload goes on; GitHub's says "upload".
			add([]string{http.MethodGet, http.MethodPut, http.MethodPatch, http.MethodDelete}, "/blobs/uploads/*", "/blobs/upload/*")
		}
		if may("delete") {
			add([]string{http.MethodDelete}, "/manifests/*", "/blobs/*")
		}
	}
	return all
}

// checkTokens is what Check says of the two places.
func (in Injection) checkTokens() error {
	t, both := in.Tokens, in.As == OCIToken || in.As == OCIRegistry
	switch {
	case t == nil && !both:
		return nil
	case t == nil || !both:
		return errors.New("as oci-registry, and nothing else, has a realm, a service and scopes")
	case in.As == OCIRegistry && !in.Pass:
		return errors.New("as oci-registry: a request without a token passes, since its answer says where tokens are")
	}
	return t.Check()
}
