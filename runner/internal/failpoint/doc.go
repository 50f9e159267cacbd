// Package failpoint marks the places where a crash would hurt.
//
// In an ordinary build [Here] is empty and compiles to nothing. Built with
// -tags failpoint, a process started with MAYFLY_FAILPOINT=name:n kills itself
// with SIGKILL the nth time it reaches Here(name), and one started with
// MAYFLY_FAILPOINT_TRACE=file appends every point that it passes to file.
package failpoint
