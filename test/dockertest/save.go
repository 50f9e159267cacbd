package dockertest

import (
	"context"
	"errors"
	"fmt"
	"io"
)

// Save writes an archive of images, as "docker save" does.
func (d *Daemon) Save(ctx context.Context, w io.Writer, refs ...string) error {
	in, err := d.engine.ImageSave(ctx, refs)
	if err != nil {
		return fmt.Errorf("save: %w", err)
	}
	_, err = io.Copy(w, in)
	return errors.Join(err, in.Close())
}
