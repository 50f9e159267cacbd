//go:build failpoint

package failpoint

import (
	"fmt"
	"os"
	"sync"
	"syscall"
)

var (
	mu   sync.Mutex
	hits = map[string]int{}
)

// Here reports that control has reached name, and dies there if told to.
func Here(name string) {
	mu.Lock()
	defer mu.Unlock()
	hits[name]++
	at := fmt.Sprintf("%s:%d", name, hits[name])
	if f := os.Getenv("MAYFLY_FAILPOINT_TRACE"); f != "" {
		w, err := os.OpenFile(f, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
		if err != nil {
			panic(err)
		}
		fmt.Fprintln(w, at)
		w.Close()
	}
	if os.Getenv("MAYFLY_FAILPOINT") == at {
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
}
