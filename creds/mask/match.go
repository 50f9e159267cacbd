package mask

import (
	"cmp"
	"encoding/binary"
	"math"
	"math/bits"
	"slices"
	"sort"
	"strings"
)

const (
	// maxBlock bounds the size of what the matcher looks up. Longer blocks
	// are rarer in other text, and leave less room for the stride.
	maxBlock = 6

	// maxStride bounds how many bytes the search advances at once. More makes
	// more entries, and the bitmap larger than the processor's caches.
	maxStride = 8

	// perEntry is how many bits the bitmap has for each entry, at least and
	// within the bounds: one block in so many is looked up for nothing.
	perEntry = 64

	// minBits and maxBits bound the binary logarithm of the bitmap's size: two
	// words, and 128 KiB, a part of the processor's second cache.
	minBits, maxBits = 7, 20

	// places is how many places of a needle are tried for its window.
	places = 8
)

// A matcher finds needles. It looks at one block of a few bytes in every stride
// bytes, and asks a bitmap whether that block stands in the window of a
// needle: a stretch of it that has stride blocks, so that one of them is
// looked at wherever the needle begins. Then the needles that have the block
// are compared whole.
//
// Unlike Wu-Manber, where each shift waits for the one before, the lookups do
// not depend on each other, and the processor overlaps them. A text that is
// made to look like needles costs more: at worst, for each block that is looked
// at, a comparison with each needle that has it in its window.
type matcher struct {
	needles []string    // sorted, each once, none shorter than MinLen
	parents []int32     // by needle: the longest needle that it begins with, or -1
	longest int         // bytes
	block   int         // bytes
	stride  int         // bytes
	shift   int         // from the product of a hash to its value
	blocks  []uint64    // bitmap by hash: block in a window
	heads   [4][]uint64 // bitmaps by hash: first 1, 2, 4, 8 bytes of a needle
	buckets []int32     // by hash / perEntry: first of its entries; one more for the end
	entries []entry
}

// An entry is one block of the window of a needle that begins with no other
// needle. Those that do are found through it.
type entry struct {
	block  uint64
	needle int32
	at     int32 // where in the needle
}

// compile takes needles that are sorted, each once, none below MinLen.
func compile(needles []string) *matcher {
	m := &matcher{needles: needles, parents: make([]int32, len(needles))}
	roots, shortest := 0, maxBlock+maxStride
	for i, n := range needles {
		up := int32(i - 1)
		for up >= 0 && !strings.HasPrefix(n, needles[up]) {
			up = m.parents[up]
		}
		m.parents[i] = up
		if up < 0 {
			roots++
		}
		m.longest = max(m.longest, len(n))
		shortest = min(shortest, len(n))
	}
	m.block = min(max(MinLen, shortest/2+1), maxBlock)
	m.stride = min(shortest-m.block+1, maxStride)
	width := min(max(bits.Len(uint(roots*m.stride*perEntry)), minBits), maxBits)
	m.shift = 64 - width
	m.blocks = make([]uint64, 1<<width/64)
	m.buckets = make([]int32, 1<<width/perEntry+1)
	for k := range m.heads {
		m.heads[k] = make([]uint64, 1<<width/64)
		for _, n := range needles {
			if len(n) >= 1<<k {
				mark(m.heads[k], m.hash(headOf(n, 1<<k)))
			}
		}
	}
	m.index(m.windows(roots))
	return m
}

// windows gives each needle without a parent its window: where its blocks are
// the rarest. Else all tokens of one maker would be looked up by their common
// beginning, and every ruled line of a log would be compared with every
// "-----BEGIN".
func (m *matcher) windows(roots int) []entry {
	uses := make([]int32, 1<<16) // by the high bits of the hash
	entries := make([]entry, 0, roots*m.stride)
	for i, n := range m.needles {
		if m.parents[i] >= 0 {
			continue
		}
		room := len(n) - m.block - m.stride + 1 // the last window begins here
		best, least := 0, int32(math.MaxInt32)
		for place := range min(places, room+1) {
			at := place
			if room >= places {
				at = place * room / (places - 1)
			}
			var cost int32
			for j := at; j < at+m.stride; j++ {
				cost += uses[hash(headOf(n[j:], m.block), 48)] + dullness(n[j:j+m.block])
			}
			if cost < least {
				best, least = at, cost
			}
		}
		for j := best; j < best+m.stride; j++ {
			block := headOf(n[j:], m.block)
			uses[hash(block, 48)]++
			entries = append(entries, entry{block, int32(i), int32(j)})
		}
	}
	return entries
}

// index files entries under their hashes: a counting sort.
func (m *matcher) index(entries []entry) {
	for _, e := range entries {
		h := m.hash(e.block)
		mark(m.blocks, h)
		m.buckets[h/perEntry]++
	}
	var end int32
	for i, n := range m.buckets {
		end += n
		m.buckets[i] = end
	}
	m.entries = make([]entry, len(entries))
	for _, e := range entries {
		bucket := &m.buckets[m.hash(e.block)/perEntry]
		*bucket--
		m.entries[*bucket] = e
	}
}

// dullness is high for blocks that logs are full of: blanks, rules, zeros.
func dullness(block string) int32 {
	var dull int32
	for i := 1; i < len(block); i++ {
		if block[i] == block[i-1] || block[i] == ' ' {
			dull++
		}
	}
	return dull * dull
}

// A span is a stretch of a buffer, [start, end).
type span struct{ start, end int }

// scan appends the occurrences of all needles in b, in no order; some may be
// joined already, or left out where a longer one begins at the same byte.
func (m *matcher) scan(b []byte, spans []span) []span {
	if len(m.needles) == 0 {
		return spans
	}
	blocks, shift, stride := m.blocks, m.shift, m.stride
	keep := uint64(1)<<(8*m.block&63) - 1
	i := 0
	for ; i <= len(b)-8; i += stride {
		block := binary.LittleEndian.Uint64(b[i:]) & keep
		if has(blocks, hash(block, shift)) {
			spans = m.verify(b, i, block, spans)
		}
	}
	for ; i <= len(b)-m.block; i += stride {
		block := headOf(b[i:], m.block)
		if has(blocks, hash(block, shift)) {
			spans = m.verify(b, i, block, spans)
		}
	}
	return spans
}

// verify compares the needles that have block with what stands around b[i].
func (m *matcher) verify(b []byte, i int, block uint64, spans []span) []span {
	bucket := m.hash(block) / perEntry
	for _, e := range m.entries[m.buckets[bucket]:m.buckets[bucket+1]] {
		if e.block != block || int(e.at) > i {
			continue
		}
		start := i - int(e.at)
		if n := m.needles[e.needle]; begins(b[start:], n) {
			spans = add(spans, span{start, start + m.longestAt(b[start:])})
		}
	}
	return spans
}

// longestAt returns the length of the longest needle that b begins with. The
// last needle that does not sort after b begins with it, as does each needle
// that b begins with.
func (m *matcher) longestAt(b []byte) int {
	b = b[:min(len(b), m.longest)]
	i := m.after(b) - 1
	for i >= 0 && !begins(b, m.needles[i]) {
		i = int(m.parents[i])
	}
	if i < 0 {
		return 0
	}
	return len(m.needles[i])
}

// open returns where the first suffix of b begins that more bytes could make
// an occurrence of a needle; len(b) if there is none.
func (m *matcher) open(b []byte) int {
	i := max(0, len(b)-m.longest+1)
	for ; i <= len(b)-8; i++ {
		if has(m.heads[3], m.hash(binary.LittleEndian.Uint64(b[i:]))) && m.extends(b[i:]) {
			return i
		}
	}
	for ; i < len(b); i++ {
		k := bits.Len(uint(len(b)-i)) - 1
		if has(m.heads[k], m.hash(headOf(b[i:], 1<<k))) && m.extends(b[i:]) {
			return i
		}
	}
	return len(b)
}

// extends reports whether some needle is longer than b and begins with it. If
// so, the first needle that sorts after b does.
func (m *matcher) extends(b []byte) bool {
	i := m.after(b)
	return i < len(m.needles) && len(m.needles[i]) > len(b) && m.needles[i][:len(b)] == string(b)
}

// after returns the first needle that sorts after b.
func (m *matcher) after(b []byte) int {
	return sort.Search(len(m.needles), func(i int) bool { return m.needles[i] > string(b) })
}

// begins reports whether b begins with n, without copying either.
func begins(b []byte, n string) bool { return len(b) >= len(n) && string(b[:len(n)]) == n }

// add appends s, or joins it with the last span. There is at most one span for
// each byte searched: of two needles that occur at one place, one begins with
// the other and is found through it.
func add(spans []span, s span) []span {
	if n := len(spans); n > 0 {
		last := &spans[n-1]
		if s.start <= last.end && last.start <= s.end {
			last.start, last.end = min(last.start, s.start), max(last.end, s.end)
			return spans
		}
	}
	return append(spans, s)
}

// merge sorts spans and joins those that overlap or touch.
func merge(spans []span) []span {
	if len(spans) < 2 {
		return spans
	}
	slices.SortFunc(spans, func(a, b span) int { return cmp.Compare(a.start, b.start) })
	joined := spans[:1]
	for _, s := range spans[1:] {
		if last := &joined[len(joined)-1]; s.start <= last.end {
			last.end = max(last.end, s.end)
		} else {
			joined = append(joined, s)
		}
	}
	return joined
}

func (m *matcher) hash(x uint64) uint64 { return hash(x, m.shift) }

// hash is Knuth's multiplicative hash (TAOCP 6.4): the high bits of a product.
func hash(x uint64, shift int) uint64 { return x * 0x9E3779B97F4A7C15 >> (shift & 63) }

// headOf returns the first n bytes of b, at most 8, as encoding/binary would.
func headOf[T []byte | string](b T, n int) uint64 {
	var x uint64
	for i := range n {
		x |= uint64(b[i]) << (8 * i)
	}
	return x
}

func has(bitmap []uint64, h uint64) bool { return bitmap[h/64]>>(h%64)&1 != 0 }

func mark(bitmap []uint64, h uint64) { bitmap[h/64] |= 1 << (h % 64) }
