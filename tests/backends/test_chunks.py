"""What other servers send, as they send it: understood, or left out, but never the text."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from backends.chunks import DONE, parse_chunk, read_events


def read(content: bytes, **headers: str) -> list[bytes]:
    async def events() -> list[bytes]:
        return [
            event
            async for event in read_events(httpx.Response(200, headers=headers, content=content))
        ]

    return asyncio.run(events())


def parse(**choice: Any) -> Any:
    (parsed,) = parse_chunk(
        json.dumps({"choices": [{"text": " there", **choice}]}).encode()
    ).choices
    assert parsed.added == " there"
    return parsed


@pytest.mark.parametrize(
    ("said", "known"),
    [
        ("stop", "stop"),
        ("length", "length"),
        ("content_filter", "content_filter"),
        ("eos_token", "stop"),
        ("stop_sequence", "stop"),
        ("tool_calls", "stop"),
        ("a_new_one", "stop"),
        ({"type": "stop"}, "stop"),
        ("model_length", "length"),
        ("abort", "length"),
        ("error", "length"),
        ("", None),
        (None, None),
    ],
)
def test_finish_reason_is_one_of_openais(said: Any, known: str | None) -> None:
    """TGI's are `eos_token`, `stop_sequence`, `length` (huggingface/text-generation-inference
    pull request 2344); Mistral's `stop`, `length`, `model_length`, `error`, `tool_calls`; vLLM has
    `abort`. A text that is cut is told as `length`."""
    assert parse(finish_reason=said).finish_reason == known


TOKEN = {"id": 612, "token": " there", "bytes": [32, 116], "logprob": -0.5}


@pytest.mark.parametrize(
    "logprobs",
    [
        {"content": [{"logprob": "low"}]},
        {"content": [{**TOKEN, "logprob": float("nan")}]},
        {"tokens": [" there"]},
        {"tokens": 3},
        [],
        "none",
    ],
)
def test_strange_logprobs_are_left_out(logprobs: Any) -> None:
    assert parse(logprobs=logprobs).logprobs is None


def test_logprobs_of_llama_cpp_become_those_of_completions() -> None:
    """Its server writes them for `completions` as OpenAI does for chat: `probs_vector_to_json` in
    tools/server/server-task.cpp of ggml-org/llama.cpp."""
    other = {"id": 373, "token": " was", "bytes": [32, 119], "logprob": -float("inf")}
    parsed = parse(logprobs={"content": [{**TOKEN, "top_logprobs": [other]}, TOKEN]})
    assert parsed.logprobs.as_completion(7).model_dump() == {
        "tokens": [" there", " there"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{" was": -9999.0, " there": -0.5}, {" there": -0.5}],
        "text_offset": [7, 13],
    }


@pytest.mark.parametrize(
    "chunk",
    [
        {"usage": {"prompt_tokens": 4, "completion_tokens": 2}},
        {"choices": None, "usage": {"prompt_tokens": 4, "completion_tokens": 2, "total": 6}},
    ],
)
def test_usage_needs_no_choices(chunk: dict[str, Any]) -> None:
    parsed = parse_chunk(json.dumps(chunk).encode())
    assert parsed.choices == []
    assert parsed.usage
    assert (parsed.usage.prompt_tokens, parsed.usage.completion_tokens) == (4, 2)


@pytest.mark.parametrize(
    ("details", "num_cached_tokens"),
    [({"cached_tokens": 3}, 3), ({}, None), ("none", None), ({"cached_tokens": -1}, None)],
)
def test_strange_details_of_usage_are_left_out(details: Any, num_cached_tokens: int | None) -> None:
    usage = {"prompt_tokens": 4, "prompt_tokens_details": details}
    parsed = parse_chunk(json.dumps({"usage": usage}).encode()).usage
    assert parsed
    assert parsed.prompt_tokens == 4
    told = parsed.prompt_tokens_details
    assert (told.cached_tokens if told else None) == num_cached_tokens


@pytest.mark.parametrize("usage", [{}, {"prompt_tokens": -1}, {"prompt_tokens": None}, "4", [4]])
def test_strange_usage_is_left_out(usage: Any) -> None:
    chunk = parse_chunk(json.dumps({"choices": [{"text": " there"}], "usage": usage}).encode())
    assert (chunk.usage, chunk.choices[0].added) == (None, " there")


@pytest.mark.parametrize(
    "choice",
    [
        {"index": None, "text": " there", "delta": None},
        {"delta": {"role": "", "content": " there", "reasoning_content": "Hm"}},
        {"delta": {"role": "model", "content": [{"type": "text", "text": " there"}]}},
        {"delta": {"content": [{"type": "thinking"}, {"type": "text", "text": " there"}]}},
        {"message": {"role": "assistant", "content": " there"}},
    ],
)  # fmt: skip
def test_text_is_found_wherever_it_stands(choice: dict[str, Any]) -> None:
    """Mistral's models that think send their content in parts (BerriAI/litellm issue 16272)."""
    (parsed,) = parse_chunk(json.dumps({"choices": [choice]}).encode()).choices
    assert (parsed.index, parsed.added) == (0, " there")


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_line_ends_are_those_of_the_standard(end: bytes) -> None:
    """https://html.spec.whatwg.org/multipage/server-sent-events.html, 9.2.6: each of these ends a
    line, and a byte order mark may come first."""
    lines = [
        b"\xef\xbb\xbfdata: 1",
        b"",
        b": a comment",
        b"data:2",
        b"data:",
        b"event: x",
        b"data: 3",
    ]
    assert read(end.join(lines)) == [b"1", b"2", b"3"]


def test_answer_that_is_no_stream_is_one_event() -> None:
    kind = {"content-type": "application/json; charset=utf-8"}
    assert read(b'\xef\xbb\xbf{\n"choices": []\n}', **kind) == [b'{\n"choices": []\n}', DONE]
