package gateway

import "sync"

// uses counts how often the credential of a lease was given away, over all rules of
// the lease. Nil counts nothing.
type uses struct {
	mu   sync.Mutex
	most int
	made int
}

// take says why the credential may not be used once more. What it lets through
// counts, whatever becomes of it.
func (u *uses) take(lease string) error {
	if u == nil {
		return nil
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.made >= u.most {
		return denied("lease %s is for %d uses, and they have been made", lease, u.most)
	}
	u.made++
	return nil
}

// counters are those of one opening, by lease.
type counters map[string]*uses

// of is the counter of a lease. Of rules that disagree the least counts.
func (c counters) of(lease string, most int) *uses {
	if most == 0 {
		return c[lease]
	}
	if c[lease] == nil {
		c[lease] = &uses{most: most}
	}
	c[lease].most = min(c[lease].most, most)
	return c[lease]
}
