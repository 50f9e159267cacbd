//go:build goexperiment.runtimesecret

package runner

import (
	"runtime"
	"runtime/secret"
)

// erased runs a job's life so that what it kept in memory is erased when it ends
// (docs/adr/0035).
func erased(live func()) {
	secret.Do(live)
	runtime.GC() // which is what erases
}
