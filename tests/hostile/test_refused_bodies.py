"""Bodies of a megabyte that are refused: they hold up nobody, and nothing of them stays."""

import asyncio
import gc
import json
import time
from typing import Any

import pytest
from starlette.exceptions import HTTPException

import main
from serving.bodies import MAX_WAITING_BODIES, BodyTurns
from tests.support import new_client

SIZE_BYTES = 1_000_000
COMPLETIONS, CHAT, NATIVE = "/v1/completions", "/v1/chat/completions", "/generate"

client = new_client()


def many(element: str, before: str = '{"prompt":[', after: str = "]}") -> str:
    """A list of as many elements as fit."""
    count = (SIZE_BYTES - len(before) - len(after)) // (len(element) + 1)
    return before + ",".join([element] * count) + after


def many_fields(before: str = "{", after: str = "}") -> str:
    """As many different fields as fit into three quarters."""
    return before + ",".join(f'"x{number}":1' for number in range(70_000)) + after


BODIES = {
    "empty messages": (CHAT, many("{}", '{"messages":[')),
    "messages that are numbers": (CHAT, many("1", '{"messages":[')),
    "messages that are lists": (CHAT, many("[]", '{"messages":[')),
    "messages that are right": (CHAT, many('{"role":"user","content":""}', '{"messages":[')),
    "parts that are numbers": (
        CHAT,
        many("1", '{"messages":[{"role":"user","content":[', "]}]}"),
    ),
    "fields of a message": (CHAT, many_fields('{"messages":[{', "}]}")),
    "fractions": (COMPLETIONS, many("1.5")),
    "numbers below zero": (COMPLETIONS, many("-1")),
    "token ids, then a text": (COMPLETIONS, many("1", after=',"a"]}')),
    "texts that are not allowed": (COMPLETIONS, many('"\\u0000"')),
    "empty lists": (COMPLETIONS, many("[]")),
    "lists of lists": (COMPLETIONS, many("[[]]", '{"prompt":"a","stop":[')),
    "deep lists": (COMPLETIONS, many("[" * 900 + "]" * 900)),
    "biases for no token": (COMPLETIONS, many_fields('{"prompt":"a","logit_bias":{', "}}")),
    "fields": (COMPLETIONS, many_fields()),
    "fields of a native route": (NATIVE, many_fields()),
    "metadata": (COMPLETIONS, many("[]", '{"prompt":"a","metadata":[')),
}


async def post(path: str, body: str) -> int:
    """The status, of the app on this loop."""
    statuses = []
    messages = [{"type": "http.request", "body": body.encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if not messages:
            await asyncio.Event().wait()  # the client stays
        return messages.pop()

    async def send(message: dict[str, Any]) -> None:
        statuses.append(message.get("status"))

    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "state": {},
        "headers": [(b"host", b"a"), (b"content-type", b"application/json")],
        "client": None, "server": None,
    }  # fmt: skip
    await main.app(scope, receive, send)
    return statuses[0]


async def longest_turn(path: str, body: str, count: int = 1) -> tuple[set[int], float]:
    """The statuses, and the longest that so many of a request at once kept all else on the loop
    from its turn, in seconds of this thread's own CPU time: other processes take none of that."""
    turns: list[float] = []

    async def take_turns() -> None:
        while True:
            began = time.thread_time()
            await asyncio.sleep(0.001)
            turns.append(time.thread_time() - began)

    others = asyncio.create_task(take_turns())
    await asyncio.sleep(0.01)
    statuses = await asyncio.gather(*(post(path, body) for _ in range(count)))
    await asyncio.sleep(0.01)
    others.cancel()
    return set(statuses), max(turns)


@pytest.mark.parametrize("name", BODIES)
def test_no_body_holds_the_loop(name: str) -> None:
    """Some held it for seconds: every element was looked at, several times, and each made an
    error. It takes up to 25 ms."""
    path, body = BODIES[name]
    assert len(body) <= SIZE_BYTES
    statuses, seconds = asyncio.run(longest_turn(path, body))
    assert statuses <= {400, 422}
    assert seconds < 0.25


def test_many_bodies_at_once_do_not_hold_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """All were parsed in the same turn: 32 of them held it for 0.8 s, though each takes 25 ms."""
    monkeypatch.setattr("serving.bodies.REST_TURNS", 0)  # with rests, 32 take seconds
    body = json.dumps({"prompt": [[1] * 100] * 3000, "model": "none"})
    statuses, seconds = asyncio.run(longest_turn(COMPLETIONS, body, count=32))
    assert statuses == {404}
    assert seconds < 0.25


def test_bodies_that_wait_are_bounded_and_no_other_client_waits_for_all_of_them() -> None:
    order: list[str] = []

    async def take(turns: BodyTurns, client: str) -> None:
        async with turns.turn(client):
            order.append(client)

    async def take_all() -> list[BaseException | None]:
        turns = BodyTurns()
        clients = ["a"] * (MAX_WAITING_BODIES + 2) + ["b"]
        return await asyncio.gather(
            *(take(turns, each) for each in clients), return_exceptions=True
        )

    refusals = [each for each in asyncio.run(take_all()) if each]
    assert [each.status_code for each in refusals if isinstance(each, HTTPException)] == [503]
    assert len(order) == MAX_WAITING_BODIES + 2
    assert "b" in order[:3]


def test_long_bodies_leave_most_of_the_time_to_others() -> None:
    """Bodies of a megabyte, eight at a time, each parsed as soon as the one before was: everybody's
    text took four times as long."""

    async def parse_and_wait() -> tuple[float, float]:
        turns = BodyTurns()
        async with turns.turn("a"):
            started_seconds = time.thread_time()
            json.loads("[" + "1," * 300_000 + "1]")
            parse_seconds = time.thread_time() - started_seconds
        started_seconds = time.monotonic()
        async with turns.turn("b"):
            return parse_seconds, time.monotonic() - started_seconds

    parse_seconds, wait_seconds = asyncio.run(parse_and_wait())
    assert wait_seconds > 4 * parse_seconds


def test_body_whose_client_leaves_gives_its_turn_to_the_next() -> None:
    async def leave_and_take() -> bool:
        turns = BodyTurns()
        async with turns.turn("a"):
            waiting = asyncio.create_task(turns.turn("a").__aenter__())
            await asyncio.sleep(0)
            waiting.cancel()
        async with asyncio.timeout(10), turns.turn("a"):
            return True

    assert asyncio.run(leave_and_take())


def objects_left(path: str, content: str) -> int:
    """How many containers a refused body leaves in memory, without the garbage collector's help.

    It could not help: pydantic's errors hold what they are about, and it does not see that.
    """
    headers = {"Content-Type": "application/json"}
    client.post(path, content="{}", headers=headers)  # what only the first request leaves
    gc.collect()
    gc.disable()
    try:
        num_before = len(gc.get_objects())
        assert client.post(path, content=content, headers=headers).status_code in (400, 422)
        return len(gc.get_objects()) - num_before
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": [[1.5]] * 5000}),
        (COMPLETIONS, {"prompt": [["a"]] * 5000}),
        (COMPLETIONS, {"prompt": [[1]] * 4000}),  # fits the schema
        (COMPLETIONS, {"prompt": "a", "logit_bias": {f"x{n}": [] for n in range(5000)}}),
        (CHAT, {"messages": [[]] * 5000}),
        (CHAT, {"messages": [{"role": "user", "content": [[]] * 5000}]}),
        (NATIVE, {"prompt": [[]] * 5000}),
    ],
)
def test_refused_body_leaves_nothing_in_memory(path: str, body: Any) -> None:
    """An error held its frame and the frame the error, and between them the body and an error for
    each element: 21 bodies of a megabyte took the process from 543 MiB to 5,017."""
    assert objects_left(path, json.dumps(body)) < 2500


def test_broken_json_leaves_nothing_in_memory() -> None:
    """The error has the whole body as its `doc`, and stayed until garbage was collected."""
    objects_left(NATIVE, "[" + "1," * 5000)
    assert not any(isinstance(each, json.JSONDecodeError) for each in gc.get_objects())


@pytest.mark.parametrize(
    ("path", "fields", "param", "message"),
    [
        (COMPLETIONS, {"prompt": ["a"] * 4097}, "prompt", "at most 4096 items"),
        (COMPLETIONS, {"prompt": [[1]] * 4097}, "prompt", "at most 4096 items"),
        (COMPLETIONS, {"prompt": [1] * 131_073}, "prompt", "at most 131072 items"),
        (COMPLETIONS, {"prompt": [[1] * 131_073]}, "prompt", "at most 131072 items"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {f"{n}": 1 for n in range(1025)}},
         "logit_bias", "at most 1024 items"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}] * 2049},
         "messages", "at most 2048 items"),
        (CHAT, {"messages": [{"role": "user",
                              "content": [{"type": "text", "text": "a"}] * 257}]},
         "messages", "at most 256 items"),
        (COMPLETIONS, {f"x{n}": 1 for n in range(101)}, None, "at most 100 fields"),
        (COMPLETIONS, {"prompt": "a", "user": [""] * 30_000}, None,
         "at most 30000 texts, lists, objects and fractions"),
    ],
)  # fmt: skip
def test_refusal_names_the_field_and_the_limit(
    path: str, fields: dict[str, Any], param: str | None, message: str
) -> None:
    answer = client.post(path, json=fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert message in answer.json()["error"]["message"]


def test_native_refusal_of_many_parts_has_the_shape_of_others() -> None:
    answer = client.post(NATIVE, json={"prompt": [[]] * 30_001})
    assert answer.status_code == 422
    (problem,) = answer.json()["detail"]
    assert (problem["loc"], problem["type"]) == (["body"], "value_error")


@pytest.mark.parametrize(
    "prompt",
    [[], [[]], ["a", 1], [1, "a"], [[1], "a"], [["a"]], [1, 1.5], [True], [-1], {}, 1.5, ["a\0"],
     "\ud800", [None]],
)  # fmt: skip
def test_prompt_of_no_form_is_refused_in_one_message(prompt: Any) -> None:
    content = json.dumps({"prompt": prompt})
    answer = client.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "prompt")
    assert "must" in error["message"]
