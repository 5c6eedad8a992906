"""Long answers are written and sent in pieces."""

import asyncio
import json
import time
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import main
from serving import json_pieces as module
from serving.json_pieces import SENT_BYTES, PiecewiseJson, in_json, json_pieces
from tests.support import NAME

values = st.recursive(
    st.none() | st.integers() | st.booleans() | st.text(),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(values)
def test_pieces_are_together_what_is_written_at_once(content: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PIECE_VALUES", "PIECE_LISTS", "PIECE_CHARACTERS", "FEW"):
            patch.setattr(module, name, 2)
        assert b"".join(asyncio.run(json_pieces(content))) == in_json(content)


POSITION = {str(n): {"logprob": -1.5, "rank": n, "decoded_token": " word"} for n in range(20)}


@pytest.mark.parametrize(
    "content",
    [
        {"choices": [{"prompt_logprobs": [None] + [POSITION] * 5000}]},
        {"choices": [{"logprobs": {"top_logprobs": [POSITION] * 5000}}]},
        {"tokens": list(range(2_000_000))},
        {"prompt": "Ã\n" * 5_000_000},
    ],
)
def test_long_answer_is_written_and_sent_without_holding_the_loop(content: Any) -> None:
    """The log probabilities of one prompt of 32,000 tokens were written in 2.4 seconds in which
    nothing else ran. By this thread's own CPU time, of which other processes take nothing."""
    turns: list[float] = []
    num_bytes: list[int] = []

    async def send(message: Any) -> None:
        num_bytes.append(len(message.get("body", b"")))

    async def take_turns() -> None:
        while True:
            began = time.thread_time()
            await asyncio.sleep(0)
            turns.append(time.thread_time() - began)

    async def answer() -> None:
        others = asyncio.create_task(take_turns())
        await PiecewiseJson(await json_pieces(content))({}, None, send)  # type: ignore[arg-type]
        others.cancel()

    began = time.thread_time()
    asyncio.run(answer())
    assert sum(num_bytes) > 5_000_000
    assert max(turns) < max(0.02, (time.thread_time() - began) / 5)


def test_long_answer_of_the_service_is_whole() -> None:
    """With its length, in pieces of which each waits until a slow reader has room."""
    sent: list[dict[str, Any]] = []

    async def note(scope: Any, receive: Any, send: Any) -> None:
        async def send_on(message: Any) -> None:
            sent.append(message)
            await send(message)

        await main.app(scope, receive, send_on)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(note)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            body = {"prompt": [5] * 100, "n": 2, "max_tokens": 1, "prompt_logprobs": 20}
            return await client.post("/v1/completions", json={"model": NAME, **body})

    answer = asyncio.run(ask())
    assert answer.status_code == 200
    assert len(answer.content) == int(answer.headers["content-length"]) > 2 * SENT_BYTES
    choices = json.loads(answer.content)["choices"]
    assert [(each["index"], len(each["prompt_logprobs"])) for each in choices] == [
        (0, 100),
        (1, 100),
    ]
    bodies = [message for message in sent if message["type"] == "http.response.body"]
    assert len(bodies) > 2
    assert [each["more_body"] for each in bodies] == [True] * (len(bodies) - 1) + [False]
