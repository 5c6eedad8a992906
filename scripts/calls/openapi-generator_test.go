package openapi

import (
	"context"
	"os"
	"testing"
)

func TestCall(t *testing.T) {
	made := NewConfiguration()
	made.Servers = ServerConfigurations{{URL: os.Getenv("ADDRESS")}}
	prompt, body := "Once", NewCompletionRequest()
	body.SetMaxTokens(4)
	body.SetPrompt(Prompt{String: &prompt})
	call := NewAPIClient(made).OpenaiAPI.CreateCompletion(context.Background())
	answer, _, err := call.CompletionRequest(*body).Execute()
	if err != nil {
		t.Fatal(err)
	}
	if reason := answer.Choices[0].GetFinishReason(); reason != "length" {
		t.Fatal(reason)
	}
}
