package gateway_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// talk is a gRPC service of one method, which answers each message and ends with
// a status.
func talk() *grpc.Server {
	s := grpc.NewServer()
	s.RegisterService(&grpc.ServiceDesc{
		ServiceName: "test.Talk",
		HandlerType: (*any)(nil),
		Streams: []grpc.StreamDesc{{StreamName: "Talk", ClientStreams: true, ServerStreams: true, Handler: func(_ any, stream grpc.ServerStream) error {
			for {
				m := new(wrapperspb.StringValue)
				if err := stream.RecvMsg(m); err == io.EOF {
					return status.Error(codes.FailedPrecondition, "said all")
				} else if err != nil {
					return err
				}
				if err := stream.SendMsg(wrapperspb.String("re: " + m.Value)); err != nil {
					return err
				}
			}
		}}},
	}, nil)
	return s
}

// TestGRPC: a real client and a real server talk both ways at once, and the
// status in the trailers arrives.
func TestGRPC(t *testing.T) {
	t.Parallel()
	s := newSecured(t, true, talk(), egress.Request{Methods: []string{"POST"}, Path: "/test.Talk/Talk", ContentTypes: []string{"application/grpc"}})
	client, err := grpc.NewClient(fmt.Sprintf("passthrough:///web.example:%d", s.port),
		grpc.WithTransportCredentials(credentials.NewClientTLSFromCert(s.pool, "")),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return s.forever() }))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	stream, err := client.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, "/test.Talk/Talk")
	if err != nil {
		t.Fatal(err)
	}
	for _, word := range []string{"first", "second"} {
		got := new(wrapperspb.StringValue)
		if err := stream.SendMsg(wrapperspb.String(word)); err != nil {
			t.Fatal(err)
		}
		if err := stream.RecvMsg(got); err != nil || got.Value != "re: "+word {
			t.Fatalf("got %q %v, want an answer to %q", got.Value, err, word)
		}
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if err := stream.RecvMsg(new(wrapperspb.StringValue)); status.Code(err) != codes.FailedPrecondition || status.Convert(err).Message() != "said all" {
		t.Errorf("at the end: got %v, want the server's status", err)
	}
	err = client.Invoke(ctx, "/test.Other/Call", wrapperspb.String("x"), new(wrapperspb.StringValue))
	if status.Code(err) != codes.PermissionDenied { // what gRPC makes of 403
		t.Errorf("another method: got %v, want PermissionDenied", err)
	}
}

// endless is a body without end that holds nothing.
type endless struct{}

func (endless) Read(b []byte) (int, error) { return len(b), nil }

// TestFlat: the memory of the process, in which both ends are too, does not grow
// with what passes.
func TestFlat(t *testing.T) {
	// Not parallel: it looks at the memory of the whole process.
	const size, most = 64 << 20, 32 << 20
	s := newSecured(t, true, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if n, err := io.Copy(io.Discard, r.Body); err == nil && n == size {
			_, _ = io.CopyN(w, endless{}, size)
		}
	}))
	for _, h2 := range []bool{false, true} {
		runtime.GC()
		var peak atomic.Uint64
		stop, stopped := make(chan struct{}), make(chan struct{})
		before := inUse()
		go func() {
			defer close(stopped)
			tick := time.NewTicker(20 * time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case <-tick.C:
					peak.Store(max(peak.Load(), inUse()))
				case <-stop:
					return
				}
			}
		}()
		resp, err := s.client(h2).Post(s.url("/"), "", io.LimitReader(struct{ io.Reader }{endless{}}, size))
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		close(stop)
		<-stopped
		if err != nil || n != size {
			t.Errorf("HTTP/2 %v: got %d bytes, %v", h2, n, err)
		}
		if grown := int64(peak.Load()) - int64(before); grown > most {
			t.Errorf("HTTP/2 %v: memory grew by %d MiB for %d MiB each way", h2, grown>>20, size>>20)
		}
	}
	s.await("of both", func(all []egress.Line) bool {
		n := 0
		for _, l := range all {
			if l.Verdict == egress.Ended && l.Sent == size && l.Received == size {
				n++
			}
		}
		return n == 2
	})
}

func inUse() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapInuse
}
