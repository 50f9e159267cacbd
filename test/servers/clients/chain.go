package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// chain uses a bucket with the key that the SDK finds by itself.
func chain(ctx context.Context, url, bucket string) {
	cfg, err := config.LoadDefaultConfig(ctx, config.WithRegion("us-east-1"))
	if err != nil {
		tell("chain", err)
		return
	}
	key, err := cfg.Credentials.Retrieve(ctx)
	tell("found by "+key.Source, err)
	s := &store{url: url, bucket: bucket, client: s3.NewFromConfig(cfg, func(o *s3.Options) {
		o.BaseEndpoint, o.UsePathStyle, o.RetryMaxAttempts = &url, true, 1
	})}
	err = s.put(ctx, "chain", strings.NewReader("found"), nil)
	if err == nil {
		err = s.same(ctx, "chain", []byte("found"), "")
	}
	tell("chain", err)
}

// registry lists the tags of a repository with what Docker's configuration says.
func registry(ctx context.Context, host, repository string) {
	repo, err := name.NewRepository(host + "/" + repository)
	if err != nil {
		tell("registry", err)
		return
	}
	tags, err := remote.List(repo, remote.WithAuthFromKeychain(authn.DefaultKeychain), remote.WithContext(ctx))
	tell(fmt.Sprint("tags ", tags), err)
}
