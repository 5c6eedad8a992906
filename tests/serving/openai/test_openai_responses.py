"""Answers are written in pieces."""

import asyncio
from typing import Any

import httpx
import pytest

import main
from serving.openai import responses


def test_fingerprint_tells_kernels_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """It held `auto`, whatever that had come to: int8 on one processor, bfloat16 on another."""
    backend, settings = main.registry.default, main.settings
    here = responses.system_fingerprint(backend, settings)
    assert responses.system_fingerprint(backend, settings) == here
    monkeypatch.setattr(backend, "about", backend.about._replace(kernel="another"))
    assert responses.system_fingerprint(backend, settings) != here


def test_others_have_their_turn_between_the_choices_of_an_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """200 scored prompts were checked and written in one go: 18 MB, for 2.3 seconds."""
    num_turns, turns_before = 0, []
    write = responses.in_json

    def note(content: dict[str, Any]) -> bytes:
        turns_before.append(num_turns)
        return write(content)

    async def take_turns() -> None:
        nonlocal num_turns
        while True:
            num_turns += 1
            await asyncio.sleep(0)

    async def ask() -> httpx.Response:
        others = asyncio.create_task(take_turns())
        transport = httpx.ASGITransport(main.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            body = {"prompt": ["a", "b", "c"], "max_tokens": 0, "echo": True, "logprobs": 1}
            answer = await client.post("/v1/completions", json=body)
        others.cancel()
        return answer

    monkeypatch.setattr(responses, "in_json", note)
    answer = asyncio.run(ask())
    assert answer.status_code == 200
    assert [choice["text"] for choice in answer.json()["choices"]] == ["a", "b", "c"]
    assert len(set(turns_before)) == len(turns_before) == 4
