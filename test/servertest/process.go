package servertest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"
)

// A Process is a server that runs, or ran, or will. It dies with the test's process.
// Run, Stop, Pause and Resume may not be called at the same time.
type Process struct {
	cmd  *exec.Cmd     // nil before the first Run
	done chan struct{} // closed when it is gone
}

// Run starts a program, and has what it says written to the end of a file.
func (p *Process) Run(cmd *exec.Cmd, log string) error {
	f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	cmd.Stdout, cmd.Stderr = f, f
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started, done := make(chan error, 1), make(chan struct{})
	go func() { // Stop waits for it
		// The death signal is bound to the thread that starts the child.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(done)
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // how it ended is in its log
		}
	}()
	if err := <-started; err != nil {
		return err
	}
	p.cmd, p.done = cmd, done
	return nil
}

// Stop kills the process: nothing listens on its port afterwards. Stopping twice,
// or what never ran, is no error.
func (p *Process) Stop(ctx context.Context) error {
	if p.cmd == nil {
		return nil
	}
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s still running: %w", p.cmd.Path, context.Cause(ctx))
	}
}

// Pause freezes the process: the kernel still accepts connections, nobody
// answers. Resume and Stop undo it.
func (p *Process) Pause() error { return Freeze(p.cmd.Process.Pid) }

// Resume lets a paused process go on.
func (p *Process) Resume() error { return p.cmd.Process.Signal(syscall.SIGCONT) }

// Until asks a starting server again and again, until ask has no error.
func (p *Process) Until(ctx context.Context, ask func() error) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ask()
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s ended while starting", p.cmd.Path)
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w: %w", p.cmd.Path, context.Cause(ctx), err)
		case <-tick.C:
		}
	}
}

// Tail is the end of what a server has written to that file.
func Tail(log string) string {
	b, err := os.ReadFile(log)
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-2000):])
}

// A Port is one of this machine's loopback that nobody else is given: neither a
// listener that asks for any, nor a connection. A server that is told its number
// can listen there, and again when it was stopped: both sides set SO_REUSEADDR
// (socket(7)), as Go and most servers do, and this one never listens.
type Port struct {
	socket *os.File
	number int
}

// Hold takes one until Free.
func Hold() (Port, error) {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return Port{}, fmt.Errorf("socket: %w", err)
	}
	p := Port{socket: os.NewFile(uintptr(fd), "port")}
	err = syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1)
	if err == nil {
		err = syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
	}
	var a syscall.Sockaddr
	if err == nil {
		a, err = syscall.Getsockname(fd)
	}
	in, ok := a.(*syscall.SockaddrInet4)
	if err != nil || !ok {
		p.Free()
		return Port{}, fmt.Errorf("port: %w", err)
	}
	p.number = in.Port
	return p, nil
}

// Number is the port's.
func (p Port) Number() int { return p.number }

// Address is 127.0.0.1:PORT.
func (p Port) Address() string { return fmt.Sprintf("127.0.0.1:%d", p.number) }

// Free gives it back. Doing so twice does nothing.
func (p Port) Free() { _ = p.socket.Close() }

// Certificate makes one of a server at 127.0.0.1, which signs itself, and its key,
// in PEM.
func Certificate(name string) (cert, key []byte, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, private.Public(), private)
	if err != nil {
		return nil, nil, err
	}
	b, err := x509.MarshalPKCS8PrivateKey(private)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: b}), err
}

// Client trusts a server with that certificate and nobody else.
func Client(cert []byte) (*http.Client, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(cert) {
		return nil, errors.New("no certificate, or half of one")
	}
	return &http.Client{
		Timeout:   30 * time.Second,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}},
	}, nil
}
