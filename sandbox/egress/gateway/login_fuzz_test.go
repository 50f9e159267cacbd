package gateway

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/jackc/pgx/v5/pgproto3"
	"golang.org/x/crypto/ssh"
)

// FuzzStartup: what is accepted means the same to a server.
func FuzzStartup(f *testing.F) {
	good := func(version uint32, parameters map[string]string) []byte {
		b, err := (&pgproto3.StartupMessage{ProtocolVersion: version, Parameters: parameters}).Encode(nil)
		if err != nil {
			f.Fatal(err)
		}
		return b
	}
	f.Add(good(codeThree, map[string]string{"user": "u", "database": "d", "options": "-c x=y"}))
	f.Add(good(codeThree+2, map[string]string{"user": "u", "_pq_.x": "y"}))
	f.Add([]byte("\x00\x00\x00\x1c\x00\x03\x00\x00user\x00a\x00user\x00b\x00\x00"))
	f.Add([]byte{0, 0, 0, 8, 4, 210, 22, 47})
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		code, body, err := readPacket(r)
		if err != nil {
			return
		}
		if size := int(binary.BigEndian.Uint32(b)); len(b)-r.Len() != size || size > startupMax {
			t.Fatalf("read %d bytes of a packet of %d", len(b)-r.Len(), size)
		}
		s, err := parseStartup(code, body)
		if err != nil {
			return
		}
		var m pgproto3.StartupMessage
		if err := m.Decode(b[4 : 8+len(body)]); err != nil {
			if code <= codeThree+2 {
				t.Fatalf("%q: accepted, and a server says %v", b, err)
			}
			return
		}
		database := m.Parameters["database"]
		if database == "" {
			database = m.Parameters["user"]
		}
		if s.user != m.Parameters["user"] || s.database != database {
			t.Errorf("%q: got user %q and database %q, want those of %q", b, s.user, s.database, m.Parameters)
		}
		for name, value := range s.settings {
			if m.Parameters[name] != value {
				t.Errorf("%q: got %q for %q, want %q", b, value, name, m.Parameters[name])
			}
		}
	})
}

// FuzzPassword: what is read is a whole message, and nothing behind it.
func FuzzPassword(f *testing.F) {
	good, err := (&pgproto3.PasswordMessage{Password: "secret"}).Encode(nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte("p\x00\x00\x00\x05\x00more"))
	f.Add([]byte("p\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		password, err := readPassword(r)
		if err != nil {
			return
		}
		again, err := (&pgproto3.PasswordMessage{Password: password}).Encode(nil)
		if err != nil || !bytes.HasPrefix(b, again) || len(b)-r.Len() != len(again) {
			t.Errorf("%q: got %q, which is %q", b, password, again)
		}
	})
}

// FuzzWanted: what a channel asks for is what the destination is sent.
func FuzzWanted(f *testing.F) {
	f.Add("exec", ssh.Marshal(struct{ Command string }{"git-upload-pack 'x'"}))
	f.Add("subsystem", []byte{0, 0, 0, 4, 's', 'f', 't', 'p', 0})
	f.Add("exec", []byte{255, 255, 255, 255})
	f.Fuzz(func(t *testing.T, kind string, payload []byte) {
		what, err := wanted(&ssh.Request{Type: kind, Payload: payload})
		if kind == "shell" || err != nil {
			return
		}
		if again := ssh.Marshal(struct{ Command string }{what}); !bytes.Equal(again, payload) {
			t.Errorf("%q: got %q, which is %q", payload, what, again)
		}
	})
}
