package wire

import "sync"

// A Credit counts what its owner may still send in one conversation. Make one
// with NewCredit. Any number of goroutines may use it.
type Credit struct {
	mu   sync.Mutex
	left int
	wake chan struct{}
}

// NewCredit returns a full window.
func NewCredit() *Credit {
	return &Credit{left: Window, wake: make(chan struct{}, 1)}
}

// Try takes n bytes and reports whether there were as many. If not, wait for
// Wake and try again.
func (c *Credit) Try(n int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.left < n {
		return false
	}
	c.left -= n
	if c.left > 0 {
		signal(c.wake) // another sender may have seen the same wake-up as we did
	}
	return true
}

// Wake is readable when there may be more credit.
func (c *Credit) Wake() <-chan struct{} { return c.wake }

// Add gives n bytes back. It reports false if that is more than was taken: the
// other end lies about what it has read.
func (c *Credit) Add(n uint32) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if int64(n) > int64(Window-c.left) {
		return false
	}
	c.left += int(n)
	signal(c.wake)
	return true
}

// An Inbox keeps what has been read off the stream and not been used yet: never
// more than Window bytes. Make one with NewInbox. One goroutine puts, one takes.
type Inbox struct {
	mu   sync.Mutex
	buf  []byte
	wake chan struct{}
}

// NewInbox returns an empty inbox. It holds no memory until something arrives.
func NewInbox() *Inbox {
	return &Inbox{wake: make(chan struct{}, 1)}
}

// Put keeps a copy of a frame. It reports false if the sender has overdrawn its
// window.
func (i *Inbox) Put(t Type, payload []byte) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	if len(i.buf)+HeaderSize+len(payload) > Window {
		return false
	}
	i.buf = append(AppendHeader(i.buf, t, len(payload)), payload...)
	signal(i.wake)
	return true
}

// Take returns all frames that have arrived, one behind the other: see Cut.
// spare is an earlier result that is no longer needed, or nil; its memory is
// used for what comes next.
func (i *Inbox) Take(spare []byte) []byte {
	i.mu.Lock()
	defer i.mu.Unlock()
	taken := i.buf
	i.buf = spare[:0]
	return taken
}

// Wake is readable when there may be more to take.
func (i *Inbox) Wake() <-chan struct{} { return i.wake }

// Cut splits the first frame off what Take returned. ok is false at the end.
func Cut(b []byte) (t Type, payload, rest []byte, ok bool) {
	if len(b) < HeaderSize {
		return 0, nil, nil, false
	}
	n := int(b[1])<<24 | int(b[2])<<16 | int(b[3])<<8 | int(b[4])
	if n > len(b)-HeaderSize {
		return 0, nil, nil, false
	}
	end := HeaderSize + n
	return Type(b[0]), b[HeaderSize:end:end], b[end:], true
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
