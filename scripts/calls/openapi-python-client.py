import os

from gpt_2_text_generation_client import Client
from gpt_2_text_generation_client.api.openai import create_completion
from gpt_2_text_generation_client.models import CompletionRequest

body = CompletionRequest(prompt="Once", max_tokens=4)
answer = create_completion.sync(client=Client(base_url=os.environ["ADDRESS"]), body=body)
assert answer.choices[0].finish_reason == "length"
