"""Providers that differ from this service: scripted upstreams which answer as the real ones do."""

import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

import main
from serving.model_loader import ModelLoader
from serving.registry import load_models
from tests.support import PROMPT, events, serve_in_thread, wait_until

NAME = "far"
TEXTS = [" there was a king", " a fox", " nobody"]
Answer = tuple[int, Any]  # status, and an error or the chunks of a stream
Rules = Callable[[str, dict[str, Any]], Answer]  # from a path and a body


class Provider:
    """What was asked of it, and with which key."""

    def __init__(self, rules: Rules):
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.keys: list[str | None] = []
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                path = self.path.removeprefix("/v1/")
                provider.asked.append((path, body))
                provider.keys.append(self.headers["authorization"])
                status, said = rules(path, body)
                is_stream = isinstance(said, list) and status == 200
                written = json.dumps(said).encode()
                if is_stream:
                    written = b"".join(b"data: %b\n\n" % json.dumps(c).encode() for c in said)
                    written += b"data: [DONE]\n\n"
                self.send_response(status)
                kind = "text/event-stream" if is_stream else "application/json"
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(written)))
                self.end_headers()
                self.wfile.write(written)

            def do_GET(self) -> None:
                self.send_error(404)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@contextmanager
def behind(rules: Rules, **settings: Any) -> Iterator[tuple[httpx.Client, Provider]]:
    """A client of the service that has this provider's model alone, and the provider."""
    provider = Provider(rules)
    thread = threading.Thread(target=provider.server.serve_forever, args=(0.02,))
    thread.start()
    source = provider.url + settings.pop("suffix", "")
    backend = loader(NAME, source, **settings).connect_external(NAME, source)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(main.app.state.service.registry, "backends", {NAME: backend})
            patch.setattr(main.app, "openapi_schema", None)
            with serve_in_thread(main.app) as address:
                with httpx.Client(base_url=address, timeout=30) as client:
                    yield client, provider
                wait_until(lambda: not backend._generations)
                backend.stop()
    finally:
        provider.server.shutdown()
        provider.server.server_close()
        thread.join()


def loader(name: str, source: str, **settings: Any) -> ModelLoader:
    update = {"model_name": f"{name}={source}"} | settings
    changed = main.settings.model_copy(update=update)
    return ModelLoader(changed, main.content_filter, pytest.fail, pytest.fail)


def refused(message: str, **more: Any) -> Answer:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return 400, {"error": error | more}


def unsupported(name: str) -> Answer:
    message = f"Unsupported parameter: '{name}' is not supported with this model."
    return refused(message, param=name, code="unsupported_parameter")


def chunk(text: str | None, index: int = 0, reason: str | None = None) -> dict[str, Any]:
    delta = {} if text is None else {"content": text}
    return {"choices": [{"index": index, "delta": delta, "finish_reason": reason}]}


def answered(*texts: str, reason: str = "stop") -> Answer:
    """A stream that says these texts word by word, and then how many tokens that were."""
    parts = [(i, " " + word) for i, text in enumerate(texts) for word in text.split()]
    usage = {"prompt_tokens": 9, "completion_tokens": len(parts)}
    return 200, [
        *(chunk(part, index) for index, part in parts),
        *(chunk(None, index, reason) for index in range(len(texts))),
        {"choices": [], "usage": usage},
    ]


def openai_rules(path: str, body: dict[str, Any]) -> Answer:
    """A model of OpenAI's that thinks, as gpt-5 does; the errors are quoted in test_dialect.py."""
    if path == "completions":
        message = "This is a chat model and not supported in the v1/completions endpoint."
        return 404, refused(message, param="model")[1]
    for name in ("max_tokens", "top_p", "stop", "logprobs", "top_logprobs"):
        if name in body:
            return unsupported(name)
    if "top_k" in body:
        return refused("Unrecognized request argument supplied: top_k")
    if body.get("temperature", 1) != 1:
        message = "Unsupported value: 'temperature' does not support 0.5 with this model."
        return refused(message, param="temperature", code="unsupported_value")
    return answered(*TEXTS[: body.get("n", 1)])


def mistral_rules(path: str, body: dict[str, Any]) -> Answer:
    if path != "chat/completions":
        return 404, {"message": "no Route matched with those values", "request_id": "7"}
    known = {
        "model", "messages", "temperature", "top_p", "max_tokens", "stream", "stop", "random_seed",
        "n", "presence_penalty", "frequency_penalty",
    }  # fmt: skip
    if strange := body.keys() - known:
        problems = [
            {"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs", "input": 1}
            for name in strange
        ]
        kind = {"type": "invalid_request_error", "param": None, "code": None}
        return 422, {"object": "error", "message": {"detail": problems}, **kind}
    return answered(*TEXTS[: body.get("n", 1)], reason="model_length")


def anthropic_rules(path: str, body: dict[str, Any]) -> Answer:
    """Fields that it does not have are ignored, `n` must be 1
    (https://docs.anthropic.com/en/api/openai-sdk)."""
    error = {"type": "invalid_request_error", "message": ""}
    if path != "chat/completions":
        return 404, {"type": "error", "error": {"type": "not_found_error", "message": "Not Found"}}
    if body.get("n", 1) != 1:
        return refused("n: must be 1", param="n", code="unsupported_value")
    if "temperature" in body and "top_p" in body:
        error["message"] = "`temperature` and `top_p` cannot both be specified for this model."
        return 400, {"type": "error", "error": error}
    return answered(TEXTS[body.get("seed", 0)])


@pytest.mark.parametrize(
    ("rules", "suffixes", "sent"),
    [
        (openai_rules, ["", ";chat"], {"max_completion_tokens": 7, "temperature": 1.0, "seed": 0}),
        (
            mistral_rules,
            ["", "#its/name;chat"],
            {"max_tokens": 7, "temperature": 1.0, "top_p": 0.9, "random_seed": 0},
        ),
        (
            anthropic_rules,
            ["", ";chat#its/name"],
            {"max_tokens": 7, "temperature": 1.0, "seed": 0},
        ),
    ],
)
@pytest.mark.parametrize("at", [0, 1], ids=["found out", "said"])
def test_native_routes_work_through_chat(
    rules: Rules,
    suffixes: list[str],
    sent: dict[str, Any],
    at: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever a provider refused was a 422, and one without completions a 500."""
    suffix = suffixes[at]
    caplog.set_level(logging.WARNING, "external")
    body = {"prompt": PROMPT, "max_new_tokens": 7, "seed": 0}
    with behind(rules, suffix=suffix) as (client, provider):
        answer = client.post("/generate", json=body)
        told = {"generated_text": PROMPT + TEXTS[0], "model_name": NAME}
        assert (answer.status_code, answer.json()) == (200, told)
        num_asked, news = len(provider.asked), list(caplog.messages)
        stream = client.post("/generate", json={**body, "stream": True})
        assert events(stream.text)[-1][1] == told
        assert client.get("/generate/text", params=body).text == TEXTS[0]
        paths = client.get(f"/{PROMPT}", params={"max_new_tokens": 7, "seed": 0})
        assert paths.json() == {"generated_sequences": [PROMPT + TEXTS[0]]}
        counted = client.post("/generate", json={"prompt": PROMPT, "max_length": 16, "seed": 0})
        assert counted.json() == told
        assert len(provider.asked) == num_asked + 5  # all was found out with the first
        path, asked = provider.asked[-1]  # 16 tokens without the 9 of the prompt
        assert [path for path, _ in provider.asked].count("completions") == (not suffix)
    name = "its/name" if "#" in suffix else NAME
    messages = [{"role": "user", "content": PROMPT}]
    rest = {k: v for k, v in asked.items() if k not in ("stream", "stream_options")}
    assert (path, rest) == ("chat/completions", {"model": name, "messages": messages, **sent})
    assert caplog.messages == news
    assert len([line for line in news if "upstream refuses" in line]) == (
        num_asked - 1 - (not suffix) if rules is not mistral_rules else 2
    )
    assert ("far: upstream has no completions" in "".join(news)) == (not suffix)


@pytest.mark.parametrize("rules", [openai_rules, mistral_rules, anthropic_rules])
def test_several_texts_come_through_chat(rules: Rules) -> None:
    """Where a server makes one text a request, the others are asked for with other seeds."""
    body = {"prompt": PROMPT, "max_new_tokens": 7, "seed": 0}
    with behind(rules) as (client, _):
        answer = client.post("/generate-text/", json={**body, "num_return_sequences": 3})
        texts = [PROMPT + text for text in TEXTS]
        assert (answer.status_code, answer.json()) == (200, {"generated_texts": {NAME: texts}})
        openai = {"prompt": [PROMPT, "A fox"], "max_tokens": 7, "seed": 0, "n": 2}
        whole = client.post("/v1/completions", json=openai).json()
        assert [choice["text"] for choice in whole["choices"]] == TEXTS[:2] * 2
        assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
        num_asked = 4 if rules is anthropic_rules else 2
        assert (whole["usage"]["prompt_tokens"], whole["usage"]["completion_tokens"]) == (
            9 * num_asked, 12
        )  # fmt: skip


def test_server_that_ignores_n_is_asked_for_the_others(caplog: pytest.LogCaptureFixture) -> None:
    """As TGI does, of which several texts ended as a 500."""

    def rules(path: str, body: dict[str, Any]) -> Answer:
        return answered(TEXTS[body["seed"]], reason="eos_token")

    body = {"messages": [{"role": "user", "content": PROMPT}], "n": 3, "seed": 0}
    with behind(rules) as (client, provider):
        for num_asked in (3, 6):
            answer = client.post("/v1/chat/completions", json=body).json()
            assert [choice["message"]["content"] for choice in answer["choices"]] == TEXTS
            assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
            assert len(provider.asked) == num_asked
    assert sum("upstream ignores n" in line for line in caplog.messages) == 1


def test_client_that_leaves_ends_all_requests_for_its_texts() -> None:
    gate = threading.Event()

    def rules(path: str, body: dict[str, Any]) -> Answer:
        if body["seed"]:
            gate.wait(30)
        return anthropic_rules(path, body)

    body = {"prompt": PROMPT, "max_new_tokens": 7, "seed": 0, "num_return_sequences": 3}
    with behind(rules, suffix=";chat") as (client, provider):
        backend: Any = main.app.state.service.registry.backends[NAME]
        with pytest.raises(httpx.ReadTimeout):
            client.post("/generate-text/", json=body, timeout=1)
        wait_until(lambda: not backend._generations)
        (upstream_client,) = backend.upstream._clients.values()
        pool = upstream_client._transport._pool
        wait_until(lambda: all(c.is_idle() or c.is_closed() for c in pool.connections))
        assert [asked.get("seed") for _, asked in provider.asked][-2:] in ([1, 2], [2, 1])
        gate.set()


def test_refused_field_that_makes_the_answers_form_is_named() -> None:
    with behind(openai_rules) as (client, _):
        for body in ({"logprobs": 1}, {"echo": True}):
            answer = client.post("/v1/completions", json={"prompt": PROMPT, **body})
            (name,) = body
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


@pytest.mark.parametrize("stop", ["was", "re was a k"])
def test_stop_string_ends_a_text_of_a_server_that_does_not_know_it(stop: str) -> None:
    """GPT-5 refuses `stop`, and TGI leaves the string in the text
    (huggingface/text-generation-inference issue 1724)."""
    body = {"prompt": PROMPT, "max_new_tokens": 7, "stop": ["never", stop]}
    expected = PROMPT + TEXTS[0].partition(stop)[0]
    for rules in (openai_rules, mistral_rules):
        with behind(rules) as (client, _):
            assert client.post("/generate", json=body).json()["generated_text"] == expected
            *deltas, _ = events(client.post("/generate", json={**body, "stream": True}).text)
            assert PROMPT + "".join(delta["text"] for _, delta in deltas) == expected


def test_extension_that_asks_for_nothing_is_not_sent() -> None:
    """Front ends that send every field with the values it comes with were refused by servers that
    do not know them."""
    nothing = {
        "stop_token_ids": [], "include_stop_str_in_output": False, "temperature_last": False,
        "repetition_penalty_range": 0, "ignore_eos": False, "min_tokens": 0,
    }  # fmt: skip
    body = {"prompt": PROMPT, "max_tokens": 7, "sampler_order": [6, 5, 0, 2], **nothing}
    with behind(mistral_rules) as (client, provider):
        answer = client.post("/v1/completions", json=body)
        assert (answer.status_code, answer.json()["choices"][0]["text"]) == (200, TEXTS[0])
        assert not nothing.keys() & provider.asked[0][1].keys()


def test_server_that_may_not_stream_answers_whole() -> None:
    """As OpenAI does to organizations that are not verified (RooCodeInc/Roo-Code issue 6868)."""

    def rules(path: str, body: dict[str, Any]) -> Answer:
        if body.get("stream"):
            return refused("must be verified", param="stream", code="unsupported_value")
        if "stream_options" in body:
            return refused("only with stream", param="stream_options")
        message = {"role": "assistant", "content": TEXTS[0], "annotations": []}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        return 200, {"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 4}}

    body = {"messages": [{"role": "user", "content": PROMPT}]}
    with behind(rules) as (client, _):
        whole = client.post("/v1/chat/completions", json=body).json()
        assert whole["choices"][0]["message"]["content"] == TEXTS[0]
        counts = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}
        assert whole["usage"] == counts | {"prompt_tokens_details": None}
        stream = client.post("/v1/chat/completions", json={**body, "stream": True}).text
        assert TEXTS[0] in stream
        assert stream.endswith("data: [DONE]\n\n")


def test_completion_without_a_bound_is_null_where_minus_one_is_refused() -> None:
    """vLLM refused `max_tokens: -1`, and so did the service that passed it on."""

    def rules(path: str, body: dict[str, Any]) -> Answer:
        if (body.get("max_tokens") or 1) < 1:
            return refused("max_tokens must be at least 1, got -1.", type="BadRequestError")
        if body["prompt"] == "A":
            return refused("this one is refused for another reason")
        return 200, [{"choices": [{"index": 0, "text": " there", "finish_reason": "length"}]}]

    with behind(rules) as (client, provider):
        for prompt, status in (("A", 400), (PROMPT, 200), (PROMPT, 200)):
            body = {"prompt": prompt, "max_tokens": -1}
            assert client.post("/v1/completions", json=body).status_code == status
        sent = [body["max_tokens"] for _, body in provider.asked]
    assert sent == [-1, None, -1, None, None]


def test_completion_without_a_bound_names_none_to_a_server_of_chats() -> None:
    with behind(lambda path, body: answered(TEXTS[0]), suffix=";chat") as (client, provider):
        body = {"prompt": PROMPT, "max_tokens": -1}
        answer = client.post("/v1/completions", json=body).json()
    assert answer["choices"][0]["text"] == TEXTS[0]
    assert "max_tokens" not in provider.asked[0][1]


def test_server_with_completions_keeps_them() -> None:
    """A later 404 is not taken for another kind of server."""
    is_there = True

    def rules(path: str, body: dict[str, Any]) -> Answer:
        chunks = [{"choices": [{"index": 0, "text": " there", "finish_reason": ""}]}]
        return (200, chunks) if is_there else (404, {"detail": "Not Found"})

    with behind(rules) as (client, provider):
        answer = client.post("/v1/completions", json={"prompt": PROMPT})
        choice = answer.json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (" there", "stop")
        is_there = False
        assert client.post("/generate", json={"prompt": PROMPT}).status_code == 500
        assert [path for path, _ in provider.asked] == ["completions", "completions"]
        assert provider.asked[0][1]["max_tokens"] == 16  # of which llama.cpp has no default


def test_logprobs_of_completions_come_through_chat() -> None:
    def rules(path: str, body: dict[str, Any]) -> Answer:
        if path == "completions":
            return 405, {"detail": "Method Not Allowed"}
        assert (body["logprobs"], body["top_logprobs"]) == (True, 1)
        chunks = [chunk(" there"), chunk(" was", reason="stop")]
        for part, token in zip(chunks, (" there", " was"), strict=True):
            tops = [{"token": token, "logprob": -0.5}]
            content = [{"token": token, "logprob": -0.5, "top_logprobs": tops}]
            part["choices"][0]["logprobs"] = {"content": content}
        return 200, chunks

    with behind(rules) as (client, _):
        answer = client.post("/v1/completions", json={"prompt": PROMPT, "logprobs": 1})
    assert answer.json()["choices"][0]["logprobs"] == {
        "tokens": [" there", " was"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{" there": -0.5}, {" was": -0.5}],
        "text_offset": [0, 6],
    }


def test_llama_cpps_long_prompt_keeps_its_code() -> None:
    error = {"code": 400, "message": PROMPT, "type": "exceed_context_size_error", "n_ctx": 64}
    with behind(lambda path, body: (400, {"error": error})) as (client, _):
        answer = client.post("/v1/completions", json={"prompt": PROMPT}).json()["error"]
    assert answer["code"] == "context_length_exceeded"
    assert PROMPT not in answer["message"]


def test_overloaded_anthropic_is_busy() -> None:
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    with behind(lambda path, body: (529, error)) as (client, _):
        assert client.post("/generate", json={"prompt": PROMPT}).status_code == 503


@pytest.mark.parametrize(
    ("keys", "sent"),
    [(None, "Bearer for-all"), ("far=its=own", "Bearer its=own"), (" far = , ", None)],
)
def test_key_is_the_models_own_or_that_of_all(
    keys: str | None, sent: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every provider was sent the one key, so each of them learned those of the others."""
    settings = {"external_api_key": SecretStr("for-all")}
    settings["external_api_keys"] = keys and SecretStr(keys)
    with behind(lambda path, body: (401, {}), **settings) as (client, provider):
        assert client.post("/generate", json={"prompt": PROMPT}).status_code == 500
        assert provider.keys[0] == sent
    log = "".join(capfd.readouterr())
    assert f"is EXTERNAL_API_KEY{'S' if keys else ''} right?" in log
    assert "for-all" not in log + repr(main.settings.model_copy(update=settings))
    assert "its=own" not in log


@pytest.mark.parametrize(
    "keys", ["secret", "other=secret", "far=a,far=secret", "here=secret", "=secret"]
)
def test_key_of_no_external_model_stops_the_start(keys: str) -> None:
    update = {"model_name": "far=http://host/v1,here", "external_api_keys": SecretStr(keys)}
    settings = main.settings.model_copy(update=update)
    with pytest.raises(
        SystemExit, match=r"EXTERNAL_API_KEYS: entry [12] is no name=key"
    ) as stopped:
        load_models(settings, main.content_filter, pytest.fail)
    assert "secret" not in str(stopped.value)


def test_key_that_no_header_can_hold_stops_the_start() -> None:
    source = "http://host/v1"
    made = loader(NAME, source, external_api_keys=SecretStr("far=ä-secret"))
    with pytest.raises(SystemExit, match="EXTERNAL_API_KEYS: has other") as stopped:
        made.connect_external(NAME, source)
    assert "secret" not in str(stopped.value)
