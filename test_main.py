"""The app, and its first route, `POST /generate`, on the bundled model.

Tests marked `contract` are sent to another service, where `SERVICE_ADDRESS` names one; so only the
others import main.py, which loads a model.
"""

import json
from typing import Any

import pytest

from tests.forked import run_python
from tests.support import NAME, ids, new_client, refused_fields

client = new_client()


@pytest.fixture
def service() -> Any:
    """What the routes of the app in this process stand on."""
    import main

    return main.service


def post(body: Any) -> Any:
    return client.post("/generate", json=body)


def num_tokens(text: str) -> int:
    return len(ids(text))


# --- The app ------------------------------------------------------------------------------------


def test_exported_names_are_what_the_app_works_with(service: Any) -> None:
    import main

    assert main.app.state.service is service
    assert (main.settings, main.content_filter) == (service.settings, service.content_filter)
    assert main.generator is service.registry.default.generator
    assert main.engine is service.registry.default.engine
    assert main.engine.model is main.generator.model


def test_client_works_with_lifespan() -> None:
    """TestClient runs the lifespan's end too, after which the engine takes no more requests."""
    code = (
        "from fastapi.testclient import TestClient; import main\n"
        "with TestClient(main.app) as client:\n"
        "    print(client.post('/generate', json={'prompt': 'One day'}).status_code)\n"
        "print(main.engine.is_healthy)"
    )
    ran = run_python("-c", code, LOG_LEVEL="ERROR")
    assert ran.stdout.split() == ["200", "False"], ran.stderr


@pytest.mark.contract
@pytest.mark.parametrize("is_chunked", [False, True])
def test_body_too_large_is_413(is_chunked: bool) -> None:
    content = b"a" * 1_000_001
    headers = {"Content-Type": "application/json"}
    body = iter([content]) if is_chunked else content
    response = client.post("/generate", content=body, headers=headers)
    assert response.status_code == 413
    assert response.json() == {"detail": "Request body is larger than 1000000 bytes"}
    assert response.headers["X-Request-ID"]


def test_unexpected_error_is_500_with_an_id(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.registry, "get", lambda name: 1 / 0)
    careful = new_client(raise_server_exceptions=False)
    response = careful.post("/generate", json={"prompt": "a"}, headers={"X-Request-ID": "me"})
    assert (response.status_code, response.headers["X-Request-ID"]) == (500, "me")
    assert response.json() == {"detail": "Internal server error"}


@pytest.mark.contract
def test_unknown_path_is_404() -> None:
    response = client.get("/no/such/path")
    assert (response.status_code, response.json()) == (404, {"detail": "Not Found"})


# --- POST /generate -----------------------------------------------------------------------------


@pytest.mark.contract
def test_generate_continues_the_prompt() -> None:
    response = post({"prompt": "Once upon a time", "max_length": 50})
    assert response.status_code == 200
    assert set(response.json()) == {"generated_text", "model_name"}
    assert response.json()["model_name"] == NAME
    text = response.json()["generated_text"]
    assert text.startswith("Once upon a time")
    assert len(text) > len("Once upon a time")


@pytest.mark.contract
def test_generate_empty_prompt_is_refused() -> None:
    response = post({"prompt": ""})
    assert refused_fields(response) == [["body", "prompt"]]
    assert response.json()["detail"][0]["type"] == "string_too_short"


@pytest.mark.contract
def test_generate_500_characters_fit_and_501_do_not() -> None:
    assert post({"prompt": "ab cd" * 100}).status_code == 200
    response = post({"prompt": "a" * 501})
    assert refused_fields(response) == [["body", "prompt"]]
    assert "500" in response.json()["detail"][0]["msg"]


@pytest.mark.contract
@pytest.mark.parametrize(("length", "status"), [(9, 422), (10, 200), (200, 200), (201, 422)])
def test_generate_max_length_bounds(length: int, status: int) -> None:
    response = post({"prompt": "Once", "max_length": length})
    assert response.status_code == status
    assert "generated_text" in response.json() or refused_fields(response)


@pytest.mark.contract
def test_generate_max_length_counts_the_prompt() -> None:
    body = {"prompt": "Once upon a time", "max_length": 20, "seed": 0}
    text = post(body).json()["generated_text"]
    # Encoding the text anew may merge tokens, never split them.
    assert num_tokens(body["prompt"]) < num_tokens(text) <= 20


@pytest.mark.contract
def test_generate_max_new_tokens_wins() -> None:
    prompt = "Once upon a time"
    response = post({"prompt": prompt, "max_length": 200, "max_new_tokens": 1})
    assert response.status_code == 200
    assert num_tokens(response.json()["generated_text"]) <= num_tokens(prompt) + 1


@pytest.mark.contract
def test_generate_prompt_that_fills_max_length_is_refused_with_both_numbers() -> None:
    prompt = "the king " * 20
    response = post({"prompt": prompt, "max_length": 10})
    assert refused_fields(response) == [["body", "max_length"]]
    message = response.json()["detail"][0]["msg"]
    assert "10" in message
    assert str(num_tokens(prompt)) in message


@pytest.mark.contract
def test_generate_long_prompt_works_with_the_defaults() -> None:
    prompt = "the king " * 55
    response = post({"prompt": prompt})
    assert response.status_code == 200
    assert num_tokens(response.json()["generated_text"]) > num_tokens(prompt)


def test_generate_prompt_over_the_context_is_refused(
    service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.registry.default.engine, "max_model_len", 16)
    response = post({"prompt": "the king " * 20, "max_new_tokens": 5})
    assert refused_fields(response) == [["body", "prompt"]]
    assert "15" in response.json()["detail"][0]["msg"]


def test_generate_never_exceeds_the_context(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.registry.default.engine, "max_model_len", 16)
    response = post({"prompt": "Once upon a time", "max_new_tokens": 200})
    assert response.status_code == 200
    assert num_tokens(response.json()["generated_text"]) <= 16


@pytest.mark.contract
@pytest.mark.parametrize("prompt", ["I hate you", "H.A.T.E", "no v1olence please", "hateful"])
def test_generate_forbidden_prompt_is_400(prompt: str) -> None:
    response = post({"prompt": prompt})
    assert response.status_code == 400
    assert response.json() == {"detail": "Prompt contains inappropriate content"}


@pytest.mark.contract
def test_generate_same_seed_same_text() -> None:
    body = {"prompt": "The old king", "max_new_tokens": 30, "seed": 2**63 - 1}
    first, second = post(body), post(body)
    assert first.status_code == second.status_code == 200
    assert first.json() == second.json()
    assert first.json() != post({**body, "seed": 1}).json()


@pytest.mark.contract
def test_generate_greedy_needs_no_seed() -> None:
    body = {"prompt": "The old king", "max_new_tokens": 20, "temperature": 0}
    assert post(body).json() == post(body).json()


@pytest.mark.contract
def test_generate_stops_before_a_stop_string() -> None:
    body = {"prompt": "The old king", "max_new_tokens": 60, "seed": 3}
    whole = post(body).json()["generated_text"]
    stop = whole[len("The old king") + 10 :][:3]
    response = post({**body, "stop": [stop]})
    assert response.status_code == 200
    cut = response.json()["generated_text"]
    assert whole.startswith(cut)
    assert stop not in cut[len("The old king") :]


@pytest.mark.contract
def test_generate_structured_output_follows_the_prompt() -> None:
    asked = {"structured_outputs": {"choice": [" sad", " happy"]}}
    answer = post({"prompt": "The king was", **asked})
    assert answer.status_code == 200
    assert answer.json()["generated_text"] in ("The king was sad", "The king was happy")


@pytest.mark.parametrize(
    ("asked", "place", "reason"),
    [
        ({"choice": ["a"], "regex": "a"}, [], "Value error, needs one of choice, regex, json, "),
        ({"choice": [""]}, ["choice", 0], "String should have at least 1 character"),
        ({"regex": "(a"}, [], "regex is not valid"),
    ],
)
def test_generate_bad_structure_is_refused(asked: Any, place: list[Any], reason: str) -> None:
    answer = post({"prompt": "Hello", "structured_outputs": asked})
    assert refused_fields(answer) == [["body", "structured_outputs", *place]]
    assert answer.json()["detail"][0]["msg"].startswith(reason)


def test_generate_model_by_name() -> None:
    response = post({"prompt": "One day", "model": NAME, "max_new_tokens": 1})
    assert (response.status_code, response.json()["model_name"]) == (200, NAME)


@pytest.mark.contract
def test_generate_unknown_model_is_404() -> None:
    response = post({"prompt": "One day", "model": "gpt-5"})
    assert response.status_code == 404
    assert response.json() == {"detail": f"No such model; served: {NAME}"}


@pytest.mark.contract
def test_generate_streams_events() -> None:
    body = {"prompt": "Once upon a time", "max_new_tokens": 20, "seed": 5}
    response = post({**body, "stream": True})
    assert response.status_code == 200
    assert response.headers["Content-Type"].startswith("text/event-stream")
    events = [json.loads(e.removeprefix("data: ")) for e in response.text.split("\n\n")[:-1]]
    assert events[-1] == post(body).json()
    deltas = [event["text"] for event in events[:-1]]
    assert len(deltas) > 1
    assert body["prompt"] + "".join(deltas) == events[-1]["generated_text"]


@pytest.mark.contract
def test_generate_stream_is_refused_before_it_begins() -> None:
    response = post({"prompt": "I hate you", "stream": True})
    assert response.status_code == 400
    assert response.json() == {"detail": "Prompt contains inappropriate content"}


def test_generate_failing_model_is_500(
    service: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the cause")

    monkeypatch.setattr(service.registry.default.engine.model, "forward", fail)
    response = post({"prompt": "One day"})
    assert (response.status_code, response.json()) == (500, {"detail": "Model inference failed"})
    assert "the cause" in caplog.text
    monkeypatch.undo()
    assert post({"prompt": "One day"}).status_code == 200
