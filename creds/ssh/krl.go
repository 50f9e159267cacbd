package ssh

import (
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"time"
)

// A revoked certificate is in the list until it would have expired.
type revoked struct {
	CA     string    `json:"ca"` // its public key, as in authorized_keys
	Serial uint64    `json:"serial"`
	Until  time.Time `json:"until"`
}

// The words of OpenSSH's PROTOCOL.krl.
const (
	krlMagic        = "SSHKRL\n\x00"
	krlFormat       = 1
	krlCertificates = 1    // a section
	krlSerials      = 0x20 // a section of that
)

// krl writes a key revocation list (OpenSSH's PROTOCOL.krl): a section for each
// authority, with the serials that it revoked.
func krl(version uint64, at time.Time, comment string, entries []revoked) ([]byte, error) {
	serials := map[string][]uint64{}
	for _, e := range entries {
		serials[e.CA] = append(serials[e.CA], e.Serial)
	}
	b := binary.BigEndian.AppendUint32([]byte(krlMagic), krlFormat)
	b = binary.BigEndian.AppendUint64(b, version)
	b = binary.BigEndian.AppendUint64(b, uint64(at.Unix()))
	b = binary.BigEndian.AppendUint64(b, 0)    // flags
	b = appendString(b, nil)                   // reserved
	b = appendString(b, []byte(line(comment))) //
	for _, ca := range slices.Sorted(maps.Keys(serials)) {
		key, err := base64.StdEncoding.DecodeString(ca)
		if err != nil {
			return nil, fmt.Errorf("authority of a revoked certificate: %w", err)
		}
		slices.Sort(serials[ca])
		var list []byte
		for _, serial := range slices.Compact(serials[ca]) {
			list = binary.BigEndian.AppendUint64(list, serial)
		}
		section := appendString(appendString(nil, key), nil) // and reserved
		section = appendString(append(section, krlSerials), list)
		b = appendString(append(b, krlCertificates), section)
	}
	return b, nil
}

// appendString is SSH's string: its length, and its bytes.
func appendString(b, s []byte) []byte {
	return append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
}
