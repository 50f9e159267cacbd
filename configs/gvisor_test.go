package configs

import (
	"os"
	"testing"

	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox"
)

func TestExampleGVisor(t *testing.T) {
	t.Parallel()
	c, err := Load("agent-gvisor.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var own struct {
		Image  string `yaml:"image"`
		GVisor struct {
			Runsc string `yaml:"runsc"`
		} `yaml:"gvisor"`
	}
	for _, name := range []string{"native", "containerd"} {
		own.GVisor.Runsc = ""
		if err := c.Runtimes[name].Decode(&own); err != nil || own.GVisor.Runsc != "/usr/local/bin/runsc" {
			t.Errorf("runtime %s: got %+v, %v", name, own, err)
		}
	}
	src, err := os.ReadFile(c.Policy)
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.Parse(src, c.Policy)
	if err != nil {
		t.Fatal(err)
	}
	if places := p.Places(); len(places) != 2 || places[0].Isolation != sandbox.GVisor || places[1].Isolation != sandbox.Kernel {
		t.Errorf("places: got %+v", places)
	}
}
