package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	miniocreds "github.com/minio/minio-go/v7/pkg/credentials"
	"github.com/minio/minio-go/v7/pkg/signer"
)

// A store is a bucket, and the key of the environment.
type store struct {
	client      *s3.Client
	url, bucket string
	key         aws.Credentials
}

func s3Client(ctx context.Context, url, bucket string) {
	s := &store{url: url, bucket: bucket, key: aws.Credentials{
		AccessKeyID: os.Getenv("AWS_ACCESS_KEY_ID"), SecretAccessKey: os.Getenv("AWS_SECRET_ACCESS_KEY"), SessionToken: os.Getenv("AWS_SESSION_TOKEN"),
	}}
	s.client = s.clientOf(s.key, "us-east-1")
	tell("put and get", s.plain(ctx))
	tell("ranges", s.ranges(ctx))
	tell("odd names", s.names(ctx))
	tell("gzip", s.encoded(ctx))
	tell("multipart", s.multipart(ctx))
	tell("unsigned trailer", s.stream(ctx))
	tell("presigned", s.presigned(ctx))
	tell("signed chunks", s.chunks(ctx, "chunks", false, false))
	tell("signed trailer", s.chunks(ctx, "trailer", true, false))
	tell("changed chunk", s.chunks(ctx, "changed", false, true))
	tell("changed trailer", s.chunks(ctx, "changed", true, true))
	foreign := s.key
	foreign.AccessKeyID = "AKIAFOREIGNTENANT000"
	tell("foreign key", s.get(ctx, foreign, "us-east-1", "small"))
	wrong := s.key
	wrong.SecretAccessKey = strings.Repeat("x", len(wrong.SecretAccessKey))
	tell("wrong secret", s.get(ctx, wrong, "us-east-1", "small"))
	tell("other region", s.get(ctx, s.key, "eu-west-1", "small"))
	anonymous, err := http.Get(s.url + "/" + bucket + "/small")
	tell("unsigned", answered(anonymous, err))
	_, err = s.client.GetObject(ctx, &s3.GetObjectInput{Bucket: &bucket, Key: aws.String("absent")})
	tell("absent", err)
	_, err = s.client.ListObjectsV2(ctx, &s3.ListObjectsV2Input{Bucket: aws.String("other")})
	tell("other bucket", err)
}

// session makes the bucket if it is not there, and prints a key that is good for
// nothing else.
func session(ctx context.Context, url, bucket string) {
	s := &store{url: url, bucket: bucket, key: aws.Credentials{AccessKeyID: os.Getenv("AWS_ACCESS_KEY_ID"), SecretAccessKey: os.Getenv("AWS_SECRET_ACCESS_KEY")}}
	s.client = s.clientOf(s.key, "us-east-1")
	var owned *types.BucketAlreadyOwnedByYou
	if _, err := s.client.CreateBucket(ctx, &s3.CreateBucketInput{Bucket: &bucket}); err != nil && !errors.As(err, &owned) {
		tell("bucket", err)
		os.Exit(1)
	}
	c, err := miniocreds.NewSTSAssumeRole(url, miniocreds.STSAssumeRoleOptions{
		AccessKey: s.key.AccessKeyID, SecretKey: s.key.SecretAccessKey, DurationSeconds: 900,
		Policy: `{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":["s3:*"],"Resource":["arn:aws:s3:::` + bucket + `","arn:aws:s3:::` + bucket + `/*"]}]}`,
	})
	var v miniocreds.Value
	if err == nil {
		v, err = c.GetWithContext(&miniocreds.CredContext{Client: http.DefaultClient})
	}
	if err != nil {
		tell("session", err)
		os.Exit(1)
	}
	fmt.Println(v.AccessKeyID, v.SecretAccessKey, v.SessionToken)
}

func (s *store) clientOf(key aws.Credentials, region string) *s3.Client {
	return s3.New(s3.Options{
		Region: region, BaseEndpoint: &s.url, UsePathStyle: true, RetryMaxAttempts: 1,
		Credentials: credentials.StaticCredentialsProvider{Value: key},
	})
}

func (s *store) put(ctx context.Context, name string, body io.Reader, change func(*s3.PutObjectInput)) error {
	in := &s3.PutObjectInput{Bucket: &s.bucket, Key: &name, Body: body}
	if change != nil {
		change(in)
	}
	_, err := s.client.PutObject(ctx, in)
	return err
}

// same wants an object to be what was sent.
func (s *store) same(ctx context.Context, name string, want []byte, bounds string) error {
	in := &s3.GetObjectInput{Bucket: &s.bucket, Key: &name}
	if bounds != "" {
		in.Range = &bounds
	}
	out, err := s.client.GetObject(ctx, in)
	if err != nil {
		return err
	}
	defer out.Body.Close()
	got, err := io.ReadAll(out.Body)
	if err == nil && (!bytes.Equal(got, want) || aws.ToInt64(out.ContentLength) != int64(len(want))) {
		err = fmt.Errorf("%s: got %d bytes (length %d), sent %d", name, len(got), aws.ToInt64(out.ContentLength), len(want))
	}
	return err
}

func (s *store) get(ctx context.Context, key aws.Credentials, region, name string) error {
	_, err := s.clientOf(key, region).GetObject(ctx, &s3.GetObjectInput{Bucket: &s.bucket, Key: &name})
	return err
}

func (s *store) plain(ctx context.Context) error {
	body := []byte("a small object")
	return errors.Join(
		s.put(ctx, "small", bytes.NewReader(body), func(in *s3.PutObjectInput) { in.Metadata = map[string]string{"note": "two  blanks"} }),
		s.same(ctx, "small", body, ""), s.put(ctx, "empty", bytes.NewReader(nil), nil), s.same(ctx, "empty", nil, ""))
}

func (s *store) ranges(ctx context.Context) error {
	return errors.Join(s.same(ctx, "small", []byte("small"), "bytes=2-6"), s.same(ctx, "small", []byte("object"), "bytes=-6"))
}

func (s *store) names(ctx context.Context) error {
	var errs []error
	for _, name := range []string{"a b+c=d&e", "ü/ñ~(1)!*'.txt", "deep/er/than-that", "100%", "q?x=y#z"} {
		errs = append(errs, s.put(ctx, name, strings.NewReader(name), nil), s.same(ctx, name, []byte(name), ""))
		_, err := s.client.ListObjectsV2(ctx, &s3.ListObjectsV2Input{Bucket: &s.bucket, Prefix: &name, Delimiter: aws.String("/")})
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// encoded is stored with an encoding that nobody takes off.
func (s *store) encoded(ctx context.Context) error {
	body := []byte("\x1f\x8bnot really")
	return errors.Join(s.put(ctx, "gzip", bytes.NewReader(body), func(in *s3.PutObjectInput) { in.ContentEncoding = aws.String("gzip") }),
		s.same(ctx, "gzip", body, ""))
}

func (s *store) multipart(ctx context.Context) error {
	name := aws.String("parts")
	made, err := s.client.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{Bucket: &s.bucket, Key: name})
	if err != nil {
		return err
	}
	var whole []byte
	var parts []types.CompletedPart
	for i, size := range []int{5 << 20, 5 << 20, 12345} {
		part := noise(size)
		whole = append(whole, part...)
		n := aws.Int32(int32(i) + 1)
		out, err := s.client.UploadPart(ctx, &s3.UploadPartInput{
			Bucket: &s.bucket, Key: name, UploadId: made.UploadId, PartNumber: n, Body: bytes.NewReader(part),
		})
		if err != nil {
			return err
		}
		parts = append(parts, types.CompletedPart{ETag: out.ETag, PartNumber: n, ChecksumCRC32: out.ChecksumCRC32})
	}
	_, err = s.client.CompleteMultipartUpload(ctx, &s3.CompleteMultipartUploadInput{
		Bucket: &s.bucket, Key: name, UploadId: made.UploadId, MultipartUpload: &types.CompletedMultipartUpload{Parts: parts},
	})
	return errors.Join(err, s.same(ctx, "parts", whole, ""))
}

// stream sends what cannot be read twice, so that its checksum follows it.
func (s *store) stream(ctx context.Context) error {
	body := noise(3 << 20)
	err := s.put(ctx, "stream", io.MultiReader(bytes.NewReader(body)), func(in *s3.PutObjectInput) {
		in.ContentLength, in.ChecksumAlgorithm = aws.Int64(int64(len(body))), types.ChecksumAlgorithmCrc32c
	})
	return errors.Join(err, s.same(ctx, "stream", body, ""))
}

func (s *store) presigned(ctx context.Context) error {
	sign := s3.NewPresignClient(s.client, s3.WithPresignExpires(time.Hour))
	name := aws.String("pre signed")
	body := noise(100_000)
	up, err := sign.PresignPutObject(ctx, &s3.PutObjectInput{Bucket: &s.bucket, Key: name})
	if err != nil {
		return err
	}
	err = fetch(up, bytes.NewReader(body))
	down, derr := sign.PresignGetObject(ctx, &s3.GetObjectInput{Bucket: &s.bucket, Key: name})
	if err = errors.Join(err, derr, s.same(ctx, *name, body, "")); err != nil {
		return err
	}
	return fetch(down, nil)
}

func fetch(r *v4.PresignedHTTPRequest, body io.Reader) error {
	req, err := http.NewRequest(r.Method, r.URL, body)
	if err != nil {
		return err
	}
	for k, v := range r.SignedHeader {
		if k != "Host" {
			req.Header[k] = v
		}
	}
	return answered(http.DefaultClient.Do(req))
}

func answered(resp *http.Response, err error) error {
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if text, _ := io.ReadAll(resp.Body); resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", resp.Status, text)
	}
	return nil
}

// digest is what the signer wants.
type digest struct{ hash.Hash }

func (digest) Close() {}

// chunks sends 200 kB in signed chunks, of which one may be another than was
// signed.
func (s *store) chunks(ctx context.Context, name string, trailer, change bool) error {
	body := noise(200_000)
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, s.url+"/"+s.bucket+"/"+name, bytes.NewReader(body))
	if err != nil {
		return err
	}
	if trailer {
		sum := binary.BigEndian.AppendUint32(nil, crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli)))
		req.Trailer = http.Header{"X-Amz-Checksum-Crc32c": {base64.StdEncoding.EncodeToString(sum)}}
		req.Header.Set("X-Amz-Trailer", "x-amz-checksum-crc32c")
	}
	req = signer.StreamingSignV4(req, s.key.AccessKeyID, s.key.SecretAccessKey, s.key.SessionToken, "us-east-1", int64(len(body)), time.Now().UTC(), digest{sha256.New()})
	if change {
		sent, err := io.ReadAll(req.Body)
		if err != nil {
			return err
		}
		at := 100_000
		if trailer {
			at = bytes.Index(sent, []byte("crc32c:")) + 8
		}
		sent[at] ^= 1
		req.Body = io.NopCloser(bytes.NewReader(sent))
	}
	if err := answered(http.DefaultClient.Do(req)); err != nil {
		return err
	}
	return s.same(ctx, name, body, "")
}

// noise is bytes that no compression shrinks.
func noise(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(n)})
	_, _ = r.Read(b) // it never fails
	return b
}
