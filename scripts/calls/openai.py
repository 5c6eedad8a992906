import os

from openai import NotFoundError, OpenAI, __version__

address, model = os.environ["ADDRESS"], os.environ["MODEL"]
client = OpenAI(base_url=f"{address}/v1", api_key="none")
assert model in [each.id for each in client.models.list()]

completion = {"model": model, "prompt": "Once upon a time", "max_tokens": 8, "seed": 1}
answer = client.completions.create(**completion, n=2, logprobs=20)
assert len(answer.choices) == 2
assert len(answer.choices[0].logprobs.top_logprobs[0]) >= 20
chunks = client.completions.create(**completion, stream=True)
assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text

messages = [{"role": "user", "content": "Tell me a tale."}]
chat = {"model": model, "messages": messages, "max_completion_tokens": 8, "seed": 1}
answer = client.chat.completions.create(**chat)
chunks = client.chat.completions.create(**chat, stream=True)
deltas = [chunk.choices[0].delta.content or "" for chunk in chunks]
assert "".join(deltas) == answer.choices[0].message.content

code = None
try:
    client.completions.create(**completion | {"model": "no-such-model"})
except NotFoundError as error:
    code = error.code
assert code == "model_not_found"
print("openai", __version__)
