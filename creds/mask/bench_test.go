package mask_test

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/mask"
)

// random returns n characters of alphabet.
func random(r *rand.Rand, n int, alphabet string) string {
	b := make([]byte, n)
	for i := range b {
		b[i] = alphabet[r.IntN(len(alphabet))]
	}
	return string(b)
}

const (
	alnum = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
	digit = "0123456789abcdef"
)

// hundredSecrets is what a large job has: tokens with the prefixes of their
// makers, passwords of 8 and more, web tokens, connection strings, and keys
// and JSON of several lines.
func hundredSecrets() []string {
	r := rand.New(rand.NewPCG(1, 2))
	var all []string
	for i := range 100 {
		switch i % 10 {
		case 0:
			all = append(all, "ghp_"+random(r, 36, alnum))
		case 1:
			all = append(all, "AKIA"+random(r, 16, alnum[:36]))
		case 2:
			all = append(all, random(r, 40, alnum+"+/"))
		case 3:
			all = append(all, random(r, 8+r.IntN(8), alnum+"!#$%&'<>\" "))
		case 4:
			all = append(all, "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9."+random(r, 120, alnum)+"."+random(r, 43, alnum))
		case 5:
			all = append(all, "postgres://mf:"+random(r, 24, alnum)+"@db.example.com:5432/app?sslmode=require")
		case 6:
			all = append(all, random(r, 64, digit))
		case 7:
			all = append(all, "glpat-"+random(r, 20, alnum+"-_"))
		case 8:
			all = append(all, privateKey(r))
		case 9:
			all = append(all, "{\n  \"type\": \"service_account\",\n  \"private_key_id\": \""+random(r, 40, digit)+"\",\n  \"token\": \""+random(r, 64, alnum)+"\"\n}\n")
		}
	}
	return all
}

func privateKey(r *rand.Rand) string {
	der := make([]byte, 1190)
	for i := range der {
		der[i] = byte(r.Uint32())
	}
	copy(der, "\x30\x82\x04\xa4\x02\x01\x00\x02\x82\x01\x01\x00")
	text := base64.StdEncoding.EncodeToString(der)
	var b strings.Builder
	b.WriteString("-----BEGIN RSA PRIVATE KEY-----\n")
	for ; len(text) > 64; text = text[64:] {
		b.WriteString(text[:64] + "\n")
	}
	b.WriteString(text + "\n-----END RSA PRIVATE KEY-----\n")
	return b.String()
}

// logText is n bytes of what builds print.
func logText(n int) []byte {
	r := rand.New(rand.NewPCG(3, 4))
	var b bytes.Buffer
	for b.Len() < n {
		switch r.IntN(12) {
		case 0:
			fmt.Fprintf(&b, "2026-11-23T20:%02d:%02d.%06dZ INFO  starting container %s\n", r.IntN(60), r.IntN(60), r.IntN(1e6), random(r, 64, digit))
		case 1:
			fmt.Fprintf(&b, "go: downloading github.com/%s/%s v%d.%d.%d\n", random(r, 8, alnum[10:36]), random(r, 9, alnum[10:36]), r.IntN(9), r.IntN(30), r.IntN(9))
		case 2:
			fmt.Fprintf(&b, "ok  \tgithub.com/example/project/internal/%s\t%d.%03ds\tcoverage: %d.%d%% of statements\n", random(r, 7, alnum[10:36]), r.IntN(20), r.IntN(1000), r.IntN(100), r.IntN(10))
		case 3:
			fmt.Fprintf(&b, "gcc -O2 -Wall -Wextra -DNDEBUG -Iinclude -I../third_party/zlib -c src/%s.c -o build/obj/%s.o\n", random(r, 6, alnum[10:36]), random(r, 6, alnum[10:36]))
		case 4:
			fmt.Fprintf(&b, "\x1b[32m  ✓ renders the list when the user is signed in (%d ms)\x1b[0m\n", r.IntN(400))
		case 5:
			fmt.Fprintf(&b, "{\"level\":\"debug\",\"time\":%d,\"msg\":\"request served\",\"path\":\"/api/v1/users/%d\",\"trace\":\"%s\"}\n", 1763930000+r.IntN(1e6), r.IntN(1e5), random(r, 32, digit))
		case 6:
			fmt.Fprintf(&b, "npm warn deprecated %s@%d.%d.%d: this version is no longer supported, please upgrade\n", random(r, 9, alnum[10:36]), r.IntN(9), r.IntN(9), r.IntN(9))
		case 7:
			fmt.Fprintf(&b, "  \"integrity\": \"sha512-%s==\",\n", random(r, 86, alnum+"+/"))
		case 8:
			b.WriteString("--------------------------------------------------------------------------------\n")
		case 9:
			fmt.Fprintf(&b, "Get:%d http://deb.debian.org/debian bookworm/main amd64 lib%s amd64 1:%d.%d-%d [%d kB]\n", r.IntN(300), random(r, 7, alnum[10:36]), r.IntN(9), r.IntN(9), r.IntN(9), r.IntN(4000))
		case 10:
			fmt.Fprintf(&b, "                at com.example.service.%s.invoke(%s.java:%d)\n", random(r, 9, alnum[10:36]), random(r, 9, alnum[10:36]), r.IntN(900))
		case 11:
			b.WriteString("The quick brown fox tests what an ordinary sentence in a log does to the search for secrets.\n")
		}
	}
	return b.Bytes()[:n]
}

// nearMisses is made of the secrets and of their encodings, each cut short
// before its last byte: every block is one of a needle, and nothing matches.
func nearMisses(secrets []string, n int) []byte {
	var b bytes.Buffer
	for b.Len() < n {
		for _, s := range secrets {
			for line := range strings.Lines(s) {
				line = strings.TrimSpace(line)
				if len(line) < 8 {
					continue
				}
				b.WriteString(line[:len(line)-2] + "\x00")
				fmt.Fprintf(&b, "%x\x00", line[1:len(line)-1])
			}
		}
	}
	return b.Bytes()[:n]
}

func secretsOf(values []string) []creds.Secret {
	var all []creds.Secret
	for _, v := range values {
		all = append(all, creds.NewSecret(v))
	}
	return all
}

// BenchmarkWriter100Secrets has a budget: 500 MB/s on ordinary text in pieces
// of 32 KiB, which is what a pipe gives.
func BenchmarkWriter100Secrets(b *testing.B) {
	const size = 8 << 20
	values := hundredSecrets()
	keys := bytes.Repeat([]byte(values[8]), size/len(values[8])+1)[:size]
	for _, bench := range []struct {
		name   string
		text   []byte
		pieces [][]byte
		more   []string
	}{
		{"log", logText(size), nil, nil},
		{"log-lines", logText(size), slices.Collect(bytes.Lines(logText(size))), nil},
		{"log-4-byte-secret", logText(size), nil, []string{"q7Zk"}},
		{"no-newline", bytes.Repeat([]byte("x"), size), nil, nil},
		{"rules", bytes.Repeat([]byte("-"), size), nil, nil},
		{"near-misses", nearMisses(values, size), nil, nil},
		{"all-secret", keys, nil, nil},
	} {
		if bench.pieces == nil {
			bench.pieces = slices.Collect(slices.Chunk(bench.text, 32<<10))
		}
		b.Run(bench.name, func(b *testing.B) {
			set := mask.New(secretsOf(append(bench.more, values...)))
			if err := set.Err(); err != nil {
				b.Fatal(err)
			}
			set.Mask("compile")
			w := mask.NewWriter(func([]byte) error { return nil }, set)
			b.SetBytes(int64(len(bench.text)))
			b.ReportAllocs()
			for b.Loop() {
				for _, piece := range bench.pieces {
					if _, err := w.Write(piece); err != nil {
						b.Fatal(err)
					}
				}
				if err := w.Flush(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkNew100Secrets is what adding one secret to many costs.
func BenchmarkNew100Secrets(b *testing.B) {
	secrets := secretsOf(hundredSecrets())
	for b.Loop() {
		mask.New(secrets).Mask("")
	}
}
