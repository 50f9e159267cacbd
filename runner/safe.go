package runner

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/runner/internal/seal"
)

// A Safe holds a small secret that outlives the agent, sealed with the key of the
// state: a provider's registration, say.
type Safe struct {
	path, name string
	key        *seal.Key
	mine       bool // the state is held, not only read
}

// Safe returns the one of that name, a name of a configuration's section. It
// need not exist.
func (s *State) Safe(name string) *Safe {
	return &Safe{path: filepath.Join(s.Dir, "safe", name), name: "safe/" + name, key: s.key, mine: s.lock != nil}
}

// Load returns what was saved last, nil if nothing was.
func (s *Safe) Load() ([]byte, error) {
	sealed, err := os.ReadFile(s.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	b, err := s.key.Open(s.name, sealed)
	if err != nil {
		return nil, fmt.Errorf("state %s: %w: restore seal.key, or remove the file to begin afresh", s.path, err)
	}
	return b, nil
}

// Save replaces it. It is on disk when Save returns. A state that was opened
// for reading refuses.
func (s *Safe) Save(b []byte) error {
	if !s.mine {
		return errPeeked
	}
	dir := filepath.Dir(s.path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("state: %w", err)
	}
	err := replace(s.path, s.key.Seal(s.name, b))
	if err == nil {
		err = syncDir(dir)
	}
	if err != nil {
		return fmt.Errorf("state: %w", err)
	}
	return nil
}

// Sealed is a secret that an operator gave to this installation, and when.
type Sealed struct {
	Secret creds.Secret `json:"-"`
	Since  time.Time    `json:"since"`
}

// sealedHeader begins the text of a sealed secret; its form is in the number.
const sealedHeader = "mayfly sealed 1\n"

// Seal makes of a secret a text that only this installation can open, and only
// for that name. It can be called beside a living agent.
func (s *State) Seal(name string, secret creds.Secret, at time.Time) (string, error) {
	if s.key.Count() == 0 {
		return "", errors.New("seal: no key here: the service manager gives it to the agent alone (CREDENTIALS_DIRECTORY)")
	}
	b, err := json.Marshal(struct {
		Sealed
		Text string `json:"text"`
	}{Sealed{Since: at.UTC().Truncate(time.Second)}, secret.Reveal()})
	if err != nil {
		return "", fmt.Errorf("seal: %w", err)
	}
	return sealedHeader + base64.StdEncoding.EncodeToString(s.key.Seal("secret/"+name, b)) + "\n", nil
}

// Unseal opens what Seal made for the same name. A text that is not sealed is
// itself the secret, since nobody knows when.
func (s *State) Unseal(name string, text creds.Secret) (Sealed, error) {
	body, sealed := strings.CutPrefix(text.Reveal(), sealedHeader)
	if !sealed {
		return Sealed{Secret: text}, nil
	}
	raw, err := base64.StdEncoding.DecodeString(strings.TrimSpace(body))
	if err != nil {
		return Sealed{}, errors.New("sealed secret: not what \"mayfly seal\" wrote")
	}
	if raw, err = s.key.Open("secret/"+name, raw); err != nil {
		return Sealed{}, fmt.Errorf("sealed secret: %w: seal it again with \"mayfly seal %s\"", err, name)
	}
	var in struct {
		Sealed
		Text string `json:"text"`
	}
	if err := json.Unmarshal(raw, &in); err != nil {
		return Sealed{}, errors.New("sealed secret: written by another version")
	}
	in.Secret = creds.NewSecret(in.Text)
	return in.Sealed, nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
