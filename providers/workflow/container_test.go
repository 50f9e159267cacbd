package workflow

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
)

const withServices = `on: push
jobs:
  a:
    runs-on: x
    env: {V: "16"}
    container:
      image: registry.example/build:1
      env: {LEVEL: "${{ vars.LEVEL }}"}
      options: --user root --cpus 1
    services:
      Postgres:
        image: postgres:${{ env.V }}
        env:
          POSTGRES_PASSWORD: ${{ secrets.PG }}
        ports: ["5432:5432", 5433, "127.0.0.1:7000:${{ vars.PORT }}/tcp"]
        credentials: {username: me, password: "${{ secrets.REGISTRY }}"}
        options: >-
          --health-cmd "pg_isready -U \"postgres\""
          --health-interval=10s --health-timeout 5s --health-retries 5 --health-start-period 1m
          -m 512m -e 'A=b c' -u postgres --tmpfs /x --init
      old: postgres
      none: {image: "${{ vars.NONE }}"}
    steps: [{run: "true"}]
`

// TestContainers: what a workflow says of containers is read, and evaluated once.
func TestContainers(t *testing.T) {
	t.Parallel()
	w, err := Load([]byte(withServices), "ci.yml")
	if err != nil {
		t.Fatal(err)
	}
	job, err := w.Job("a", facts())
	if err != nil {
		t.Fatal(err)
	}
	scope := Scope{Contexts: map[string]any{
		"env": map[string]string{"V": "16"}, "vars": map[string]any{"LEVEL": "3", "PORT": "7001", "NONE": ""},
		"secrets": map[string]creds.Secret{"PG": creds.NewSecret("pg-pw"), "REGISTRY": creds.NewSecret("reg-pw")},
	}}
	var got []Container
	for _, c := range job.Containers {
		e, err := Contain(c, scope)
		if err != nil {
			t.Fatal(err)
		}
		if c.Name == "Postgres" {
			if e.Password.Reveal() != "reg-pw" {
				t.Errorf("password of the registry: got another one")
			}
			if printed := fmt.Sprintf("%v %+v", e.Password, e); strings.Contains(printed, "reg-pw") {
				t.Errorf("the password of the registry is printed")
			}
			e.Password = creds.Secret{}
		}
		got = append(got, e)
	}
	quiet := Health{Interval: 30 * time.Second, Timeout: 30 * time.Second, Retries: 3}
	want := []Container{
		{
			Image: "registry.example/build:1", Env: map[string]string{"LEVEL": "3"}, Position: "ci.yml:6:5",
			Options: Options{Health: quiet, User: "root", MilliCPU: 1000, Env: map[string]string{}},
		},
		{
			Name: "Postgres", Image: "postgres:16", Env: map[string]string{"POSTGRES_PASSWORD": "pg-pw"}, Position: "ci.yml:11:7", Username: "me",
			Ports: []Port{{5432, 5432}, {0, 5433}, {7000, 7001}},
			Options: Options{
				Health: Health{`pg_isready -U "postgres"`, 10 * time.Second, 5 * time.Second, time.Minute, 5},
				Memory: 512 << 20, Env: map[string]string{"A": "b c"}, User: "postgres",
			},
		},
		{Name: "old", Image: "postgres", Env: map[string]string{}, Position: "ci.yml:21:7", Options: Options{Health: quiet, Env: map[string]string{}}},
		{Name: "none", Env: map[string]string{}, Position: "ci.yml:22:7", Options: Options{Health: quiet, Env: map[string]string{}}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("containers:\ngot  %+v\nwant %+v", got, want)
	}
}

// TestContainersRefused: everything that would reach out of the box, or that a
// box has not, is refused by name and place.
func TestContainersRefused(t *testing.T) {
	t.Parallel()
	service := func(body string) string { return "services: {db: {image: pg, " + body + "}}" }
	for body, want := range map[string]string{
		"container: {image: x, ports: [80]}":                  `"ports" of a job's container`,
		"container: {image: x, options: --privileged}":        "ci.yml:4:36: option --privileged is refused",
		"container: {image: x, options: --user 1001}":         "option --user: steps run as root of their box",
		"container: {image: x, options: --health-cmd true}":   "option --health-cmd is for services",
		"services: ${{ fromJSON('{}') }}":                     `"services" as one expression`,
		"services: {a-: {image: x}}":                          `services: "a-" is not a letter`,
		"services: {" + nine() + "}":                          "9 services: a job may have 8",
		service("volumes: [/:/host]"):                         `"volumes" is not supported`,
		service("volumes: []"):                                `"volumes" is not supported`,
		service("ports: [53/udp]"):                            `port "53/udp": tcp alone`,
		service("ports: ['8000-8010:8000-8010']"):             `port "8000-8010:8000-8010": write 5432`,
		service("ports: ['10.0.0.1:80:80']"):                  `port "10.0.0.1:80:80"`,
		service("ports: [0]"):                                 `port "0"`,
		service("ports: [65536]"):                             `port "65536"`,
		service("options: --network host"):                    "option --network is refused: a box has no network",
		service("options: --net=host"):                        "option --net is refused",
		service("options: -v /:/host"):                        "option --volume is refused: a box sees nothing of the host",
		service("options: '-v/:/host'"):                       "option --volume is refused",
		service("options: --mount type=bind"):                 "option --mount is refused",
		service("options: --pid host"):                        "option --pid is refused",
		service("options: --ipc=host"):                        "option --ipc is refused",
		service("options: --device /dev/kvm"):                 "option --device is refused",
		service("options: --cap-add ALL"):                     "option --cap-add is refused: it would weaken the box",
		service("options: --security-opt seccomp=unconfined"): "option --security-opt is refused",
		service("options: --privileged=true"):                 "option --privileged is refused",
		service("options: --init --privileged"):               "option --privileged is refused",
		service("options: -p 80:80"):                          `option --publish is refused: write it under "ports"`,
		service("options: --hostname x"):                      "option --hostname is refused: a service is found by its key",
		service("options: --frobnicate"):                      "option --frobnicate is not supported; these are: cpus, entrypoint, env, expose, health-cmd",
		service("options: x"):                                 "an option begins with -",
		service("options: '-'"):                               "an option begins with -",
		service("options: '--'"):                              "option --- is not supported",
		service("options: --memory"):                          "option --memory: its value is missing",
		service("options: --memory x"):                        `option --memory: "x" is not a size`,
		service("options: --memory 99999999t"):                "is not a size",
		service("options: --cpus nan"):                        "is not a number of cores",
		service("options: --health-interval 1"):               "is not a duration",
		service("options: --health-retries 0"):                "is not a whole number from 1",
		service("options: '--health-cmd \"x'"):                "a quote is not closed",
		service("options: --env A"):                           "write NAME=VALUE",
		service("options: --workdir x"):                       "is not absolute",
		service("options: --init=no"):                         "option --init: it has no value",
	} {
		w, err := Load([]byte("on: push\njobs:\n  a:\n    "+body+"\n    runs-on: x\n    steps: [{run: x}]\n"), "ci.yml")
		if err != nil {
			t.Errorf("%s: %v", body, err)
			continue
		}
		_, err = w.Job("a", facts())
		if !errors.Is(err, providers.ErrBadJob) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "ci.yml:4:") {
			t.Errorf("%s: got %v, want ErrBadJob with line 4 and %q", body, err, want)
		}
	}
	// What an expression hides is refused when it is evaluated.
	for _, c := range []providers.Container{
		{Name: "db", Options: "${{ vars.O }}", Position: "ci.yml:4:5"},
		{Name: "db", Ports: []string{"${{ vars.O }}"}, Position: "ci.yml:4:5"},
	} {
		_, err := Contain(c, Scope{Contexts: map[string]any{"vars": map[string]any{"O": "--privileged"}}})
		if !errors.Is(err, providers.ErrBadJob) || !strings.Contains(err.Error(), "ci.yml:4:5: service db: ") {
			t.Errorf("%+v: got %v, want ErrBadJob with its place", c, err)
		}
	}
}

func nine() string {
	var all []string
	for i := range 9 {
		all = append(all, fmt.Sprintf("s%d: x", i))
	}
	return strings.Join(all, ", ")
}

// FuzzOptions: no text weakens a box. What is accepted holds nothing but what
// Options can say, and a flag that is not in the list is never accepted.
func FuzzOptions(f *testing.F) {
	for _, seed := range []string{
		`--health-cmd "redis-cli ping" --health-interval 10s`, `-m512m -e A=b`, `--privileged`, `--`, `"`, `'a' \`, `--memory=1g --cpus .5`,
		`--init=true`, "-\x00", "--env=\xff=1", `--user`, `--init --tmpfs /x:rw`,
	} {
		f.Add(seed, false)
		f.Add(seed, true)
	}
	f.Fuzz(func(t *testing.T, text string, own bool) {
		o, err := parseOptions(text, own)
		if err != nil {
			return
		}
		if o.Memory < 0 || o.MilliCPU < 0 || o.Pids < 0 || o.Health.Retries < 1 || o.Health.Interval < 0 || o.Health.Timeout < 0 {
			t.Errorf("%q: got %+v", text, o)
		}
		words, err := splitWords(text)
		if err != nil {
			t.Fatalf("%q: accepted, and cannot be split: %v", text, err)
		}
		for i, word := range words {
			name, _, _ := cutOption(word)
			if _, refused := refusals()[name]; refused && (i == 0 || bare(words[i-1])) {
				t.Errorf("%q: %s is accepted", text, name)
			}
		}
	})
}

// bare says whether a word takes none that follows for its value.
func bare(word string) bool {
	name, _, given := cutOption(word)
	opt, ok := known()[name]
	return ok && (opt.bare || given)
}

// FuzzPort: what is accepted is two ports of TCP.
func FuzzPort(f *testing.F) {
	for _, seed := range []string{"5432", "1:2", "1:2/tcp", "127.0.0.1:1:2", "1-2", "1/udp", ":", "65535:65536", "+1", "1:"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		p, err := parsePort(text)
		if (err == nil) != (p.Container != 0) {
			t.Errorf("%q: got %+v, %v", text, p, err)
		}
	})
}
