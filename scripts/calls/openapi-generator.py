import os

import openapi_client as made

with made.ApiClient(made.Configuration(host=os.environ["ADDRESS"])) as client:
    body = made.CompletionRequest(prompt=made.Prompt("Once"), max_tokens=4)
    answer = made.OpenaiApi(client).create_completion(body)
    assert answer.choices[0].finish_reason == "length"
    generated = made.GenerationApi(client).generate(
        made.GenerateRequest(prompt="Once", max_new_tokens=4, seed=2**62)
    )
    assert generated.model_name == os.environ["MODEL"]
