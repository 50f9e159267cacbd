//go:build !goexperiment.runtimesecret

package runner

// erased runs a job's life. What it kept in memory is erased in the build with
// GOEXPERIMENT=runtimesecret (docs/adr/0035).
func erased(live func()) { live() }
