import os
from importlib.metadata import version

import litellm

address, model = os.environ["ADDRESS"], os.environ["MODEL"]
ours = {"api_base": f"{address}/v1", "api_key": "none", "max_tokens": 8, "seed": 1}
completion = {"model": f"text-completion-openai/{model}", "prompt": "Once upon a time", **ours}
text = litellm.text_completion(**completion, top_k=-1, min_p=0).choices[0].text
chunks = litellm.text_completion(**completion, stream=True)
assert text == "".join(chunk.choices[0].text or "" for chunk in chunks)

messages = [{"role": "user", "content": "Tell me a tale."}]
for provider in ("openai", "hosted_vllm"):
    chat = {"model": f"{provider}/{model}", "messages": messages, **ours}
    text = litellm.completion(**chat).choices[0].message.content
    chunks = litellm.completion(**chat, stream=True)
    assert text == "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
print("litellm", version("litellm"))
