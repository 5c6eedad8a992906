import os
from importlib.metadata import version

from langchain_openai import ChatOpenAI, OpenAI

address, model = os.environ["ADDRESS"], os.environ["MODEL"]
ours = {"base_url": f"{address}/v1", "api_key": "none", "model": model, "max_tokens": 8, "seed": 1}
completing = OpenAI(**ours)
text = completing.invoke("Once upon a time")
assert text == "".join(completing.stream("Once upon a time"))
assert len(completing.generate(["One day", "A fox"]).generations) == 2

chatting = ChatOpenAI(**ours)
text = chatting.invoke("Tell me a tale.").content
assert text == "".join(chunk.content for chunk in chatting.stream("Tell me a tale."))
print("langchain-openai", version("langchain-openai"))
