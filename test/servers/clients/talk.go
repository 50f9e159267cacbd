package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"golang.org/x/net/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// call says a text to a method that says it again, and prints that.
func call(ctx context.Context, host, method, text string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	c, err := grpc.NewClient(host, grpc.WithTransportCredentials(credentials.NewTLS(nil)))
	if err != nil {
		return err
	}
	defer c.Close()
	said := new(wrapperspb.StringValue)
	if err := c.Invoke(ctx, method, wrapperspb.String(text), said); err != nil {
		return err
	}
	fmt.Println(said.Value)
	return nil
}

// exchange says a text over a WebSocket, and prints the answer.
func exchange(url, text string) error {
	c, err := websocket.Dial(strings.Replace(url, "https", "wss", 1), "", url)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := websocket.Message.Send(c, text); err != nil {
		return err
	}
	var said string
	if err := websocket.Message.Receive(c, &said); err != nil {
		return err
	}
	fmt.Println(said)
	return nil
}
