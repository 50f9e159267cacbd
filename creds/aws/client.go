package aws

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/mayfly-ci/mayfly/creds/web"
)

// A key is what a request is signed with.
type key struct {
	ID     string `json:"id" xml:"AccessKeyId"`
	Secret string `json:"secret" xml:"SecretAccessKey"`
	Token  string `json:"token" xml:"SessionToken"`
}

// A refusal is an error that the service itself sent.
type refusal struct {
	status        int
	code, message string
}

func (r *refusal) Error() string {
	return fmt.Sprintf("server answers %d: %s: %s", r.status, r.code, r.message)
}

// refused says whether err is an answer of one of those codes.
func refused(err error, codes ...string) bool {
	var r *refusal
	return errors.As(err, &r) && slices.Contains(codes, r.code)
}

// A call is one request. A form is sent as the body of a POST; the query API of
// the STS and of IAM wants that.
type call struct {
	service, method, path string
	form                  url.Values
	key                   key // zero: not signed
}

// do sends a request and reads the answer into, unless that is nil. Whatever is
// not 2xx is an error, a *refusal if the service said it.
func (i *Issuer) do(ctx context.Context, c call, into any) error {
	address, region := i.config.at(c.service)
	body := c.form.Encode()
	req, err := http.NewRequestWithContext(ctx, c.method, address+c.path, strings.NewReader(body))
	if err != nil {
		return fmt.Errorf("request: %w", err)
	}
	if c.form != nil {
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	if c.key.ID != "" {
		sum := sha256.Sum256([]byte(body))
		hash := hex.EncodeToString(sum[:])
		req.Header.Set("X-Amz-Content-Sha256", hash) // S3 wants it
		service := c.service
		if i.config.minio() {
			service = "s3"
		}
		signed := aws.Credentials{AccessKeyID: c.key.ID, SecretAccessKey: c.key.Secret, SessionToken: c.key.Token}
		if err := v4.NewSigner().SignHTTP(ctx, signed, req, hash, service, region, i.config.Now()); err != nil {
			return errors.New("request: cannot be signed")
		}
	}
	status, b, err := web.Do(i.client, req)
	switch {
	case err != nil:
		return fmt.Errorf("%s: %w", c.service, err)
	case status/100 != 2:
		return fmt.Errorf("%s: %w", c.service, complaint(c, status, b))
	case into == nil:
		return nil
	}
	if err := xml.Unmarshal(b, into); err != nil {
		return fmt.Errorf("%s: answer %d is not of its API", c.service, status)
	}
	return nil
}

// complaint is the service's refusal. What comes from a proxy before it says
// nothing about a credential.
func complaint(c call, status int, b []byte) error {
	var said struct {
		XMLName xml.Name `json:"-"`
		Code    string   `xml:"Code"`
		Message string   `xml:"Message"`
		Inner   struct {
			Code    string `xml:"Code"`
			Message string `xml:"Message"`
		} `xml:"Error" json:"-"`
	}
	b = bytes.TrimSpace(b)
	var err error
	if bytes.HasPrefix(b, []byte("{")) { // MinIO's administration
		err = json.Unmarshal(b, &said)
	} else if err = xml.Unmarshal(b, &said); err == nil && said.XMLName.Local != "Error" && said.XMLName.Local != "ErrorResponse" {
		err = errors.New("another document")
	}
	code, message := said.Code, said.Message
	if code == "" {
		code, message = said.Inner.Code, said.Inner.Message
	}
	if err != nil || code == "" {
		return fmt.Errorf("answer %d is not of its API", status)
	}
	message = web.Words(message, c.key.Secret, c.key.Token, c.form.Get("WebIdentityToken"))
	return &refusal{status, web.Words(code), message}
}
