import os
from importlib.metadata import version

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

address, model = os.environ["ADDRESS"], os.environ["MODEL"]
ours = {"model": model, "api_base": f"{address}/v1", "api_key": "none", "max_tokens": 8}
completing = OpenAILike(**ours, is_chat_model=False, additional_kwargs={"seed": 1})
text = completing.complete("Once upon a time").text
assert text == list(completing.stream_complete("Once upon a time"))[-1].text
chatting = OpenAILike(**ours, is_chat_model=True, additional_kwargs={"seed": 1})
messages = [ChatMessage(role="user", content="Tell me a tale.")]
text = chatting.chat(messages).message.content
assert text == list(chatting.stream_chat(messages))[-1].message.content
print("llama-index-llms-openai-like", version("llama-index-llms-openai-like"))
