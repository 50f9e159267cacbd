package main

import (
	"github.com/mayfly-ci/mayfly/configs"
	"github.com/mayfly-ci/mayfly/sandbox/containerd"
	"github.com/mayfly-ci/mayfly/sandbox/docker"
	"github.com/mayfly-ci/mayfly/sandbox/engine"
)

// engineImages is the key "images" of a runtime over an engine.
type engineImages struct {
	Pull       string   `yaml:"pull"`
	From       []string `yaml:"from"`
	DigestOnly bool     `yaml:"digest_only"`
}

func (i engineImages) config() engine.Images {
	return engine.Images{Pull: engine.When(i.Pull), From: i.From, DigestOnly: i.DigestOnly}
}

func dockerConfig(section configs.Section) (docker.Config, error) {
	var own struct {
		Host    string       `yaml:"host"`
		Image   string       `yaml:"image,required"`
		Runtime string       `yaml:"runtime"`
		Images  engineImages `yaml:"images"`

		GVisor *gvisorNode `yaml:"gvisor"`
	}
	if err := section.Decode(&own); err != nil {
		return docker.Config{}, err
	}
	kernel, err := own.GVisor.config(section)
	if err != nil {
		return docker.Config{}, err
	}
	c := docker.Config{Host: own.Host, Image: own.Image, Images: own.Images.config(), Runtime: own.Runtime, GVisor: kernel}
	for _, check := range []struct {
		key string
		err error
	}{{"host", docker.CheckHost(c.Host)}, {"images", c.Images.Check()}, {"image", c.Images.Allow(c.Image)}} {
		if check.err != nil {
			return docker.Config{}, section.Errorf(check.key, "%w", check.err)
		}
	}
	return c, nil
}

func containerdConfig(section configs.Section) (containerd.Config, error) {
	var own struct {
		Address     string       `yaml:"address"`
		Namespace   string       `yaml:"namespace"`
		Snapshotter string       `yaml:"snapshotter"`
		Image       string       `yaml:"image,required"`
		Runtime     string       `yaml:"runtime"`
		FirstID     uint32       `yaml:"first_id"`
		Images      engineImages `yaml:"images"`

		GVisor *gvisorNode `yaml:"gvisor"`
	}
	if err := section.Decode(&own); err != nil {
		return containerd.Config{}, err
	}
	kernel, err := own.GVisor.config(section)
	if err != nil {
		return containerd.Config{}, err
	}
	c := containerd.Config{
		Address: own.Address, Namespace: own.Namespace, Snapshotter: own.Snapshotter,
		Image: own.Image, Runtime: own.Runtime, FirstID: own.FirstID,
		Images: own.Images.config(), GVisor: kernel,
	}
	for _, check := range []struct {
		key string
		err error
	}{{"address", containerd.CheckAddress(c.Address)}, {"images", c.Images.Check()}, {"image", c.Images.Allow(c.Image)}, {"namespace", containerd.CheckNamespace(c.Namespace)}} {
		if check.err != nil {
			return containerd.Config{}, section.Errorf(check.key, "%w", check.err)
		}
	}
	return c, nil
}
