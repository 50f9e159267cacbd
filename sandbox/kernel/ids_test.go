package kernel

import (
	"sync"
	"testing"
)

func TestIDs(t *testing.T) {
	t.Parallel()
	d := IDs{Dir: t.TempDir(), First: 100_000, Slots: 20}
	var mu sync.Mutex
	var wait sync.WaitGroup
	seen := map[uint32]bool{}
	refused := 0
	for i := range 30 {
		wait.Go(func() {
			first, err := d.Take("box-" + string(rune('a'+i)))
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				refused++
				return
			}
			if seen[first] || (first-100_000)%Span != 0 {
				t.Errorf("Take: got %d twice, or off the grid", first)
			}
			seen[first] = true
		})
	}
	wait.Wait()
	if len(seen) != 20 || refused != 10 {
		t.Fatalf("30 takes of 20 slots: got %d ranges and %d refused", len(seen), refused)
	}
	for i := range 30 {
		if err := d.Release("box-" + string(rune('a'+i))); err != nil {
			t.Error(err)
		}
	}
	if first, err := d.Take("again"); err != nil || first != 100_000 {
		t.Errorf("Take after Release: got %d, %v, want the first range", first, err)
	}
}
