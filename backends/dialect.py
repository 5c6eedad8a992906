"""Which requests one model of another server takes, found out from what it refuses."""

from typing import Any, Literal

from backends.base import InvalidField
from backends.refusals import Refusal

Route = Literal["completions", "chat/completions"]

DEFAULT_MAX_TOKENS = 16  # of completions, in OpenAI's protocol; a conversation has no bound
NO_BOUND = -1  # a `max_tokens` that asks for as many as fit: llama.cpp's, and ours
# What other servers call a field: OpenAI the bound for its models that think, which Mistral does
# not know; Mistral the seed.
OTHER_NAMES = {
    "max_tokens": "max_completion_tokens",
    "max_completion_tokens": "max_tokens",
    "seed": "random_seed",
}
# Fields without which the answer has the form that was asked for, and ends where it should: of
# `stop`, HeldText sees to that. A refusal of any other field stays one.
CAN_BE_LEFT_OUT = {
    "temperature", "top_p", "top_k", "min_p", "random_seed", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "repetition_penalty_range", "temperature_last",
    "logit_bias", "min_tokens", "ignore_eos", "stop", "stream", "stream_options",
}  # fmt: skip


class TakesOne(Exception):
    """The server makes one text a request: another prompt or choice needs one of its own."""


class Dialect:
    """What a server is known to take.

    has_completions: None until it is found out.
    """

    def __init__(self, has_completions: bool | None = None):
        self.has_completions = has_completions
        self.takes_several = True  # choices in one request
        self.takes_no_bound = True  # as -1; else as null, which vLLM has for it
        self.renamed: dict[str, str] = {}
        self.left_out: dict[str, str | None] = {}  # None: always, else beside this field

    def write(
        self, route: Route, body: dict[str, Any], through_chat: bool = False
    ) -> tuple[Route, dict[str, Any]]:
        """A request as the server takes it. through_chat: as a conversation, though it is not
        known whether there are completions.

        Raises TakesOne, and InvalidField for what no conversation has.
        """
        if route == "completions" and (through_chat or self.has_completions is False):
            route, body = "chat/completions", as_chat(body)
        written = dict(body)
        if written.get("max_tokens") == NO_BOUND and not self.takes_no_bound:
            written["max_tokens"] = None
        if written.get("n") == 1:  # which some refuse, and which is what it is anyway
            del written["n"]
        if "n" in written and not self.takes_several:
            raise TakesOne
        for name, other_name in self.renamed.items():
            if name in written:
                written.setdefault(other_name, written.pop(name))
        for name, beside in self.left_out.items():
            if beside is None or beside in written:
                written.pop(name, None)
        if "stream" not in written:
            written.pop("stream_options", None)
        return route, written

    def learn(self, written: dict[str, Any], refusal: Refusal) -> list[str]:
        """What is new in a refusal of this request, in words for the log."""
        news = []
        for name, beside in ((field.name, field.beside) for field in refusal.fields):
            if name not in written or name in self.renamed or name in self.left_out:
                continue
            other_name = OTHER_NAMES.get(name)
            if name == "n":
                self.takes_several = False
                news.append("n: asks for one text at a time")
            elif other_name and other_name not in self.renamed:
                self.renamed[name] = other_name
                news.append(f"{name}: is sent as {other_name}")
            elif name in CAN_BE_LEFT_OUT:
                self.left_out[name] = beside
                news.append(f"{name}: is left out" + (f" beside {beside}" if beside else ""))
        return news


def as_chat(body: dict[str, Any]) -> dict[str, Any]:
    """A request to continue a prompt as one to answer it.

    Raises TakesOne for several prompts, InvalidField for an echo, which no answer has.
    """
    prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
    if len(prompts) > 1:
        raise TakesOne
    if body.get("echo"):
        raise InvalidField("echo", "cannot be had of this model, whose server has chat only")
    chat = {name: value for name, value in body.items() if name not in ("prompt", "echo")}
    chat["messages"] = [{"role": "user", "content": prompts[0]}]
    if chat.setdefault("max_tokens", DEFAULT_MAX_TOKENS) in (NO_BOUND, None):
        del chat["max_tokens"]
    num_logprobs = chat.pop("logprobs", None)
    if num_logprobs is not None:
        chat |= {"logprobs": True, "top_logprobs": num_logprobs}
    return chat
