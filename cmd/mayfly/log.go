package main

import (
	"fmt"
	"io"

	"github.com/rs/zerolog"

	"github.com/mayfly-ci/mayfly/configs"
)

// operatorLog is what the agent says of itself, as the configuration wants it.
func operatorLog(c configs.Log, to io.Writer) (zerolog.Logger, error) {
	level, err := zerolog.ParseLevel(c.Level)
	if err != nil {
		return zerolog.Nop(), fmt.Errorf("log level: %w", err)
	}
	if c.Format == "console" {
		return consoleLog(to).Level(level), nil
	}
	return zerolog.New(to).Level(level).With().Timestamp().Logger(), nil
}

func consoleLog(to io.Writer) zerolog.Logger {
	return zerolog.New(zerolog.ConsoleWriter{Out: to, TimeFormat: "15:04:05.000"}).With().Timestamp().Logger()
}
