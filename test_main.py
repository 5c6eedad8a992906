"""Every native route through TestClient, on the bundled model; the settings; the packaging."""

import ast
import importlib.metadata
import json
import logging
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ["MODEL_NAME"] = str(Path(__file__).parent / "gpt2-tales")

import pytest
from fastapi.testclient import TestClient

import main
import models

ROOT = Path(__file__).parent
client = TestClient(main.app)
NAME = "gpt2-tales"


def post(body: Any, path: str = "/generate") -> Any:
    return client.post(path, json=body)


def post_raw(content: str | bytes) -> Any:
    return client.post("/generate", content=content, headers={"Content-Type": "application/json"})


def num_tokens(text: str) -> int:
    return len(main.generator.tokenizer.backend_tokenizer.encode(text))


def refused_fields(response: Any) -> list[list[str | int]]:
    """Where a 422 says that the request is wrong, after a look at its shape."""
    assert response.status_code == 422
    assert set(response.json()) == {"detail"}
    assert all(set(problem) == {"loc", "msg", "type"} for problem in response.json()["detail"])
    return [problem["loc"] for problem in response.json()["detail"]]


# --- Settings -----------------------------------------------------------------------------------


def start(**environment: str) -> subprocess.CompletedProcess[str]:
    """What a process that only imports the service prints."""
    return subprocess.run(
        [sys.executable, "-c", "import main; print(main.settings.model_dump_json())"],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


BAD_SETTINGS = [  # what one start can tell, a start each
    {
        "MAX_NUM_SEQS": ("0", "greater than or equal to 1"),
        "DTYPE": ("float64", "'auto', 'float32' or 'bfloat16'"),
        "RATE_LIMIT_STORAGE": ("nowhere://me:secret@host", "unknown storage scheme : async+***"),
    },
    {"MODEL_NAME": ("/no/such/folder", "cannot load")},
    {"FORBIDDEN_WORDS": ("two words", "allowed are letters")},
]


def test_settings_bad_value_stops_the_start() -> None:
    def start_with(bad: dict[str, tuple[str, str]]) -> subprocess.CompletedProcess[str]:
        return start(HF_HUB_OFFLINE="1", **{variable: bad[variable][0] for variable in bad})

    with ThreadPoolExecutor() as pool:
        for bad, stopped in zip(BAD_SETTINGS, pool.map(start_with, BAD_SETTINGS), strict=True):
            assert stopped.returncode == 1
            line = stopped.stderr.strip().splitlines()[-1]
            for variable, (_, allowed) in bad.items():
                assert variable in line
                assert allowed in line
            assert "Traceback" not in stopped.stderr
            assert "secret" not in stopped.stderr


def test_settings_empty_variable_counts_as_unset(tmp_path: Path) -> None:
    environment = {"MODEL_NAME": "", "MAX_NUM_SEQS": "", "HF_HOME": str(tmp_path)}
    started = start(**environment, HF_HUB_OFFLINE="1")
    assert started.returncode == 0, started.stderr
    assert json.loads(started.stdout.splitlines()[-1])["max_num_seqs"] == 64
    assert "serving gpt2-tales, the small bundled model" in started.stdout


def test_settings_are_all_in_the_readme() -> None:
    rows = re.findall(r"^\| `([A-Z_0-9]+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert set(rows) >= {name.upper() for name in main.Settings.model_fields}


def test_settings_are_all_in_the_example() -> None:
    names = re.findall(r"^#?\s?([A-Z_0-9]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE)
    assert set(names) >= {name.upper() for name in main.Settings.model_fields}
    assert all(field.description for field in main.Settings.model_fields.values())


# --- Which model --------------------------------------------------------------------------------


def test_models_unset_takes_gpt2_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "cached_folder", lambda name: None)
    monkeypatch.setattr(main, "hub_has", lambda name: True)
    monkeypatch.setattr(main, "load_generator", lambda *source: source)
    assert main.load_all(None) == {"gpt2": ("gpt2", "gpt2")}


def test_models_unset_prefers_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "cached_folder", lambda name: f"/cache/{name}")
    monkeypatch.setattr(main, "hub_has", lambda name: pytest.fail("asked the hub"))
    monkeypatch.setattr(main, "load_generator", lambda *source: source)
    assert main.load_all(None) == {"gpt2": ("gpt2", "/cache/gpt2")}


def test_models_unset_falls_back_when_gpt2_does_not_load(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load(name: str, source: str) -> str:
        if name == "gpt2":
            raise OSError("connection reset\nin the middle of a file")
        return source

    monkeypatch.setattr(main, "cached_folder", lambda name: None)
    monkeypatch.setattr(main, "hub_has", lambda name: True)
    monkeypatch.setattr(main, "load_generator", load)
    assert main.load_all(None) == {NAME: str(ROOT / NAME)}
    assert "not to be loaded (connection reset)" in caplog.text


def test_models_cached_folder_needs_config_weights_and_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"config.json"}
    monkeypatch.setattr(
        main, "try_to_load_from_cache", lambda _, file: f"/c/{file}" if file in files else None
    )
    assert main.cached_folder("gpt2") is None
    files.add("model.safetensors")
    assert main.cached_folder("gpt2") is None
    files.add("vocab.json")
    assert main.cached_folder("gpt2") == "/c"


def test_models_unreachable_hub_is_a_quick_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(main.constants, "HF_HUB_OFFLINE", False)
    assert main.hub_has("gpt2") is False


def test_models_folder_is_served_under_its_last_component() -> None:
    assert main.find_models(f"{ROOT}/gpt2-tales/, other/model") == {
        "gpt2-tales": f"{ROOT}/gpt2-tales/",
        "other/model": "other/model",
    }


# --- The app ------------------------------------------------------------------------------------


def test_client_works_with_lifespan() -> None:
    """TestClient runs the lifespan's end too, after which the engine takes no more requests."""
    code = (
        "from fastapi.testclient import TestClient; import main\n"
        "with TestClient(main.app) as client:\n"
        "    print(client.post('/generate', json={'prompt': 'One day'}).status_code)\n"
        "print(main.engine.is_healthy)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"LOG_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.stdout.split() == ["200", "False"], ran.stderr


@pytest.mark.parametrize("sent", ["abc", "A-1_2.3", "x" * 64])
def test_request_id_of_the_client_is_kept(sent: str) -> None:
    response = client.get("/health", headers={"X-Request-ID": sent})
    assert (response.status_code, response.headers["X-Request-ID"]) == (200, sent)


@pytest.mark.parametrize("sent", ["", "x" * 65, "a b", "a\tb", "é".encode()])
def test_request_id_that_is_invalid_is_replaced(sent: str | bytes) -> None:
    response = client.get("/health", headers={"X-Request-ID": sent})
    assert re.fullmatch("[0-9a-f]{32}", response.headers["X-Request-ID"])


def test_log_names_the_route_and_never_the_prompt(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        client.get("/Sesame?max_new_tokens=1")
        post({"prompt": "Sesame", "max_new_tokens": 1, "unknown": "Sesame"})
    facts = [record.facts for record in caplog.records if hasattr(record, "facts")]
    assert [(f["route"], f["status"]) for f in facts] == [("/{prompt}", 200), ("/generate", 422)]
    ours = [r.getMessage() for r in caplog.records if r.name in ("service", "engine")]
    assert not [line for line in ours if "Sesame" in line]


@pytest.mark.parametrize("is_chunked", [False, True])
def test_body_too_large_is_413(is_chunked: bool) -> None:
    content = b"a" * (main.settings.max_body_bytes + 1)
    response = post_raw(iter([content]) if is_chunked else content)
    assert response.status_code == 413
    assert response.json() == {"detail": "Request body is larger than 1000000 bytes"}
    assert response.headers["X-Request-ID"]


def test_unexpected_error_is_500_with_an_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "served_name", lambda model: 1 / 0)
    careful = TestClient(main.app, raise_server_exceptions=False)
    response = careful.post("/generate", json={"prompt": "a"}, headers={"X-Request-ID": "me"})
    assert (response.status_code, response.headers["X-Request-ID"]) == (500, "me")
    assert response.json() == {"detail": "Internal server error"}


def test_unknown_path_is_404() -> None:
    response = client.get("/no/such/path")
    assert (response.status_code, response.json()) == (404, {"detail": "Not Found"})


# --- POST /generate -----------------------------------------------------------------------------


def test_generate_continues_the_prompt() -> None:
    response = post({"prompt": "Once upon a time", "max_length": 50})
    assert response.status_code == 200
    assert set(response.json()) == {"generated_text", "model_name"}
    assert response.json()["model_name"] == NAME
    text = response.json()["generated_text"]
    assert text.startswith("Once upon a time")
    assert len(text) > len("Once upon a time")


def test_generate_empty_prompt_is_refused() -> None:
    response = post({"prompt": ""})
    assert refused_fields(response) == [["body", "prompt"]]
    assert response.json()["detail"][0]["type"] == "string_too_short"


def test_generate_500_characters_fit_and_501_do_not() -> None:
    assert post({"prompt": "ab cd" * 100}).status_code == 200
    response = post({"prompt": "a" * 501})
    assert refused_fields(response) == [["body", "prompt"]]
    assert "500" in response.json()["detail"][0]["msg"]


@pytest.mark.parametrize(("length", "status"), [(9, 422), (10, 200), (200, 200), (201, 422)])
def test_generate_max_length_bounds(length: int, status: int) -> None:
    response = post({"prompt": "Once", "max_length": length})
    assert response.status_code == status
    assert "generated_text" in response.json() or refused_fields(response)


def test_generate_max_length_counts_the_prompt() -> None:
    body = {"prompt": "Once upon a time", "max_length": 20, "seed": 0}
    text = post(body).json()["generated_text"]
    # Encoding the text anew may merge tokens, never split them.
    assert num_tokens(body["prompt"]) < num_tokens(text) <= 20


def test_generate_max_new_tokens_wins() -> None:
    prompt = "Once upon a time"
    response = post({"prompt": prompt, "max_length": 200, "max_new_tokens": 1})
    assert response.status_code == 200
    assert num_tokens(response.json()["generated_text"]) <= num_tokens(prompt) + 1


def test_generate_prompt_that_fills_max_length_is_refused_with_both_numbers() -> None:
    prompt = "the king " * 20
    response = post({"prompt": prompt, "max_length": 10})
    assert refused_fields(response) == [["body", "max_length"]]
    message = response.json()["detail"][0]["msg"]
    assert "10" in message
    assert str(num_tokens(prompt)) in message


def test_generate_long_prompt_works_with_the_defaults() -> None:
    prompt = "the king " * 55
    response = post({"prompt": prompt})
    assert response.status_code == 200
    assert num_tokens(response.json()["generated_text"]) > num_tokens(prompt)


def test_generate_prompt_over_the_context_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main.engine, "max_model_len", 16)
    response = post({"prompt": "the king " * 20, "max_new_tokens": 5})
    assert refused_fields(response) == [["body", "prompt"]]
    assert "15" in response.json()["detail"][0]["msg"]


def test_generate_never_exceeds_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main.engine, "max_model_len", 16)
    response = post({"prompt": "Once upon a time", "max_new_tokens": 200})
    assert response.status_code == 200
    assert num_tokens(response.json()["generated_text"]) <= 16


@pytest.mark.parametrize("prompt", ["I hate you", "H.A.T.E", "no v1olence please", "hateful"])
def test_generate_forbidden_prompt_is_400(prompt: str) -> None:
    response = post({"prompt": prompt})
    assert response.status_code == 400
    assert response.json() == {"detail": "Prompt contains inappropriate content"}


def test_generate_same_seed_same_text() -> None:
    body = {"prompt": "The old king", "max_new_tokens": 30, "seed": 2**63 - 1}
    first, second = post(body), post(body)
    assert first.status_code == second.status_code == 200
    assert first.json() == second.json()
    assert first.json() != post({**body, "seed": 1}).json()


def test_generate_greedy_needs_no_seed() -> None:
    body = {"prompt": "The old king", "max_new_tokens": 20, "temperature": 0}
    assert post(body).json() == post(body).json()


def test_generate_stops_before_a_stop_string() -> None:
    body = {"prompt": "The old king", "max_new_tokens": 60, "seed": 3}
    whole = post(body).json()["generated_text"]
    stop = whole[len("The old king") + 10 :][:3]
    response = post({**body, "stop": [stop]})
    assert response.status_code == 200
    cut = response.json()["generated_text"]
    assert whole.startswith(cut)
    assert stop not in cut[len("The old king") :]


def test_generate_model_by_name() -> None:
    response = post({"prompt": "One day", "model": NAME, "max_new_tokens": 1})
    assert (response.status_code, response.json()["model_name"]) == (200, NAME)


def test_generate_unknown_model_is_404() -> None:
    response = post({"prompt": "One day", "model": "gpt-5"})
    assert response.status_code == 404
    assert response.json() == {"detail": f"No such model; served: {NAME}"}


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


def test_generate_stream_is_refused_before_it_begins() -> None:
    response = post({"prompt": "I hate you", "stream": True})
    assert response.status_code == 400
    assert response.json() == {"detail": "Prompt contains inappropriate content"}


def test_generate_failing_model_is_500(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the cause")

    monkeypatch.setattr(main.engine.model, "forward", fail)
    response = post({"prompt": "One day"})
    assert (response.status_code, response.json()) == (500, {"detail": "Model inference failed"})
    assert "the cause" in caplog.text
    monkeypatch.undo()
    assert post({"prompt": "One day"}).status_code == 200


# --- Invalid input, on every route --------------------------------------------------------------

SECRET = "Sesame42"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", None), ("prompt", 5), ("prompt", [SECRET]), ("prompt", f"{SECRET}\0"),
        ("prompt", SECRET * 70), ("max_length", True), ("max_length", "30"), ("max_length", 30.0),
        ("max_length", None), ("max_new_tokens", 0), ("max_new_tokens", 201),
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", "1"), ("temperature", True),
        ("top_p", 0), ("top_p", 1.1), ("top_k", -1), ("top_k", 8193), ("top_k", 1.0),
        ("seed", -1), ("seed", 2**63), ("seed", "1"), ("stop", ["a"] * 5), ("stop", [""]),
        ("stop", [1]), ("stop", {"a": 1}), ("model", 1), ("stream", 1), ("stream", "true"),
        ("unknown", SECRET),
    ],
)  # fmt: skip
def test_invalid_field_is_named_and_never_repeated(field: str, value: Any) -> None:
    response = post({"prompt": f"{SECRET} ", field: value})
    locations = refused_fields(response)
    assert all(location[:2] == ["body", field] for location in locations)
    assert SECRET not in response.text


@pytest.mark.parametrize(
    "content",
    [
        '{"prompt": "a", "temperature": NaN}',
        '{"prompt": "a", "temperature": 1e999}',
        '{"prompt": "a", "temperature": -Infinity}',
        '{"prompt": "\\ud800"}',
        '{"prompt": "a", "\\ud800": 1}',
        '{"prompt": "a", "stop": "\\udfff"}',
        '{"prompt": "a\\u0000b"}',
        '{"prompt": "a", "' + "k" * 10_000 + '": 1}',
        '{"prompt": "' + "a" * 500_000 + '"}',
        "",
        "null",
        "[]",
        '"prompt"',
        "{",
        '{"prompt": "a",}',
        b"\xff\xfe",
        b'{"prompt": "\xff"}',
    ],
)
def test_invalid_body_is_refused_in_few_words(content: str | bytes) -> None:
    """Default FastAPI answers 500 to some of these, and repeats half a megabyte of another."""
    response = post_raw(content)
    assert response.status_code == 422
    assert response.json()["detail"]
    assert len(response.content) < 1000


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 100_000, '{"prompt": "a", "seed": ' + "9" * 5000 + "}"]
)
def test_invalid_nesting_and_huge_numbers_are_refused(content: str) -> None:
    response = post_raw(content)
    assert response.status_code == 422
    assert len(response.content) < 1000


def test_invalid_content_type_is_refused() -> None:
    response = client.post("/generate", content=b'{"prompt": "a"}')
    assert refused_fields(response) == [["body"]]


@pytest.mark.parametrize(
    "query",
    ["max_new_tokens=3.0", "max_new_tokens=true", "max_new_tokens=%C2%B2", "max_new_tokens=-1",
     "max_new_tokens=", "temperature=nan", "temperature=inf", "top_p=x", "seed=1e3", "unknown=1",
     "max_length=9"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/generate/text?prompt=One+day&", "/One%20day?"])
def test_invalid_query_is_refused(path: str, query: str) -> None:
    locations = refused_fields(client.get(path + query))
    assert locations == [["query", query.split("=")[0]]]


# --- POST /generate-text/ -----------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/generate-text/", "/generate-text"])
def test_generate_texts_answers_for_every_model(path: str) -> None:
    body = {"prompt": "One day", "num_return_sequences": 3, "max_length": 20, "seed": 1}
    response = post(body, path)
    assert response.status_code == 200
    assert list(response.json()) == ["generated_texts"]
    assert list(response.json()["generated_texts"]) == [NAME]
    texts = response.json()["generated_texts"][NAME]
    assert len(set(texts)) == 3
    assert all(text.startswith("One day") for text in texts)
    assert response.json() == post(body, path).json()


@pytest.mark.parametrize("count", [0, 9])
def test_generate_texts_count_bounds(count: int) -> None:
    response = post({"prompt": "a", "num_return_sequences": count}, "/generate-text/")
    assert refused_fields(response) == [["body", "num_return_sequences"]]


def test_generate_texts_forbidden_prompt_is_400() -> None:
    response = post({"prompt": "violence"}, "/generate-text/")
    assert response.status_code == 400
    assert response.json() == {"detail": "Prompt contains inappropriate content"}


# --- GET and POST /generate/text ----------------------------------------------------------------


def test_generate_text_is_plain_and_the_same_by_both_methods() -> None:
    got = client.get("/generate/text?prompt=One+day&max_new_tokens=10&seed=7&stop=zzz&stop=qqq")
    body = {"prompt": "One day", "max_new_tokens": 10, "seed": 7}
    posted = post(body, "/generate/text")
    assert got.status_code == posted.status_code == 200
    assert got.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert got.text == posted.text
    assert "One day" + got.text == post(body).json()["generated_text"]


def test_generate_text_forbidden_prompt_is_400() -> None:
    response = client.get("/generate/text?prompt=I+hate+you")
    assert response.status_code == 400
    assert response.json() == {"detail": "Prompt contains inappropriate content"}


def test_generate_text_without_prompt_is_refused() -> None:
    assert refused_fields(client.get("/generate/text")) == [["query", "prompt"]]


# --- GET /{prompt} ------------------------------------------------------------------------------


def test_path_prompt_is_continued() -> None:
    response = client.get("/One%20day?max_new_tokens=5&num_return_sequences=2&seed=1")
    assert response.status_code == 200
    assert response.headers["Cache-Control"] == "no-store"
    texts = response.json()["generated_sequences"]
    assert len(texts) == 2
    assert all(text.startswith("One day") for text in texts)


@pytest.mark.parametrize("prompt", ["a/b", "a?b", "50% off", "naïve 日本", "generate", "a&b=c"])
def test_path_prompt_is_decoded_once(prompt: str) -> None:
    path = "/" + "".join(f"%{byte:02x}" for byte in prompt.encode())
    response = client.get(path, params={"max_new_tokens": 1})
    assert response.status_code == 200
    assert response.json()["generated_sequences"][0].startswith(prompt)


@pytest.mark.parametrize(
    "path", ["/favicon.ico", "/robots.txt", "/sitemap.xml", "/apple-touch-icon.png", "/.env"]
)
def test_path_of_a_file_never_reaches_the_model(path: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(main, "submit", lambda *a, **k: pytest.fail("reached the model"))
    response = client.get(path)
    assert (response.status_code, response.json()) == (404, {"detail": "Not Found"})


def test_path_prompt_forbidden_is_400_and_long_is_422() -> None:
    response = client.get("/so%20much%20h4te")
    assert response.status_code == 400
    assert response.json() == {"detail": "Prompt contains inappropriate content"}
    assert refused_fields(client.get("/" + "a" * 501)) == [["path", "prompt"]]


# --- GET /, /health, /ready, /docs --------------------------------------------------------------


def test_root_is_json_for_programs_and_a_page_for_browsers() -> None:
    assert client.get("/").json() == {"health": "ok"}
    page = client.get("/", headers={"Accept": "text/html,application/xhtml+xml"})
    assert (page.status_code, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert 'href="docs"' in page.text


def get_page() -> Any:
    return client.get("/", headers={"Accept": "text/html"})


def test_page_is_small_and_whole() -> None:
    files = {file.name: file.read_text() for file in (ROOT / "static").iterdir()}
    assert len(files["index.html"].encode()) < 14_000  # so many come in the first round trip
    assert sum(len(text.encode()) for text in files.values()) < 60_000
    addresses = {a for text in files.values() for a in re.findall(r"https?://[^\s\"')]+", text)}
    assert addresses <= {"http://www.w3.org/2000/svg"}
    scripts = {f"static/{name}": text for name, text in files.items() if name.endswith(".js")}
    assert not any("innerHTML" in text for text in scripts.values())
    # Each is asked for at once: none waits until another has come.
    assert sorted(re.findall(r'"(static/\w+\.js)"', files["index.html"])) == sorted(scripts)


def test_page_allows_no_inline_code_and_no_frame() -> None:
    policy = get_page().headers["content-security-policy"]
    assert "unsafe" not in policy
    assert {"default-src 'none'", "script-src 'self'", "connect-src 'self'"} <= set(
        policy.split("; ")
    )
    for each in ("base-uri", "form-action", "frame-ancestors"):
        assert f"{each} 'none'" in policy


def test_page_depends_on_accept_and_is_asked_for_anew() -> None:
    assert client.get("/").headers["vary"] == get_page().headers["vary"] == "Accept"
    assert get_page().headers["cache-control"] == "no-cache"
    first = client.get("/static/page.js")
    assert first.headers["cache-control"] == "no-cache"
    again = client.get("/static/page.js", headers={"If-None-Match": first.headers["etag"]})
    assert (first.status_code, again.status_code) == (200, 304)


@pytest.mark.parametrize(
    "path", ["/static/", "/static/no.js", "/static/%2e%2e/main.py", "/static/%2e%2e%2fmain.py"]
)
def test_page_files_are_all_that_is_open(path: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, answer.json()) == (404, {"detail": "Not Found"})


@pytest.mark.parametrize("path", ["/static/page.js", "/static-offline-docs/swagger-ui.css"])
def test_page_files_are_only_read(path: str) -> None:
    """Was a 500: the 405 was looked up among routes, and a file is none."""
    answer = client.post(path)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


def test_page_is_served_while_draining(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main.drain, "has_begun", True)
    assert get_page().status_code == client.get("/static/page.js").status_code == 200


def test_health_is_ok() -> None:
    response = client.get("/health")
    assert (response.status_code, response.json()) == (200, {"health": "ok"})


def test_ready_names_the_models() -> None:
    response = client.get("/ready")
    assert response.status_code == 200
    assert response.json() == {
        "status": "ready",
        "model_names": [NAME],
        "loaded_model_names": [NAME],
        "loading_model_name": None,
    }


def test_ready_is_503_while_the_engine_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main.engine, "num_failed_steps", 3)
    response = client.get("/ready")
    assert response.status_code == 503
    assert response.json()["status"] == f"the engine of {NAME} keeps failing"


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_docs_bring_their_own_assets(path: str) -> None:
    page = client.get(path)
    assert page.status_code == 200
    assets = re.findall(r'(?:src|href)="([^"]+\.(?:js|css|png))"', page.text)
    assert assets
    assert all(client.get(asset).status_code == 200 for asset in assets)


def test_openapi_has_an_example_and_the_errors_of_every_generating_route() -> None:
    document = client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert operation["description"], path
            if operation["tags"] != ["generation"]:
                continue
            assert {"200", "400", "422", "500", "503", "504"} <= set(operation["responses"]), path
            if "requestBody" in operation:
                content = operation["requestBody"]["content"]["application/json"]
                schema = schemas[content["schema"]["$ref"].split("/")[-1]]
                for example in schema["examples"]:
                    assert post(example, path).status_code == 200
            else:
                prompt = next(p for p in operation["parameters"] if p["name"] == "prompt")
                assert prompt["schema"]["examples"]


def test_schemas_describe_every_sampling_parameter() -> None:
    fields = models.SamplingParams.model_fields | models.LengthParams.model_fields
    assert [name for name, field in fields.items() if not field.description] == []


# --- Packaging ----------------------------------------------------------------------------------


def dockerfile_instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions as (name, arguments), continued lines joined."""
    text = (ROOT / "Dockerfile").read_text()
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


def dockerfile_copy_sources() -> list[str]:
    """Every path that the Dockerfile copies out of the repository."""
    copies = [arguments for name, arguments in dockerfile_instructions() if name == "COPY"]
    return [
        source
        for arguments in copies
        if not arguments.startswith("--from=")
        for source in arguments.split()[:-1]
    ]


def requirement_lines(name: str) -> list[str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [line for line in lines if line]


def test_dockerfile_copies_only_what_exists() -> None:
    sources = dockerfile_copy_sources()
    assert "main.py" in sources
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_dockerignore_lets_through_what_the_dockerfile_copies() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignore
    missing = [s for s in dockerfile_copy_sources() if f"!{s.rstrip('/')}" not in ignore]
    assert missing == []


def test_dockerfile_command_is_the_procfiles() -> None:
    web = (ROOT / "Procfile").read_text().removeprefix("web: ").strip()
    commands = [arguments for name, arguments in dockerfile_instructions() if name == "CMD"]
    assert [json.loads(command) for command in commands] == [["sh", "-c", f"exec {web}"]]


def test_dockerfile_serves_as_an_ordinary_user() -> None:
    users = [arguments for name, arguments in dockerfile_instructions() if name == "USER"]
    assert users == ["app"]


def test_procfile_serves_gpt2_unless_told_otherwise() -> None:
    lines = (ROOT / "Procfile").read_text().splitlines()
    assert len(lines) == 1
    assert re.fullmatch(
        r"web: .*MODEL_NAME=\$\{MODEL_NAME:-gpt2\} "
        r"uvicorn main:app --host 0\.0\.0\.0 --port \$PORT( --\S+( \d+)?)*",
        lines[0],
    )


def test_requirements_are_pinned_exactly() -> None:
    pin = re.compile(r"[\w.-]+(\[[\w,]+\])?==\d[\w.]*( ; .+)?")
    runtime = requirement_lines("requirements.txt")
    development = requirement_lines("requirements-dev.txt")
    ray = requirement_lines("requirements-ray.txt")
    assert development[0] == ray[0] == "-r requirements.txt"
    lines = runtime + development[1:] + ray[1:]
    assert [line for line in lines if not pin.fullmatch(line)] == []


def test_requirements_name_every_import() -> None:
    names = {re.split(r"[=\[ ]", line)[0] for line in requirement_lines("requirements.txt")}
    distributions = importlib.metadata.packages_distributions()
    imported = set()
    for path in ROOT.glob("*.py"):
        if path.name.startswith(("test_", "bench", "ray_serve")):  # requirements of their own
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    local = {path.stem for path in ROOT.glob("*.py")} | {"engine"}
    unpinned = {
        module
        for module in imported - sys.stdlib_module_names - local
        if names.isdisjoint(name.lower().replace("_", "-") for name in distributions[module])
    }
    assert unpinned == set()


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    lines = script.read_text().splitlines()
    assert lines[:2] == ["#!/usr/bin/env bash", "set -euo pipefail"]
    assert {"export CI=true", "make test", "make test-ray"} <= set(lines)
    assert "|| true" not in script.read_text()
    assert os.name == "nt" or os.access(script, os.X_OK)
