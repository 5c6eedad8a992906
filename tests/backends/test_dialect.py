"""What a server takes is found out from what it refuses, in the words of the real ones."""

import json
from typing import Any

import pytest

from backends.base import InvalidField
from backends.dialect import Dialect, TakesOne
from backends.refusals import read_refusal

BODY = {
    "prompt": "Once", "max_tokens": 7, "temperature": 1.0, "top_p": 0.9, "n": 1, "seed": 3,
    "top_k": 5, "stop": ["."], "stream": True, "stream_options": {"include_usage": True},
}  # fmt: skip
CHAT = {**BODY, "messages": [{"role": "user", "content": "Once"}]}
del CHAT["prompt"], CHAT["n"]


def openai_error(message: str, **more: Any) -> dict[str, Any]:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return {"error": error | more}


def forbidden(*names: str) -> list[dict[str, Any]]:
    message = "Extra inputs are not permitted"
    return [
        {"type": "extra_forbidden", "loc": ["body", n], "msg": message, "input": 1} for n in names
    ]


NO_SUCH = "Unsupported parameter: '{}' is not supported with this model."
ONLY_ONE = (
    "Unsupported value: 'temperature' does not support 0.5 with this model. Only the default (1)"
)
NOT_BOTH = "`temperature` and `top_p` cannot both be specified for this model. Please use only one."


TOO_LONG = "context_length_exceeded"
LLAMA_CPPS = {
    "code": 400, "type": "exceed_context_size_error", "n_prompt_tokens": 9412, "n_ctx": 8192,
    "message": "request (9412 tokens) exceeds the available context size (8192 tokens)",
}  # fmt: skip


@pytest.mark.parametrize(
    ("said", "gone", "come"),
    [
        (
            openai_error(
                NO_SUCH.format("max_tokens") + " Use 'max_completion_tokens' instead.",
                param="max_tokens", code="unsupported_parameter",
            ),
            {"max_tokens"}, {"max_completion_tokens": 7},
        ),
        (openai_error(NO_SUCH.format("stop"), code="invalid_request_body"), {"stop"}, {}),
        (openai_error(ONLY_ONE, param="temperature", code="unsupported_value"),
         {"temperature"}, {}),
        (openai_error("Unrecognized request argument supplied: top_k"), {"top_k"}, {}),
        (openai_error("Unrecognized request arguments supplied: top_k, seed"),
         {"top_k", "seed"}, {"random_seed": 3}),
        (openai_error("must be verified to stream", param="stream", code="unsupported_value"),
         {"stream", "stream_options"}, {}),
        (openai_error("property 'top_k' is unsupported"), {"top_k"}, {}),
        ([openai_error('Invalid JSON payload received. Unknown name "seed": Cannot find field.')],
         {"seed"}, {"random_seed": 3}),
        ({"object": "error", "message": {"detail": forbidden("seed", "stream_options")},
          "type": "invalid_request_error", "param": None, "code": None},
         {"seed", "stream_options"}, {"random_seed": 3}),
        ({"object": "Error", "detail": forbidden("top_k"), "message": forbidden("top_k")},
         {"top_k"}, {}),
        ({"type": "error", "error": {"type": "invalid_request_error", "message": NOT_BOTH}},
         {"top_p"}, {}),
        ({"type": "error", "error": {"type": "invalid_request_error",
                                     "message": "top_k: Extra inputs are not permitted"}},
         {"top_k"}, {}),
    ],
)  # fmt: skip
def test_refused_field_is_sent_no_more(said: Any, gone: set[str], come: dict[str, Any]) -> None:
    """OpenAI: griptape-ai/ComfyUI-Griptape issue 312, huggingface/smolagents issue 1671,
    owndev/Open-WebUI-Functions issue 98, xlinx/sd-webui-decadetw-auto-prompt-llm issue 29,
    RooCodeInc/Roo-Code issue 6868. Mistral: eca issue 231, partITech/php-mistral issue 76; it calls
    a seed `random_seed`. Anthropic: BerriAI/litellm issue 15097, amrit110/oli issue 7."""
    dialect = Dialect(has_completions=False)
    _, written = dialect.write("chat/completions", CHAT)
    assert written == CHAT
    assert len(dialect.learn(written, read_refusal(400, json.dumps(said).encode()))) > 0
    _, again = dialect.write("chat/completions", CHAT)
    assert (written.keys() - again.keys(), again) == (
        gone, {name: value for name, value in CHAT.items() if name not in gone} | come
    )  # fmt: skip


def test_field_refused_beside_another_is_sent_alone() -> None:
    dialect, said = Dialect(), {"error": {"message": NOT_BOTH}}
    dialect.learn(CHAT, read_refusal(400, json.dumps(said).encode()))
    assert dialect.write("completions", {"prompt": "Once", "top_p": 0.5})[1]["top_p"] == 0.5


@pytest.mark.parametrize("name", ["max_tokens", "messages", "logprobs", "unknown"])
def test_field_that_cannot_go_is_not_left_out(name: str) -> None:
    """A bound that a server takes under neither name must not be lost; nor what makes the form."""
    dialect, body = Dialect(), {**CHAT, "logprobs": True}
    for written_name in (name, "max_completion_tokens"):
        said = openai_error("No", param=written_name, code="unsupported_parameter")
        _, written = dialect.write("chat/completions", body)
        dialect.learn(written, read_refusal(400, json.dumps(said).encode()))
    _, written = dialect.write("chat/completions", body)
    assert written.get("max_tokens", written.get("max_completion_tokens")) == 7
    assert written["messages"] == body["messages"]
    assert written["logprobs"] is True


def test_what_quotes_the_prompt_is_not_taken_for_a_refused_field() -> None:
    """A client could have taken the seed away from all others."""
    said = openai_error("Bad prompt: Unrecognized request argument supplied: seed")
    assert read_refusal(400, json.dumps(said).encode()).fields == ()


def test_prompt_becomes_a_conversation() -> None:
    body = {"prompt": ["Once"], "logprobs": 2, "echo": False, "n": 1}
    assert Dialect(has_completions=False).write("completions", body) == (
        "chat/completions",
        {"messages": [{"role": "user", "content": "Once"}], "max_tokens": 16,
         "logprobs": True, "top_logprobs": 2},
    )  # fmt: skip


def test_conversation_has_one_prompt_and_no_echo() -> None:
    dialect = Dialect(has_completions=False)
    with pytest.raises(TakesOne):
        dialect.write("completions", {"prompt": ["Once", "Then"]})
    with pytest.raises(InvalidField, match="echo: "):
        dialect.write("completions", {"prompt": "Once", "echo": True})


@pytest.mark.parametrize(
    ("status", "said", "code", "has_none"),
    [
        (400, {"error": LLAMA_CPPS}, TOO_LONG, False),
        (400, {"object": "error", "message": "This model's maximum context length is 64 tokens.",
               "type": "BadRequestError", "code": 400}, TOO_LONG, False),
        (400, {"type": "error", "error": {"type": "invalid_request_error",
               "message": "prompt is too long: 210000 tokens > 200000 maximum"}}, TOO_LONG, False),
        (422, {"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 64.",
               "error_type": "validation"}, TOO_LONG, False),
        (400, openai_error("No", code="content_policy_violation"), "content_filter", False),
        (400, openai_error("The model does not support Completions API", code=400), None, True),
        (404, {"message": "no Route matched with those values"}, None, True),
        (405, {"detail": "Method Not Allowed"}, None, True),
        (400, openai_error("This is a chat model and not supported in the v1/completions endpoint. "
                           "Did you mean to use v1/chat/completions?", param="model"), None, True),
        (400, [], None, False),
    ],
)  # fmt: skip
def test_refusal_says_why(status: int, said: Any, code: str | None, has_none: bool) -> None:
    """llama.cpp: ggml-org/llama.cpp pull request 15780. OpenAI: sashabaranov/go-openai issue 126.
    vLLM: `create_completion` in vllm/entrypoints/openai. Mistral: nextcloud/assistant issue 593."""
    refusal = read_refusal(status, json.dumps(said).encode())
    assert (refusal.code, refusal.has_no_completions) == (code, has_none)


def test_refusal_that_cannot_be_read_says_its_status_alone() -> None:
    for body in (b"", b"<html>", b"[" * 100_000, b'"text"', b'{"error": 3}'):
        assert read_refusal(400, body) == read_refusal(400, b"")
