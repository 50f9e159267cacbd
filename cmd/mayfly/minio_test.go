package main

import (
	"net/http"
	"net/http/httptest"
	"os"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/mayfly-ci/mayfly/test/miniotest"
)

// TestMinIOScript is TestScript for the script that needs a MinIO: "minio" sets
// $MINIO, $ROLE and $IDENTITY, a web server for the directory web, and "minio start"
// starts it, when the issuer's documents lie there.
func TestMinIOScript(t *testing.T) {
	t.Parallel()
	var s *miniotest.Server
	testscript.Run(t, testscript.Params{
		Files:               []string{"testdata/minio.txtar"},
		RequireExplicitExec: true,
		Setup:               setup,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"minio": func(ts *testscript.TestScript, _ bool, args []string) {
				if len(args) != 0 {
					s.Serve(t)
					return
				}
				web := httptest.NewServer(http.FileServer(http.Dir(ts.MkAbs("web"))))
				ts.Defer(web.Close)
				s = miniotest.Prepare(t, web.URL)
				ca, err := os.ReadFile(s.CAFile())
				ts.Check(err)
				ts.Check(os.WriteFile(ts.MkAbs("minio.pem"), ca, 0o600))
				ts.Setenv("IDENTITY", web.URL)
				ts.Setenv("MINIO", s.Address())
				ts.Setenv("ROLE", s.Role())
			},
		},
	})
}
