package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// A row is one figure. Its samples are all that were taken, outliers too.
type row struct {
	name, unit string
	samples    []float64
	budget     float64
	more       bool // the budget is a least and not a most
	info       bool // there is no budget: the row is for comparison
}

// A table is what the benchmark found, in the order of the design.
type table []*row

func (t *table) info(name, unit string, samples ...float64) {
	*t = append(*t, &row{name: name, unit: unit, samples: samples, info: true})
}

func (t *table) most(budget float64, name, unit string, samples ...float64) {
	*t = append(*t, &row{name: name, unit: unit, samples: samples, budget: budget})
}

func (t *table) least(budget float64, name, unit string, samples ...float64) {
	*t = append(*t, &row{name: name, unit: unit, samples: samples, budget: budget, more: true})
}

func (r *row) verdict() string {
	switch m := median(r.samples); {
	case r.info:
		return ""
	case r.more && m >= r.budget, !r.more && m <= r.budget:
		return "met"
	}
	return "missed"
}

func (r *row) limit() string {
	switch {
	case r.info:
		return ""
	case r.more:
		return fmt.Sprintf("≥ %g", r.budget)
	}
	return fmt.Sprintf("≤ %g", r.budget)
}

// print writes the table for people.
func (t table) print(to io.Writer) error {
	w := tabwriter.NewWriter(to, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "what\tunit\tn\tmin\tmedian\tbudget\t")
	for _, r := range t {
		fmt.Fprintf(w, "%s\t%s\t%d\t%.4g\t%.4g\t%s\t%s\n", r.name, r.unit, len(r.samples),
			slices.Min(r.samples), median(r.samples), r.limit(), r.verdict())
	}
	return w.Flush()
}

// save writes the table for programs, if they asked for it.
func (t table) save(file string) error {
	if file == "" {
		return nil
	}
	type entry struct {
		Name   string   `json:"name"`
		Unit   string   `json:"unit"`
		N      int      `json:"n"`
		Min    float64  `json:"min"`
		Median float64  `json:"median"`
		Budget *float64 `json:"budget"` // null: a row for comparison
	}
	var list []entry
	for _, r := range t {
		e := entry{Name: r.name, Unit: r.unit, N: len(r.samples), Min: slices.Min(r.samples), Median: median(r.samples)}
		if !r.info {
			e.Budget = &r.budget
		}
		list = append(list, e)
	}
	b, err := json.MarshalIndent(list, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(b, '\n'), 0o644)
}

// median is the middle one, the mean of two if there are two.
func median(samples []float64) float64 {
	s := slices.Sorted(slices.Values(samples))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// load is how busy the machine is, its own doing included.
func load() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return err.Error()
	}
	return strings.Join(strings.Fields(string(b))[:3], " ")
}

// missed names the rows that miss their budget.
func (t table) missed() []string {
	var names []string
	for _, r := range t {
		if r.verdict() == "missed" {
			names = append(names, r.name)
		}
	}
	return names
}
