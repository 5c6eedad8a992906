"""The `/v1` routes, through OpenAI's own client on a real uvicorn.

The model is the bundled one in float32, so that its log probabilities can be compared with
those of a direct forward pass; chat is tested on a tiny Llama with a template, built here.
"""

import asyncio
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import httpx
import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field
from transformers import AutoTokenizer

import main
from backends.local import LocalBackend
from backends.reader import Reader
from engine import Engine
from serving.chat_templates import PLAIN_TEMPLATE
from serving.content_filter import ContentFilter
from tests.support import (
    FOLDER,
    NAME,
    PROMPT,
    fail,
    ids,
    load,
    serve_in_thread,
    tiny_llama,
    token,
    tokenizer,
    wait_until,
)

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('system first') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]"
)


@pytest.fixture(scope="module")
def backends() -> Iterator[dict[str, LocalBackend]]:
    """Two models in float32: the bundled one, and a chat model."""
    chat_tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    chat_tokenizer.chat_template = TEMPLATE
    models = {NAME: (load(), tokenizer), "org/chat": (tiny_llama(), chat_tokenizer)}
    made = {
        name: LocalBackend(
            name,
            SimpleNamespace(model=model, tokenizer=tokenizer_),
            Engine(model, tokenizer_, text_filter=main.content_filter),
            content_filter=main.content_filter,
            request_timeout_seconds=60,
            reader=Reader(),
        )
        for name, (model, tokenizer_) in models.items()
    }
    yield made
    for each in made.values():
        each.stop()


@pytest.fixture(scope="module")
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    """The service with these two models; or another one, for which test_ray.py runs the tests
    marked `contract` again."""
    if elsewhere := os.environ.get("SERVICE_ADDRESS"):
        yield elsewhere
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main.registry, "backends", request.getfixturevalue("backends"))
        patch.setattr(main.app, "openapi_schema", None)  # it tells of the models
        with serve_in_thread(main.app) as address:
            yield address


@pytest.fixture
def engine(backends: dict[str, LocalBackend]) -> Engine:
    return backends[NAME].engine


@pytest.fixture
def client(address: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def reference() -> Any:
    return load().eval()


def complete(client: OpenAI, **params: Any) -> Any:
    defaults = {"model": NAME, "prompt": PROMPT, "max_tokens": 12, "seed": 1}
    return client.completions.create(**{**defaults, **params})


def chat(client: OpenAI, *contents: str, **params: Any) -> Any:
    messages = [{"role": "user", "content": content} for content in contents or ("Hello",)]
    defaults = {"model": "org/chat", "messages": messages, "max_tokens": 12, "seed": 1}
    return client.chat.completions.create(**{**defaults, **params})


# --- /v1/completions ----------------------------------------------------------------------------


@pytest.mark.contract
def test_completion_has_every_field(client: OpenAI) -> None:
    answer = complete(client, logit_bias={"0": -100})
    assert answer.id.startswith("cmpl-")
    assert (answer.object, answer.model) == ("text_completion", NAME)
    assert answer.system_fingerprint.startswith("fp_")
    assert abs(answer.created - time.time()) < 100
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert choice.text
    assert not choice.text.startswith(PROMPT)
    assert answer.usage.prompt_tokens == len(ids(PROMPT))
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == 12 + len(ids(PROMPT))
    assert complete(client).id != answer.id


@pytest.mark.contract
def test_completion_prompt_forms_agree(client: OpenAI) -> None:
    forms = [PROMPT, [PROMPT], ids(PROMPT), [ids(PROMPT)]]
    texts = {complete(client, prompt=prompt).choices[0].text for prompt in forms}
    assert len(texts) == 1


@pytest.mark.contract
def test_completion_several_prompts_answer_in_order(client: OpenAI) -> None:
    prompts = [PROMPT, "The old king", "A fox", "In the wood"]
    alone = [complete(client, prompt=prompt, n=2) for prompt in prompts]
    together = complete(client, prompt=prompts, n=2)
    assert [choice.index for choice in together.choices] == list(range(8))
    expected = [choice.text for answer in alone for choice in answer.choices]
    assert [choice.text for choice in together.choices] == expected
    assert together.usage.prompt_tokens == sum(len(ids(prompt)) for prompt in prompts)
    assert together.usage.completion_tokens == sum(a.usage.completion_tokens for a in alone)


@pytest.mark.contract
def test_completion_n_draws_different_texts(client: OpenAI) -> None:
    answer = complete(client, n=4, max_tokens=20)
    assert len({choice.text for choice in answer.choices}) == 4
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]


@pytest.mark.contract
def test_completion_stream_says_what_the_whole_answer_says(client: OpenAI) -> None:
    params = {"prompt": [PROMPT, "The old king"], "n": 2, "logprobs": 2, "max_tokens": 20}
    whole = complete(client, **params)
    texts, tokens, ends = {}, {}, {}
    *chunks, last = complete(client, **params, stream=True, stream_options={"include_usage": True})
    for chunk in chunks:
        (choice,) = chunk.choices
        texts[choice.index] = texts.get(choice.index, "") + choice.text
        tokens.setdefault(choice.index, []).extend(choice.logprobs.tokens)
        ends[choice.index] = choice.finish_reason
        assert (chunk.id, chunk.usage) == (chunks[0].id, None)
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert tokens == {choice.index: choice.logprobs.tokens for choice in whole.choices}
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert (last.choices, last.usage) == ([], whole.usage)


@pytest.mark.contract
def test_completion_stream_ends_with_done(address: str) -> None:
    body = {"prompt": PROMPT, "max_tokens": 5, "stream": True}
    answer = httpx.post(f"{address}/v1/completions", json=body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.text.endswith("\n\ndata: [DONE]\n\n")
    assert '"usage": null' in answer.text


@pytest.mark.contract
def test_completion_continuous_usage_counts_up(client: OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = complete(client, stream=True, stream_options=options)
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == counts[-2]


@pytest.mark.contract
@pytest.mark.parametrize("streams", [False, True])
def test_completion_echo(client: OpenAI, streams: bool) -> None:
    plain = complete(client).choices[0].text
    answer = complete(client, echo=True, stream=streams)
    chunks = answer if streams else [answer]
    assert "".join(chunk.choices[0].text for chunk in chunks) == PROMPT + plain


@pytest.mark.parametrize("prompt", [PROMPT, "Où est le café ? 🦊", [0, *ids("A fox")]])
def test_completion_scores_a_prompt_as_the_model_does(
    client: OpenAI, reference: Any, prompt: Any
) -> None:
    answer = complete(client, prompt=prompt, max_tokens=0, echo=True, logprobs=5)
    (choice,) = answer.choices
    token_ids = ids(prompt) if isinstance(prompt, str) else prompt
    with torch.inference_mode():
        logprobs = reference(torch.tensor([token_ids])).logits[0].log_softmax(-1)
    expected = [logprobs[i, id_].item() for i, id_ in enumerate(token_ids[1:])]
    scored = choice.logprobs
    assert scored.token_logprobs[0] is scored.top_logprobs[0] is None
    assert scored.token_logprobs[1:] == pytest.approx(expected, abs=1e-3)
    for i, top in enumerate(scored.top_logprobs[1:]):
        values = logprobs[i].topk(5).values.tolist()
        assert sorted(top.values(), reverse=True)[:5] == pytest.approx(values, abs=1e-3)
    assert choice.text == tokenizer.decode(token_ids)
    assert (choice.finish_reason, answer.usage.completion_tokens) == ("length", 0)
    assert len(scored.tokens) == len(scored.text_offset) == len(token_ids)


def test_completion_logprobs_of_generated_tokens(client: OpenAI, reference: Any) -> None:
    answer = complete(client, temperature=0, logprobs=3, max_tokens=20, echo=True)
    (choice,) = answer.choices
    written = choice.logprobs
    for i, each in enumerate(written.tokens[len(ids(PROMPT)) :], start=len(ids(PROMPT))):
        assert max(written.top_logprobs[i], key=written.top_logprobs[i].get) == each
    token_ids = ids(choice.text)
    with torch.inference_mode():
        logprobs = reference(torch.tensor([token_ids])).logits[0].log_softmax(-1)
    if choice.finish_reason == "length" and len(token_ids) == len(written.tokens):
        expected = [logprobs[i, id_].item() for i, id_ in enumerate(token_ids[1:])]
        assert written.token_logprobs[1:] == pytest.approx(expected, abs=1e-3)
    for start, each in zip(written.text_offset, written.tokens, strict=True):
        assert choice.text.startswith(each, start) or each.startswith(("bytes:", "<|"))


@pytest.mark.contract
def test_completion_token_that_is_no_character_is_written_in_bytes(client: OpenAI) -> None:
    answer = complete(client, prompt="🦊", max_tokens=0, echo=True, logprobs=0)
    tokens = answer.choices[0].logprobs.tokens
    raw = b"".join(
        bytes.fromhex(t.removeprefix("bytes:").replace("\\x", "")) if t[:6] == "bytes:"
        else t.encode()
        for t in tokens
    )  # fmt: skip
    assert raw.decode() == "🦊"
    assert len(tokens) > 1


@pytest.mark.contract
def test_completion_best_of_gives_the_likeliest(client: OpenAI) -> None:
    drawn = complete(client, n=6, logprobs=0, max_tokens=10).choices
    means = [sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in drawn]
    best = sorted(range(6), key=lambda i: -means[i])[:2]
    answer = complete(client, n=2, best_of=6, max_tokens=10)
    assert [choice.text for choice in answer.choices] == [drawn[i].text for i in best]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].logprobs is None
    assert answer.usage.completion_tokens > 20


@pytest.mark.contract
@pytest.mark.parametrize("stop", ["e", ["zzzz", "e", "a"]])
def test_completion_stop(client: OpenAI, stop: Any) -> None:
    whole = complete(client, max_tokens=30).choices[0]
    cut = complete(client, max_tokens=30, stop=stop).choices[0]
    marks = [stop] if isinstance(stop, str) else stop
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: min(whole.text.find(m) for m in marks if m in whole.text)]


@pytest.mark.contract
def test_completion_seed_reproduces(client: OpenAI) -> None:
    texts = [complete(client, seed=seed).choices[0].text for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.contract
def test_completion_logit_bias_and_penalties(client: OpenAI) -> None:
    (king,) = ids(" king")
    params = {"logit_bias": {str(king): 100}, "temperature": 0, "max_tokens": 3}
    assert complete(client, **params).choices[0].text == " king" * 3
    params |= {"logit_bias": {str(king): 100, str(ids(" fox")[0]): 100}, "max_tokens": 20}
    text = complete(client, **params, frequency_penalty=2).choices[0].text
    assert set(text.split()) == {"king", "fox"}


@pytest.mark.contract
def test_completion_extensions(client: OpenAI) -> None:
    extra = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.3, "ignore_eos": True}
    answer = complete(client, max_tokens=9, extra_body=extra, logit_bias={"0": 100})
    assert answer.usage.completion_tokens == 9
    ends = complete(client, max_tokens=9, logit_bias={"0": 100})
    assert (ends.choices[0].text, ends.choices[0].finish_reason) == ("", "stop")
    assert ends.usage.completion_tokens == 1
    late = complete(client, max_tokens=9, logit_bias={"0": 100}, extra_body={"min_tokens": 4})
    assert late.usage.completion_tokens == 5


@pytest.mark.contract
def test_completion_ignores_what_changes_nothing(client: OpenAI) -> None:
    extra = {
        "metadata": {"a": "b"},
        "store": True,
        "logit_bias": None,
        "suffix": None,
        "stop": None,
    }
    answer = complete(client, user="someone", extra_body=extra)
    assert answer.choices[0].text == complete(client).choices[0].text


@pytest.mark.contract
def test_completion_without_a_model_takes_the_default(address: str) -> None:
    answer = httpx.post(f"{address}/v1/completions", json={"prompt": "A"})
    assert (answer.status_code, answer.json()["model"]) == (200, NAME)


# --- As tolerant as the field -------------------------------------------------------------------

# What clients send with the settings that they come with, where a prompt and a model are added.
SILLY_TAVERN = {  # as it comes, to a server of no kind that it knows
    "max_new_tokens": 12, "max_tokens": 12, "logprobs": 10, "temperature": 0.7, "top_p": 0.5,
    "typical_p": 1, "typical": 1, "sampler_seed": -1, "min_p": 0, "repetition_penalty": 1.2,
    "frequency_penalty": 0, "presence_penalty": 0, "top_k": 40, "skew": 0, "min_tokens": 0,
    "add_bos_token": True, "smoothing_factor": 0, "smoothing_curve": 1, "dry_allowed_length": 2,
    "dry_multiplier": 0, "dry_base": 1.75, "dry_sequence_breakers": ["\n", ":", '"', "*"],
    "dry_penalty_last_n": 0, "max_tokens_second": 0, "truncation_length": 2048,
    "stopping_strings": ["\nUser:", "\nA:", "### Input", "### Response", "\n###"],
    "stop": ["\nUser:", "\nA:", "### Input", "### Response", "\n###"], "ban_eos_token": False,
    "skip_special_tokens": True, "top_a": 0, "tfs": 1, "mirostat_mode": 0, "mirostat_tau": 5,
    "mirostat_eta": 0.1, "custom_token_bans": "", "banned_strings": [], "api_type": "generic",
    "api_server": "http://127.0.0.1:8000/v1", "legacy_api": False, "xtc_threshold": 0.1,
    "xtc_probability": 0, "rep_pen": 1.2, "rep_pen_range": 0, "repetition_penalty_range": 0,
    "seed": -1, "guidance_scale": 1, "negative_prompt": "", "grammar_string": "",
    "repeat_penalty": 1.2, "tfs_z": 1, "repeat_last_n": 0, "n_predict": 12, "num_predict": 12,
    "num_ctx": 2048, "mirostat": 0, "ignore_eos": False, "n_probs": 10, "rep_pen_slope": 1,
    "nsigma": 0, "top_n_sigma": 0, "min_keep": 0, "adaptive_target": -0.01, "adaptive_decay": 0.9,
    "include_reasoning": True, "stream": False,
}  # fmt: skip
SILLY_TAVERN_OOBA = SILLY_TAVERN | {  # as it comes, to text-generation-webui
    "api_type": "ooba", "min_length": 0, "num_beams": 1, "length_penalty": 1, "do_sample": True,
    "early_stopping": False, "epsilon_cutoff": 0, "eta_cutoff": 0, "encoder_repetition_penalty": 1,
    "no_repeat_ngram_size": 0, "penalty_alpha": 0, "temperature_last": True,
    "sampler_priority": [
        "repetition_penalty", "presence_penalty", "frequency_penalty", "dry", "temperature",
        "dynamic_temperature", "quadratic_sampling", "top_n_sigma", "top_k", "top_p", "typical_p",
        "epsilon_cutoff", "eta_cutoff", "tfs", "top_a", "min_p", "adaptive_p", "mirostat", "xtc",
        "encoder_repetition_penalty", "no_repeat_ngram",
    ],
}  # fmt: skip
SILLY_TAVERN_KOBOLD = SILLY_TAVERN | {
    "api_type": "koboldcpp", "sampler_order": [6, 0, 1, 3, 4, 2, 5], "trim_stop": True,
}  # fmt: skip
LLAMA_CPP = {
    "samplers": ["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc",
                 "temperature", "adaptive_p"],
    "cache_prompt": True, "grammar": "", "adaptive_target": -1,
}  # fmt: skip
MIKUPAD = {
    "temperature": 0.7, "repetition_penalty": 1.1, "repetition_penalty_range": 256,
    "penalize_nl": False, "ban_eos_token": False, "presence_penalty": 0, "frequency_penalty": 0,
    "top_p": 0.95, "top_k": 40, "min_p": 0, "max_tokens": 1024, "logprobs": 10, "stream": True,
}  # fmt: skip
VLLM = {
    "use_beam_search": False, "length_penalty": 1.0, "stop_token_ids": [], "bad_words": [],
    "include_stop_str_in_output": False, "skip_special_tokens": True, "priority": 0,
    "spaces_between_special_tokens": True, "truncate_prompt_tokens": None, "request_id": "a",
    "prompt_logprobs": None, "response_format": {"type": "text"}, "logits_processors": None,
    "return_token_ids": None, "cache_salt": "b", "kv_transfer_params": None, "seed": None,
}  # fmt: skip
CHAT_FRONT_ENDS = {
    "tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "reasoning_effort": "low",
    "chat_template_kwargs": {}, "add_generation_prompt": True, "chat_id": "c", "id": "d",
    "session_id": "e", "metadata": {"task": "title"}, "features": {"web_search": False},
    "files": [], "variables": {"{{USER_NAME}}": "A"}, "background_tasks": {}, "user": {"id": 1},
    "max_tokens": -1, "echo": False, "best_of": None,
}  # fmt: skip


@pytest.mark.contract
@pytest.mark.parametrize(
    "fields",
    [SILLY_TAVERN, SILLY_TAVERN_OOBA, SILLY_TAVERN_KOBOLD, LLAMA_CPP, MIKUPAD, VLLM,
     {"user": {"id": 1}}],
)  # fmt: skip
def test_completion_takes_what_changes_nothing(address: str, fields: dict[str, Any]) -> None:
    """Half of the writing front ends were refused over such fields."""
    body = {"model": "", "prompt": PROMPT, **fields}
    answer = httpx.post(f"{address}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert '"finish_reason":' in answer.text


@pytest.mark.contract
@pytest.mark.parametrize(
    ("order", "is_last"),
    [
        ({"temperature_last": True}, True),
        ({"temperature_last": False}, False),
        ({"sampler_order": [6, 0, 1, 3, 4, 2, 5]}, True),
        ({"sampler_order": [6, 5, 0, 1, 3, 4, 2]}, False),
        ({"samplers": LLAMA_CPP["samplers"]}, True),
        ({"sampler_priority": SILLY_TAVERN_OOBA["sampler_priority"]}, False),
        ({"sampler_order": []}, False),
    ],
)
def test_order_of_samplers_says_when_temperature_is_applied(
    client: OpenAI, order: dict[str, Any], is_last: bool
) -> None:
    """Every front end that sent an order was refused, though two of them can be kept. Here the
    likeliest token alone has a tenth of what is likely at temperature 1, but not at 2."""
    texts = {
        complete(client, temperature=2, top_p=0.1, seed=seed, max_tokens=1, extra_body=order)
        .choices[0]
        .text
        for seed in range(5)
    }
    assert (len(texts) == 1) == is_last


@pytest.mark.contract
@pytest.mark.parametrize("order", [[6, 5, 4, 3, 2, 1, 0], [5, 0], ["top_k"], "kfypmt", 7, [{}]])
def test_order_of_samplers_that_cannot_be_kept_is_refused(address: str, order: Any) -> None:
    body = {"prompt": "A", "sampler_order": order}
    answer = httpx.post(f"{address}/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "sampler_order")


@pytest.mark.contract
def test_refusal_names_always_the_same_field(address: str) -> None:
    """It named whichever came first in a set, another one in each process."""
    fields: dict[str, Any] = {"audio": {}, "suffix": "a", "grammar": "b", "tools": [{}]}
    for order in (fields, dict(reversed(fields.items()))):
        answer = httpx.post(f"{address}/v1/completions", json={"prompt": "A", **order})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "suffix"
        assert answer.json()["error"]["message"] == 'suffix: not supported but as ""'
    for order in ({"other": 1, "nobody": 2}, {"nobody": 2, "other": 1}):
        answer = httpx.post(f"{address}/v1/completions", json={"prompt": "A", **order})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "nobody")


@pytest.mark.contract
@pytest.mark.parametrize("fields", [{"max_tokens": -1}, {"max_tokens": 100_000}])
def test_completion_generates_until_the_context_is_full(
    client: OpenAI, fields: dict[str, Any]
) -> None:
    """More than fits was refused: clients had to know how many tokens their prompt has."""
    answer = complete(client, prompt=[1] * 500, **fields, extra_body={"ignore_eos": True})
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (500, 12)


@pytest.mark.contract
@pytest.mark.parametrize("logprobs", [None, 2])
def test_completion_of_no_tokens_is_empty_and_says_so(client: OpenAI, logprobs: int | None) -> None:
    answer = complete(client, max_tokens=0, logprobs=logprobs)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == ("", "length")
    assert answer.usage.completion_tokens == 0
    assert choice.logprobs is None or choice.logprobs.tokens == []


@pytest.mark.contract
@pytest.mark.parametrize("body", [{}, {"prompt": None}, {"prompt": ""}, {"prompt": ["", ""]}])
def test_completion_without_a_prompt_begins_a_text(address: str, body: dict[str, Any]) -> None:
    """As OpenAI's and the pipeline's does: after the end-of-text token."""
    params = {"max_tokens": 8, "seed": 1}
    expected = httpx.post(f"{address}/v1/completions", json={"prompt": [0], **params}).json()
    answer = httpx.post(f"{address}/v1/completions", json=body | params).json()
    assert answer["choices"][0]["text"] == expected["choices"][0]["text"]
    assert answer["usage"]["prompt_tokens"] == len(answer["choices"])


@pytest.mark.contract
def test_completion_ranges_of_other_servers(client: OpenAI) -> None:
    greedy = complete(client, temperature=0).choices[0].text
    assert complete(client, top_p=0).choices[0].text == greedy
    plain = complete(client).choices[0].text
    assert complete(client, extra_body={"top_k": -1}).choices[0].text == plain
    drawn = {complete(client, seed=-1, max_tokens=20).choices[0].text for _ in range(3)}
    assert len(drawn) == 3
    logprobs = complete(client, logprobs=20).choices[0].logprobs
    assert all(len(top) >= 20 for top in logprobs.top_logprobs)


@pytest.mark.contract
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("includes", [False, True])
@pytest.mark.parametrize(
    ("fields", "end", "reason"),
    [
        ({"stop_token_ids": [5, token(" king")], "logit_bias": {str(token(" king")): 100}},
         " king", token(" king")),
        ({"stop": [" k", "x"], "logit_bias": {str(token(" king")): 100}}, " k", " k"),
        ({"stop": ["<|endoftext|>"], "logit_bias": {"0": 100}, "ignore_eos": True},
         "<|endoftext|>", "<|endoftext|>"),
        ({"logit_bias": {"0": 100}}, "", None),
    ],
)  # fmt: skip
def test_stop_reason_tells_what_ended_the_text(
    client: OpenAI, fields: dict[str, Any], end: str, reason: int | str | None,
    includes: bool, streams: bool,
) -> None:  # fmt: skip
    """A special token is left out of the text, so as a stop string it never came."""
    extra = {**fields, "include_stop_str_in_output": includes}
    answer = complete(client, extra_body=extra, stream=streams)
    choices = [chunk.choices[0] for chunk in answer] if streams else answer.choices
    assert "".join(choice.text for choice in choices) == (end if includes else "")
    assert (choices[-1].finish_reason, choices[-1].stop_reason) == ("stop", reason)
    assert all(choice.stop_reason is None for choice in choices[:-1])


@pytest.mark.contract
def test_stop_token_waits_for_min_tokens(client: OpenAI) -> None:
    king = token(" king")
    extra = {"stop_token_ids": [king], "min_tokens": 3, "logit_bias": {str(king): 100}}
    answer = complete(client, extra_body=extra)
    assert answer.usage.completion_tokens == 4
    assert answer.choices[0].stop_reason == king


# --- Errors -------------------------------------------------------------------------------------

INVALID: list[tuple[dict[str, Any], str | None]] = [
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": ["a", [1]]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [8192]}, "prompt"),
    ({"prompt": "a\0"}, "prompt"),
    ({"prompt": ["a"] * 321}, "prompt"),
    ({"max_tokens": -2}, "max_tokens"),
    ({"max_tokens": "3"}, "max_tokens"),
    ({"temperature": 2.1}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"n": 2, "best_of": 1}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"logprobs": 21}, "logprobs"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop_token_ids": [8192]}, "stop_token_ids"),
    ({"stop_token_ids": [1] * 129}, "stop_token_ids"),
    ({"seed": 2**64}, "seed"),
    ({"skip_special_tokens": False}, "skip_special_tokens"),
    ({"n_predict": 5, "max_tokens": 6}, "n_predict"),
    ({"do_sample": False}, "do_sample"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"logit_bias": {"8192": 1}}, "logit_bias"),
    ({"logit_bias": {"king": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"suffix": "end"}, "suffix"),
    ({"stream_options": {"unknown": 1}}, "stream_options"),
    ({"unknown": 1}, "unknown"),
    ({"top_k": 8193}, "top_k"),
    ({"min_tokens": 13}, "min_tokens"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
]


@pytest.mark.contract
@pytest.mark.parametrize(("params", "param"), INVALID)
def test_error_invalid_names_the_field(
    client: OpenAI, params: dict[str, Any], param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, extra_body=params)
    error = caught.value
    assert (error.status_code, error.type, error.param) == (400, "invalid_request_error", param)
    assert param in error.message


@pytest.mark.contract
@pytest.mark.parametrize("content", ["", "[]", "{", "nothing", '{"prompt": "\\ud800"}'])
def test_error_body_that_is_no_request(address: str, content: str) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{address}/v1/completions", content=content, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.contract
def test_error_context_length_tells_both_numbers(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, prompt=[1] * 512, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    assert "is 512 tokens, and your prompt has 512" in caught.value.message
    assert complete(client, prompt=[1] * 510, max_tokens=2).usage.prompt_tokens == 510
    scored = complete(client, prompt=[1] * 512, max_tokens=0, echo=True, logprobs=0)
    assert len(scored.choices[0].logprobs.tokens) == 512


@pytest.mark.contract
@pytest.mark.parametrize(
    "prompt", ["I hate it", ["Fine", "I h.a.t.e it"], ids("hateful people"), [ids("violence")]]
)
@pytest.mark.parametrize("streams", [False, True])
def test_error_forbidden_prompt_in_every_form(client: OpenAI, prompt: Any, streams: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, prompt=prompt, stream=streams)
    assert (caught.value.code, caught.value.param) == ("content_filter", "prompt")


@pytest.mark.contract
def test_error_word_split_by_a_special_token(client: OpenAI) -> None:
    """The model reads past a special token; so does the filter."""
    for prompt in ("I ha<|endoftext|>te you", [*ids("I ha"), 0, *ids("te you")]):
        with pytest.raises(openai.BadRequestError) as caught:
            complete(client, prompt=prompt)
        assert caught.value.code == "content_filter"


@pytest.mark.contract
def test_error_megabyte_is_refused_unread(client: OpenAI) -> None:
    started_seconds = time.monotonic()
    with pytest.raises(openai.BadRequestError, match="maximum context length") as caught:
        complete(client, prompt="h.a.t." * 160_000)
    assert caught.value.code == "context_length_exceeded"
    assert time.monotonic() - started_seconds < 1


@pytest.mark.contract
@pytest.mark.parametrize("streams", [False, True])
def test_logprobs_of_a_stop_string_are_all_there(client: OpenAI, streams: bool) -> None:
    """Its own were left out, so there were fewer than `usage` counts."""
    always = {str(ids(" king")[0]): 100}
    answer = complete(client, logit_bias=always, logprobs=0, stop="g k", stream=streams)
    choices = [chunk.choices[0] for chunk in (answer if streams else [answer])]
    text = "".join(choice.text for choice in choices)
    tokens = [token for choice in choices for token in choice.logprobs.tokens]
    offsets = [offset for choice in choices for offset in choice.logprobs.text_offset]
    assert (text, tokens, offsets) == (" kin", [" king", " king"], [0, 4])
    assert choices[-1].finish_reason == "stop"


def test_logprobs_hold_no_forbidden_word(client: OpenAI) -> None:
    """A stop string cut the word off before the filter saw it; the logprobs had it all."""
    pieces = {str(token): 40 for word in (" hate", "hate") for token in ids(word)}
    for stop in ("ha", " h", "ate"):
        answer = complete(client, prompt="I", logit_bias=pieces, stop=stop, logprobs=5)
        written = json.dumps(answer.choices[0].model_dump())
        assert "hate" not in written
        tokens = answer.choices[0].logprobs.tokens
        assert main.content_filter.find("".join(tokens)) is None


def test_output_filter_ends_with_content_filter(
    client: OpenAI, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ",".join(f"{letter}*" for letter in "abcdefghijklmnopqrstuvwxyz")
    monkeypatch.setattr(engine.output, "text_filter", ContentFilter(words))
    answer = complete(client, max_tokens=200, extra_body={"ignore_eos": True})
    assert answer.choices[0].finish_reason == "content_filter"


@pytest.mark.contract
def test_error_unknown_model_is_404(client: OpenAI) -> None:
    calls = (
        lambda: complete(client, model="nobody"),
        lambda: chat(client, model="nobody"),
        lambda: client.models.retrieve("nobody"),
    )
    for call in calls:
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        assert "nobody" not in caught.value.message


@pytest.mark.contract
def test_error_unknown_route_and_method(address: str) -> None:
    for method, path, status in (("GET", "nothing", 404), ("GET", "completions", 405)):
        answer = httpx.request(method, f"{address}/v1/{path}")
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.contract
def test_error_body_too_large(address: str) -> None:
    answer = httpx.post(f"{address}/v1/completions", json={"prompt": "a" * 1_000_001})
    assert answer.status_code == 413
    assert "1000000 bytes" in answer.json()["error"]["message"]


def test_error_failing_model(
    client: OpenAI, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.model, "forward", fail)
    with pytest.raises(openai.InternalServerError) as caught:
        complete(client)
    assert caught.value.type == "server_error"
    assert "Model inference failed" in caught.value.message
    with pytest.raises(openai.APIError, match="Model inference failed"):
        list(complete(client, stream=True))
    monkeypatch.undo()
    assert complete(client).choices[0].text


def test_error_overload_is_503_with_retry_after(
    client: OpenAI, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.scheduler, "max_queue_size", 1)
    monkeypatch.setattr(engine.scheduler, "max_num_seqs", 1)
    long = {"max_tokens": 400, "stream": True, "extra_body": {"ignore_eos": True}}
    with complete(client, n=2, **long) as answer:
        next(iter(answer))
        with pytest.raises(openai.InternalServerError) as caught:
            complete(client, prompt="A")
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "1"
    wait_until(lambda: engine.num_running + engine.num_waiting == 0)
    assert complete(client, prompt="A").choices[0].text


def test_error_more_sequences_than_ever_find_room_is_400(client: OpenAI, engine: Engine) -> None:
    """256 prompts with n 8 were taken: 2,048 sequences, before which everybody else waited."""
    most = engine.scheduler.max_num_seqs + engine.scheduler.max_queue_size
    with pytest.raises(openai.BadRequestError, match=f"prompt: at most {most} texts") as caught:
        complete(client, prompt=["A"] * 256, n=8)
    assert caught.value.param == "prompt"


def test_stream_closed_early_frees_its_places(client: OpenAI, engine: Engine) -> None:
    answer = complete(client, n=4, max_tokens=400, stream=True, extra_body={"ignore_eos": True})
    next(iter(answer))
    assert engine.num_running == 4
    answer.close()
    wait_until(lambda: engine.num_running == 0)
    assert engine.num_waiting == 0


def test_stream_is_pinged(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.streams.PING_SECONDS", 0.001)
    body = {"prompt": PROMPT, "max_tokens": 100, "stream": True}
    answer = httpx.post(f"{address}/v1/completions", json=body)
    assert "\n\n: ping\n\n" in answer.text
    with OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        assert "".join(c.choices[0].text for c in complete(client, stream=True))


def test_async_client_many_at_once(address: str) -> None:
    async def ask() -> list[str]:
        async with AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:

            async def one(seed: int) -> str:
                params = {"model": NAME, "prompt": PROMPT, "max_tokens": 15, "seed": seed // 2}
                if seed % 2:
                    return (await client.completions.create(**params)).choices[0].text
                chunks = await client.completions.create(**params, stream=True)
                return "".join([chunk.choices[0].text async for chunk in chunks])

            return await asyncio.gather(*map(one, range(20)))

    texts = asyncio.run(ask())
    assert texts[::2] == texts[1::2]
    assert len(set(texts)) == 10


# --- /v1/chat/completions -----------------------------------------------------------------------


def test_chat_has_every_field(client: OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=2, n=2)
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", "org/chat")
    assert [choice.index for choice in answer.choices] == [0, 1]
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.finish_reason in ("stop", "length")
    content = choice.logprobs.content
    assert all(len(token.top_logprobs) == 2 for token in content)
    assert (
        bytes(b for t in content for b in t.bytes)
        .decode(errors="replace")
        .startswith(choice.message.content.rstrip("�")[:3])
    )
    assert answer.usage.prompt_tokens == len(ids("[user]Hello\n[assistant]"))


def test_chat_is_the_completion_of_the_template(client: OpenAI) -> None:
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}],
        },
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Again"},
    ]
    text = "[system]Be brief.\n[user]Hello\n[assistant]Hi.\n[user]Again\n[assistant]"
    expected = complete(client, model="org/chat", prompt=text).choices[0].text
    assert chat(client, messages=messages).choices[0].message.content == expected


def test_chat_stream_says_what_the_whole_answer_says(client: OpenAI) -> None:
    whole = chat(client, max_completion_tokens=30).choices[0]
    chunks = list(chat(client, max_completion_tokens=30, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert (text, chunks[-1].choices[0].finish_reason) == (
        whole.message.content,
        whole.finish_reason,
    )
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


@pytest.mark.parametrize("streams", [False, True])
def test_chat_of_a_base_model_is_one_turn_of_a_play(
    client: OpenAI,
    backends: dict[str, LocalBackend],
    streams: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = backends[NAME]
    for name in ("is_base_model", "turn_ends"):
        monkeypatch.setattr(backend, name, getattr(backend, name))
    monkeypatch.setattr(backend.tokenizer, "chat_template", None)
    backend.set_chat_template(PLAIN_TEMPLATE)
    # Each call of the head is a token of the play, not one that was guessed too.
    monkeypatch.setattr(backend.engine.drafter, "draft", lambda *_: [])
    head = backend.engine.model.lm_head
    forward, said = head.forward, iter(ids("\n Yes, said the fox.\nUser: And then?"))

    def say(hidden: Any) -> Any:
        logits = forward(hidden)
        logits[..., next(said)] = 1e4
        return logits

    monkeypatch.setattr(head, "forward", say)
    answer = chat(client, "Is it so?", model=NAME, max_tokens=20, stream=streams)
    if streams:
        *_, last = choices = [choice for chunk in answer for choice in chunk.choices]
        content = "".join(choice.delta.content for choice in choices)
    else:
        (last,) = answer.choices
        content = last.message.content
        assert answer.usage.prompt_tokens == len(ids("User: Is it so?\nAssistant:"))
    assert content == "Yes, said the fox."
    assert (last.finish_reason, last.stop_reason) == ("stop", "\nUser:")


def test_chat_takes_its_own_answer_back(client: OpenAI) -> None:
    """The client sends an answer back with the null fields that it came with."""
    first = {"role": "user", "content": "Hello"}
    said = chat(client).choices[0].message
    messages: Any = [first, said, {"role": "user", "content": "Again"}]
    assert chat(client, messages=messages).choices[0].finish_reason


def test_chat_without_a_limit_fills_the_context(client: OpenAI) -> None:
    answer = chat(client, max_tokens=None, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == 256
    assert answer.choices[0].finish_reason == "length"


def test_chat_takes_what_changes_nothing(client: OpenAI) -> None:
    messages: Any = [
        {"role": "user", "content": "Hello", "metadata": {}, "timestamp": 1},
        {"role": "assistant", "content": None, "annotations": [], "tool_calls": []},
        {"role": "assistant", "reasoning_content": "Well."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "A", "cache_control": {"type": "b"}}],
        },
    ]
    extra = CHAT_FRONT_ENDS | {"messages": messages, "ignore_eos": True, "stop_token_ids": [5]}
    answer = chat(client, max_tokens=None, extra_body=extra | {"logit_bias": {"5": -100}})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == 256
    assert answer.choices[0].stop_reason is None


def test_chat_refusal_names_the_field_of_a_message(client: OpenAI) -> None:
    message = {"role": "assistant", "content": "A", "tool_calls": [{}]}
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, extra_body={"messages": [message]})
    assert caught.value.param == "messages"
    assert "messages.0.tool_calls: not supported but as []" in caught.value.message


def test_chat_without_a_template_is_a_clear_400(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="/v1/completions"):
        chat(client, model=NAME)


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": r, "content": "a"} for r in ("user", "system")]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_object", "json_schema": {}}}, "response_format"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "response_format",
        ),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"choice": ["a"], "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"structured_outputs": {"choice": ["a"] * 1025}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a" * 4097}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs"),
        ({"structured_outputs": {"json": 1}}, "structured_outputs"),
        ({"guided_choice": ["a"]}, "guided_choice"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ],
)
def test_chat_invalid_names_the_field(client: OpenAI, params: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, extra_body=params)
    assert caught.value.param == param


def test_chat_forbidden_message(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, "Hello", "I hate it")
    assert caught.value.code == "content_filter"


# --- Structured output --------------------------------------------------------------------------


class Home(BaseModel):
    town: Annotated[str, Field(max_length=4)]
    is_big: bool


class Person(BaseModel):
    age: Annotated[int, Field(ge=0, le=150)]
    traits: Annotated[list[Literal["old", "wise"]], Field(min_length=1, max_length=3)]
    home: Home


ASKED = [
    ({"choice": ["sad", "happy", "neither happy nor sad"]}, "sad|happy|neither happy nor sad"),
    ({"regex": "[A-Z][a-z]{1,9}, [0-9]{4}"}, "[A-Z][a-z]{1,9}, [0-9]{4}"),
    ({"grammar": 'root ::= ("yes" | "no") "!"'}, "(yes|no)!"),
]


@pytest.mark.parametrize(("asked", "pattern"), ASKED)
def test_structured_texts_are_as_asked_for(client: OpenAI, asked: Any, pattern: str) -> None:
    """Streamed or not, alone or with others."""
    params = {"n": 8, "max_tokens": 60, "extra_body": {"structured_outputs": asked}}
    texts = [choice.text for choice in complete(client, **params).choices]
    assert all(re.fullmatch(pattern, text) for text in texts)
    streamed = dict.fromkeys(range(8), "")
    for chunk in complete(client, stream=True, **params):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert list(streamed.values()) == texts
    (alone,) = complete(client, **params | {"n": 1}).choices
    assert (alone.text, alone.finish_reason) == (texts[0], "stop")


def test_structured_chat_is_parsed_by_openais_client(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Who?"}]
    for seed in range(4):
        answer = client.chat.completions.parse(
            model="org/chat", messages=messages, seed=seed, response_format=Person
        )
        (choice,) = answer.choices
        assert isinstance(choice.message.parsed, Person)
        assert choice.finish_reason == "stop"


def test_structured_json_that_is_cut_says_length(client: OpenAI) -> None:
    (choice,) = chat(client, response_format={"type": "json_object"}, max_tokens=3).choices
    assert choice.finish_reason == "length"
    assert choice.message.content.startswith("{")
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model="org/chat",
            messages=[{"role": "user", "content": "Who?"}],
            response_format=Person,
            max_tokens=3,
        )


def test_structured_text_with_a_forbidden_word_is_filtered(client: OpenAI) -> None:
    asked = {"structured_outputs": {"choice": [" we hate it"]}}
    (choice,) = complete(client, extra_body=asked).choices
    assert (choice.text, choice.finish_reason) == (" we", "content_filter")


@pytest.mark.parametrize("streams", [False, True])
def test_structure_that_becomes_too_complex_is_the_clients_error(
    client: OpenAI, streams: bool
) -> None:
    grammar = 'start: x\nx: x x | "a" | "b" | x x x | ""'
    asked = {"structured_outputs": {"grammar": grammar}, "ignore_eos": True}
    with pytest.raises(openai.APIError, match="too complex") as caught:
        list(complete(client, stream=streams, max_tokens=200, extra_body=asked))
    if not streams:
        assert isinstance(caught.value, openai.BadRequestError)
        assert caught.value.param == "structured_outputs"


# --- /v1/models ---------------------------------------------------------------------------------


def test_models_are_listed_and_retrieved(client: OpenAI) -> None:
    listed = list(client.models.list())
    assert [model.id for model in listed] == [NAME, "org/chat"]
    assert [model.owned_by for model in listed] == ["local", "org"]
    for model in listed:
        assert client.models.retrieve(model.id) == model
        assert model.object == "model"
        assert math.isclose(model.created, time.time(), abs_tol=1e5)


def test_models_have_further_names(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those given in MODEL_NAME are listed; what a folder is called is only understood."""
    monkeypatch.setattr(main.registry, "aliases", {"story": NAME})
    monkeypatch.setattr(main.registry, "own_names", {"folder": "org/chat"})
    listed = httpx.get(f"{address}/v1/models").json()["data"]
    assert [each["id"] for each in listed] == [NAME, "org/chat", "story"]
    for name in ("story", "folder"):
        assert httpx.get(f"{address}/v1/models/{name}").json()["id"] == name
        body = {"model": name, "prompt": PROMPT, "max_tokens": 1}
        answer = httpx.post(f"{address}/v1/completions", json=body)
        assert answer.status_code == 200
        assert answer.json()["model"] == {"story": NAME, "folder": "org/chat"}[name]


def test_models_with_a_slash_in_the_path(address: str) -> None:
    for path in ("org/chat", "org%2Fchat"):
        answer = httpx.get(f"{address}/v1/models/{path}")
        assert (answer.status_code, answer.json()["id"]) == (200, "org/chat")


def test_openapi_describes_streams_and_errors() -> None:
    paths = main.app.openapi()["paths"]
    for path in ("/v1/completions", "/v1/chat/completions"):
        responses = paths[path]["post"]["responses"]
        assert "422" not in responses
        assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
        for status in ("400", "404", "413", "500", "503", "504"):
            schema = responses[status]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/OpenAIError"}
        example = responses["200"]["content"]["text/event-stream"]["example"]
        assert json.loads(example.split("\n\n")[0].removeprefix("data: "))["choices"]


# --- An evaluation harness ----------------------------------------------------------------------

ROLLING_TASK = """
task: tales
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
CHOICE_TASK = """
task: endings
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "Once upon a time there was a"
doc_to_choice: [" king", " the the of"]
doc_to_target: 0
metric_list: [{metric: acc}]
"""
TALES = [
    "Once upon a time there lived a king who had three sons. ",
    "The fox said to the wolf: come with me, and I will show you the way. ",
    "In the middle of the wood stood a little house, and in it lived an old woman. ",
]


def test_lm_eval_measures_what_the_model_itself_gives(
    address: str, reference: Any, tmp_path: Path
) -> None:
    """lm-eval's `local-completions` has texts tokenized here and scores the ids with `echo`;
    nothing is mocked."""
    file = tmp_path / "tales.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TALES))
    for name, task in (("tales", ROLLING_TASK), ("endings", CHOICE_TASK)):
        (tmp_path / f"{name}.yaml").write_text(task.replace("FILE", str(file)))
    model_args = (
        f"model={NAME},base_url={address}/v1/completions,tokenizer_backend=remote,"
        "max_length=512,num_concurrent=2"
    )
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", "local-completions",
        "--model_args", model_args, "--tasks", "tales,endings", "--include_path", str(tmp_path),
        "--output_path", str(tmp_path / "out"), "--batch_size", "2",
    ]  # fmt: skip
    offline = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(written.read_text())["results"]
    nats = 0.0
    for text in TALES:  # scored after the end-of-text token, as lm-eval does
        token_ids = [0, *ids(text)]
        with torch.inference_mode():
            logprobs = reference(torch.tensor([token_ids])).logits[0].log_softmax(-1)
        nats -= sum(logprobs[i, token].item() for i, token in enumerate(token_ids[1:]))
    bits_per_byte = nats / math.log(2) / sum(len(text.encode()) for text in TALES)
    assert results["tales"]["bits_per_byte,none"] == pytest.approx(bits_per_byte, abs=1e-3)
    assert results["endings"]["acc,none"] == 1.0


# --- Tokens -------------------------------------------------------------------------------------


@pytest.mark.contract
@pytest.mark.parametrize("streams", [False, True])
def test_completion_tells_token_ids(client: OpenAI, streams: bool) -> None:
    params = {"prompt": [PROMPT, "A fox"], "n": 2, "extra_body": {"return_token_ids": True}}
    answer = complete(client, **params, stream=streams)
    texts, token_ids, prompts = ["", "", "", ""], [[], [], [], []], [[], [], [], []]
    for choice in [c for chunk in answer for c in chunk.choices] if streams else answer.choices:
        texts[choice.index] += choice.text
        token_ids[choice.index] += choice.token_ids
        prompts[choice.index] += getattr(choice, "prompt_token_ids", [])
    assert [tokenizer.decode(each) for each in token_ids] == texts
    assert prompts == [ids(PROMPT), ids(PROMPT), ids("A fox"), ids("A fox")]


@pytest.mark.contract
def test_completion_token_ids_are_those_that_usage_counts(client: OpenAI) -> None:
    """Those of a stop string, which the text leaves out, are among them."""
    extra = {"return_token_ids": True}
    answer = complete(client, max_tokens=30, stop=["e"], extra_body=extra)
    assert len(answer.choices[0].token_ids) == answer.usage.completion_tokens
    assert "e" in tokenizer.decode(answer.choices[0].token_ids)


def test_completion_prompt_logprobs_are_the_models_own(client: OpenAI, reference: Any) -> None:
    extra = {"prompt_logprobs": 2}
    answer = complete(client, max_tokens=0, extra_body=extra)
    first, *rest = answer.choices[0].prompt_logprobs
    assert (first, answer.choices[0].text) == (None, "")
    with torch.inference_mode():
        logprobs = reference(torch.tensor([ids(PROMPT)])).logits[0].log_softmax(-1)
    assert len(rest) == len(ids(PROMPT)) - 1
    for row, token_id, told in zip(logprobs, ids(PROMPT)[1:], rest, strict=False):
        own = told[str(token_id)]
        assert own["logprob"] == pytest.approx(row[token_id].item(), abs=1e-3)
        assert own["rank"] == 1 + (row > row[token_id]).sum().item()
        assert own["decoded_token"] == tokenizer.decode([token_id])
        ranks = {each["rank"]: int(id_) for id_, each in told.items()}
        assert [ranks[1], ranks[2]] == row.topk(2).indices.tolist()
        assert set(told) == {str(id_) for id_ in (token_id, ranks[1], ranks[2])}


def test_completion_echo_and_prompt_logprobs_each_have_their_number(client: OpenAI) -> None:
    extra = {"prompt_logprobs": 5}
    choice = complete(client, max_tokens=1, echo=True, logprobs=1, extra_body=extra).choices[0]
    assert {len(top) for top in choice.logprobs.top_logprobs[1:]} <= {1, 2}
    assert {len(top) for top in choice.prompt_logprobs[1:]} <= {5, 6}
    plain = complete(client, max_tokens=1, echo=True, logprobs=1).choices[0]
    assert choice.logprobs == plain.logprobs


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [[5] * 200] * 120, "prompt_logprobs": 20}, "prompt_logprobs"),
        ({"prompt": [[5] * 200] * 15, "n": 8, "prompt_logprobs": 20}, "prompt_logprobs"),
        ({"prompt": [[5] * 200] * 120, "echo": True, "logprobs": 20}, "logprobs"),
    ],
)
def test_error_more_logprobs_of_prompts_than_an_answer_may_hold(
    client: OpenAI, fields: dict[str, Any], param: str
) -> None:
    """A body of 600 KB had an answer of 217 MB, for which the process grew by 1.9 GiB."""
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, max_tokens=1, **{"prompt": PROMPT}, extra_body=fields)
    assert error.value.param == param
    assert "at most 500000 of all prompts" in error.value.message


@pytest.mark.parametrize("streams", [False, True])
def test_chat_tells_token_ids_of_the_prompt_once(client: OpenAI, streams: bool) -> None:
    extra = {"return_token_ids": True} | ({} if streams else {"prompt_logprobs": 0})
    answer = chat(client, "Hi", n=2, extra_body=extra, stream=streams)
    chunks = list(answer) if streams else [answer]
    told = [chunk.prompt_token_ids for chunk in chunks if hasattr(chunk, "prompt_token_ids")]
    assert told == [ids("[user]Hi\n[assistant]")]
    counts = [0, 0]
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        counts[choice.index] += len(getattr(choice, "token_ids", []))
    assert counts == [12, 12]
    if not streams:
        assert [len(top or {}) for top in answer.prompt_logprobs] == [0] + [1] * (len(told[0]) - 1)


@pytest.mark.parametrize("more", [{}, {"echo": True}])
def test_completion_logprobs_of_what_cannot_be_said(
    address: str, engine: Engine, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A logit of minus infinity made an answer that JSON has no number for: 500."""
    head = engine.model.lm_head
    forward, said = head.forward, ids(" the")

    def say_one(hidden: Any) -> Any:
        logits = forward(hidden)
        kept = logits[..., said].clone()
        logits.fill_(float("-inf"))[..., said] = kept
        return logits

    monkeypatch.setattr(head, "forward", say_one)
    body = {"prompt": "Once upon", "max_tokens": 2, "logprobs": 2, **more}
    response = httpx.post(f"{address}/v1/completions", json=body)
    assert response.status_code == 200
    logprobs = response.json()["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"][-2:] == [0.0, 0.0]
    assert sorted(logprobs["top_logprobs"][-1].values()) == [-9999.0, 0.0]
    assert more == {} or logprobs["token_logprobs"][:2] == [None, -9999.0]
