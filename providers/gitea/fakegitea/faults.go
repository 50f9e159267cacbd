package fakegitea

import (
	"bytes"
	"net/http"
	"strconv"
)

// A Fault is one call that goes wrong. Without After the call has no effect.
type Fault struct {
	Status     int    // an HTTP status without a message, as a proxy answers
	RetryAfter int    // seconds, beside Status
	Message    string // a Connect error of the code unknown, as a handler fails
	Garbage    bool   // an answer of the right kind that is no JSON
	Hang       bool   // no answer
	Cut        bool   // the effect, and half of the answer
	Lost       bool   // the effect, and no answer
	Huge       bool   // the effect, and an answer of 32 MB
}

// Fail makes the next calls of a method go wrong, one for each fault.
func (s *Server) Fail(method string, faults ...Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults[method] = append(s.faults[method], faults...)
}

func (s *Server) fault(method string) Fault {
	queue := s.faults[method]
	if len(queue) == 0 {
		return Fault{}
	}
	s.faults[method] = queue[1:]
	return queue[0]
}

func (f Fault) before() bool {
	return f.Status != 0 || f.Message != "" || f.Garbage || f.Hang
}

// fail answers wrongly; answer is what it would have been.
func (s *Server) fail(w http.ResponseWriter, r *http.Request, f Fault, answer []byte) {
	switch {
	case f.Hang:
		select {
		case <-s.released:
		case <-r.Context().Done():
		}
	case f.Message != "":
		unknown(f.Message).write(w)
	case f.Garbage:
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write([]byte("\x00{]<html>")) // whether it arrives is the same
	case f.Status != 0:
		if f.RetryAfter > 0 {
			w.Header().Set("Retry-After", strconv.Itoa(f.RetryAfter))
		}
		http.Error(w, "bad gateway", f.Status)
	case f.Huge:
		// The beginning is as it should be, and then it does not end.
		half := answer[:len(answer)/2]
		_, _ = w.Write(half)
		// The kernels of both ends may take more than 32 MB that nobody reads
		// (tcp(7), tcp_rmem).
		chunk := bytes.Repeat([]byte("A"), 32<<20)
		var err error
		for range 4 {
			if _, err = w.Write(chunk); err != nil {
				break
			}
		}
		if err == nil {
			s.mu.Lock()
			s.violation("an answer of 128 MB was read to its end")
			s.mu.Unlock()
		}
	case f.Cut:
		w.Header().Set("Content-Length", strconv.Itoa(len(answer)))
		_, _ = w.Write(answer[:len(answer)/2])
	default: // Lost
		if conn, _, err := http.NewResponseController(w).Hijack(); err == nil {
			_ = conn.Close()
		}
	}
}
