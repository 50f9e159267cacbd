package main

import (
	"context"
	"fmt"
	"io"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// imageClient pushes and pulls as docker does, with what the configuration of
// docker says, and tries what the job may not.
func imageClient(ctx context.Context, repository, other string) {
	options := []remote.Option{remote.WithContext(ctx), remote.WithAuthFromKeychain(authn.DefaultKeychain), remote.WithRetryStatusCodes()}
	ref, err := name.ParseReference(repository + ":1")
	if err != nil {
		tell("name", err)
		return
	}
	image, err := random.Image(300_000, 3)
	if err != nil {
		tell("image", err)
		return
	}
	tell("push", remote.Write(ref, image, options...))
	tell("pull", pulled(ref, image, options))
	away, err := name.ParseReference(other + ":1")
	if err == nil {
		_, err = remote.Head(away, options...)
	}
	tell("other repository", err)
	tell("delete", remote.Delete(ref, options...))
	all, err := remote.Catalog(ctx, ref.Context().Registry, options...)
	tell("catalogue", err)
	fmt.Println(all)
}

// pulled wants an image to be what was pushed, to its last layer.
func pulled(ref name.Reference, want v1.Image, options []remote.Option) error {
	got, err := remote.Image(ref, options...)
	if err != nil {
		return err
	}
	a, aerr := got.Digest()
	b, berr := want.Digest()
	if aerr != nil || berr != nil || a != b {
		return fmt.Errorf("got %v, pushed %v: %w %w", a, b, aerr, berr)
	}
	layers, err := got.Layers()
	if err != nil {
		return err
	}
	for _, l := range layers {
		r, err := l.Compressed() // verifies
		if err == nil {
			_, err = io.Copy(io.Discard, r)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
