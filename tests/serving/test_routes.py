"""The native routes besides `POST /generate`: the page, probes, documents, and three ways to get
text."""

import re
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.routing import iter_route_contexts

from serving.chat_templates import PLAIN_TEMPLATE
from serving.media_loader import KINDS
from tests.support import NAME, PROMPT, ROOT, new_client, refused_fields

client = new_client()


@pytest.fixture
def backend() -> Any:
    """The default model of the app in this process."""
    import main

    return main.service.registry.default


def get_page() -> Any:
    return client.get("/", headers={"Accept": "text/html"})


def post(body: Any, path: str) -> Any:
    return client.post(path, json=body)


# --- Page, probes, documents --------------------------------------------------------------------


@pytest.mark.contract
def test_root_is_json_for_programs_and_a_page_for_browsers() -> None:
    assert client.get("/").json() == {"health": "ok"}
    page = client.get("/", headers={"Accept": "text/html,application/xhtml+xml"})
    assert (page.status_code, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert 'href="docs"' in page.text


# What static/media.html alone needs.
MEDIA_PAGE = ("media", "shape_view")


def test_page_is_small_and_whole() -> None:
    files = {file.name: file.read_text() for file in (ROOT / "static").iterdir()}
    assert len(files["index.html"].encode()) < 14_000  # so many come in the first round trip
    others = [name for name in files if name.startswith(MEDIA_PAGE)]
    assert sum(len(text.encode()) for name, text in files.items() if name not in others) < 60_000
    addresses = {a for text in files.values() for a in re.findall(r"https?://[^\s\"')]+", text)}
    assert addresses <= {"http://www.w3.org/2000/svg"}
    scripts = {f"static/{name}": text for name, text in files.items() if name.endswith(".js")}
    assert not any("innerHTML" in text for text in scripts.values())
    # Each is asked for at once: none waits until another has come.
    of_text = sorted(path for path in scripts if path.removeprefix("static/") not in others)
    assert sorted(re.findall(r'"(static/\w+\.js)"', files["index.html"])) == of_text
    of_media = set(re.findall(r'"(static/\w+\.js)"', files["media.html"]))
    assert of_media >= {f"static/{name}" for name in others if name.endswith(".js")}


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


@pytest.mark.contract
def test_health_is_ok() -> None:
    response = client.get("/health")
    assert (response.status_code, response.json()) == (200, {"health": "ok"})


@pytest.mark.contract
def test_ready_names_the_models() -> None:
    response = client.get("/ready")
    assert response.status_code == 200
    assert response.json() == {
        "status": "ready",
        "model_names": [NAME],
        "loaded_model_names": [NAME],
        "loading_model_name": None,
    }


def test_ready_is_503_while_the_engine_fails(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.engine, "num_failed_steps", 3)
    response = client.get("/ready")
    assert response.status_code == 503
    assert response.json()["status"] == f"the engine of {NAME} keeps failing"


@pytest.mark.contract
@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_docs_bring_their_own_assets(path: str) -> None:
    page = client.get(path)
    assert page.status_code == 200
    assets = re.findall(r'(?:src|href)="([^"]+\.(?:js|css|png))"', page.text)
    assert assets
    assert all(client.get(asset).status_code == 200 for asset in assets)


@pytest.mark.contract
@pytest.mark.parametrize("path", ["/healthz", "/livez", "/ping", "/readyz"])
def test_probes_have_the_names_of_the_field(path: str) -> None:
    """They were prompts: always 200, and a generation each."""
    response = client.get(path)
    expected = client.get("/ready" if path == "/readyz" else "/health").json()
    assert (response.status_code, response.json()) == (200, expected)


def test_get_routes_have_head_which_generates_nothing(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HEAD was a 405 on all but the page and the probes."""
    import main

    monkeypatch.setattr(backend, "submit_text", lambda *_, **__: pytest.fail("reached the model"))
    paths = {r.path for r in iter_route_contexts(main.app.routes) if "GET" in (r.methods or ())}
    paths -= {f"/generate/{kind}" for kind in KINDS}  # 404: no model is set for them here
    assert len(paths) > 12
    for path in paths:
        asked = path.replace("{prompt}", "Once").replace("{model_id:path}", NAME)
        response = client.head(asked, params={"prompt": "Once"} if "/text" in path else {})
        assert (response.status_code, response.content) == (200, b""), path
        if path not in ("/generate/text", "/{prompt}"):
            wanted = client.get(asked).headers["content-length"]
            assert path == "/metrics" or response.headers["content-length"] == wanted
    assert client.head("/generate/text").status_code == 422
    assert client.head("/models").status_code == 404


@pytest.mark.parametrize(
    ("path", "allow"),
    [
        ("/generate", "POST"),
        ("/generate/text", "GET, HEAD, POST"),
        ("/v1/completions", "POST"),
        ("/v1/models", "GET, HEAD"),
        ("/tokenize", "POST"),
        ("/static/page.js", "GET, HEAD"),
    ],
)
@pytest.mark.parametrize("root_path", ["", "/svc"])
def test_options_tell_what_is_allowed(path: str, allow: str, root_path: str) -> None:
    response = new_client(root_path=root_path).options(root_path + path)
    assert (response.status_code, response.content) == (204, b"")
    assert response.headers["allow"] == allow


def test_routes_work_behind_a_proxy_that_strips_a_prefix() -> None:
    """Errors of `/v1` had the native shape there, and 405 the methods of another route."""
    behind = new_client(root_path="/svc")
    assert behind.get("/svc/v1/models").status_code == 200
    wrong = behind.post("/svc/v1/completions", json={"model": NAME, "prompt": 1.5})
    assert (wrong.status_code, set(wrong.json())) == (400, {"error"})
    assert behind.get("/svc/health").json() == {"health": "ok"}
    assert "/v1/models" in behind.get("/svc/models").json()["detail"]
    texts = behind.get("/svc/One%2Fday?max_new_tokens=1").json()["generated_sequences"]
    assert texts[0].startswith("One/day")
    assert '<base href="/svc/">' in behind.get("/svc/", headers={"Accept": "text/html"}).text
    assert behind.get("/svc/openapi.json").json()["servers"] == [{"url": "/svc"}]


# --- Bodies -------------------------------------------------------------------------------------


@pytest.mark.contract
@pytest.mark.parametrize(
    "path",
    ["/generate", "/generate-text/", "/generate/text", "/v1/completions", "/v1/chat/completions"],
)
def test_body_of_another_type_is_415_and_told_what_to_send(path: str) -> None:
    """Said that a valid dictionary is needed, as did a compressed one that it is not valid JSON."""
    content = b'{"prompt": "Once", "max_tokens": 1}'
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    zipped = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    for headers, words in (
        ({}, "Content-Type: application/json"),
        (form, "Content-Type: application/json"),
        (zipped, "without Content-Encoding"),
    ):
        response = client.post(path, content=content, headers=headers)
        assert response.status_code == 415
        body = response.json()
        told = body["error"]["message"] if "/v1" in path else body["detail"]
        assert words in told
    assert response.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("sent", ["application/json; charset=utf-8", "application/vnd.a+json"])
def test_body_of_json_is_taken_by_whatever_name(sent: str) -> None:
    headers = {"Content-Type": sent, "Content-Encoding": "identity"}
    content = b'{"prompt": "Once", "max_new_tokens": 1}'
    assert client.post("/generate", content=content, headers=headers).status_code == 200
    assert refused_fields(client.post("/generate")) == [["body"]]


# --- POST /generate-text/ -----------------------------------------------------------------------


@pytest.mark.contract
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


@pytest.mark.contract
@pytest.mark.parametrize("count", [0, 9])
def test_generate_texts_count_bounds(count: int) -> None:
    response = post({"prompt": "a", "num_return_sequences": count}, "/generate-text/")
    assert refused_fields(response) == [["body", "num_return_sequences"]]


@pytest.mark.contract
def test_generate_texts_forbidden_prompt_is_400() -> None:
    response = post({"prompt": "violence"}, "/generate-text/")
    assert response.status_code == 400
    assert response.json() == {"detail": "Prompt contains inappropriate content"}


# --- GET and POST /generate/text ----------------------------------------------------------------


@pytest.mark.contract
def test_generate_text_is_plain_and_the_same_by_both_methods() -> None:
    got = client.get("/generate/text?prompt=One+day&max_new_tokens=10&seed=7&stop=zzz&stop=qqq")
    body = {"prompt": "One day", "max_new_tokens": 10, "seed": 7}
    posted = post(body, "/generate/text")
    assert got.status_code == posted.status_code == 200
    assert got.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert got.text == posted.text
    assert "One day" + got.text == post(body, "/generate").json()["generated_text"]


def test_generate_text_of_a_base_model_continues_whatever_its_template(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"prompt": PROMPT, "max_new_tokens": 5, "seed": 1}
    continued = post(body, "/generate/text").text
    monkeypatch.setattr(backend.tokenizer, "chat_template", None)
    for name in ("is_base_model", "turn_ends"):
        monkeypatch.setattr(backend, name, getattr(backend, name))
    backend.set_chat_template(PLAIN_TEMPLATE)
    assert post(body, "/generate/text").text == continued
    messages = [{"role": "user", "content": PROMPT}]
    chat = {"messages": messages, "max_tokens": 5, "seed": 1}
    assert post(chat, "/v1/chat/completions").status_code == 200


@pytest.mark.contract
def test_generate_text_forbidden_prompt_is_400() -> None:
    response = client.get("/generate/text?prompt=I+hate+you")
    assert response.status_code == 400
    assert response.json() == {"detail": "Prompt contains inappropriate content"}


@pytest.mark.contract
def test_generate_text_without_prompt_is_refused() -> None:
    assert refused_fields(client.get("/generate/text")) == [["query", "prompt"]]


# --- GET /{prompt} ------------------------------------------------------------------------------


@pytest.mark.contract
def test_path_prompt_is_continued() -> None:
    response = client.get("/One%20day?max_new_tokens=5&num_return_sequences=2&seed=1")
    assert response.status_code == 200
    assert response.headers["Cache-Control"] == "no-store"
    texts = response.json()["generated_sequences"]
    assert len(texts) == 2
    assert all(text.startswith("One day") for text in texts)


@pytest.mark.contract
@pytest.mark.parametrize("prompt", ["a/b", "a?b", "50% off", "naïve 日本", "generated", "a&b=c"])
def test_path_prompt_is_decoded_once(prompt: str) -> None:
    path = "/" + "".join(f"%{byte:02x}" for byte in prompt.encode())
    response = client.get(path, params={"max_new_tokens": 1})
    assert response.status_code == 200
    assert response.json()["generated_sequences"][0].startswith(prompt)


@pytest.mark.parametrize(
    "path", ["/favicon.ico?v=1", "/robots.txt", "/apple-touch-icon-120x120.png", "/.env", "/.git"]
)
def test_path_of_a_file_never_reaches_the_model(
    path: str, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "submit_text", lambda *_, **__: pytest.fail("reached the model"))
    response = client.get(path)
    assert (response.status_code, response.json()) == (404, {"detail": "Not Found"})


@pytest.mark.contract
@pytest.mark.parametrize(
    ("method", "path", "words"),
    [
        ("GET", "/models?limit=1", "/v1/models"),
        ("GET", "/v1", "/v1/models"),
        ("GET", "/api/tags", "/v1/models"),
        ("GET", "/version", "/openapi.json"),
        ("GET", "/info", "/openapi.json"),
        ("GET", "/props", "/v1/models"),
        ("GET", "/tokenize", "POST /tokenize"),
        ("GET", "/is_sleeping", "no such API"),
        *(("GET", path, "GET /health") for path in ["/live", "/up", "/startupz", "/health-check"]),
        ("GET", "/is-ready", "GET /ready"),
        ("GET", "/docs/", "GET /docs"),
        ("POST", "/v1/internal/token-count", "POST /tokenize"),
        ("POST", "/v1/completions/", "POST /v1/completions"),
        ("GET", "/generate", "POST /generate"),
        ("GET", "/health/", "/health"),
        ("GET", "/health/ready", "/ready"),
        ("POST", "/completions", "/v1/completions"),
        ("POST", "/chat/completions", "/v1/chat/completions"),
        ("POST", "/v1/v1/completions", "POST /v1/completions"),
    ],
)
def test_path_of_a_probe_or_an_api_is_404_that_names_the_right_one(
    method: str, path: str, words: str
) -> None:
    """`GET /models` was answered with generated text: a client found no models."""
    response = client.request(method, path, json={} if method == "POST" else None)
    assert response.status_code == 404
    assert words in response.text
    assert ("error" if path.startswith("/v1") else "detail") in response.json()


@pytest.mark.contract
@pytest.mark.parametrize("prompt", ["I love node.js", "and then...", "...and then", "Health", "…"])
def test_path_that_only_looks_like_a_file_is_a_prompt(prompt: str) -> None:
    response = client.get(f"/{quote(prompt)}?max_new_tokens=1")
    assert response.status_code == 200
    assert response.json()["generated_sequences"][0].startswith(prompt)


@pytest.mark.contract
def test_path_prompt_forbidden_is_400_and_long_is_422() -> None:
    response = client.get("/so%20much%20h4te")
    assert response.status_code == 400
    assert response.json() == {"detail": "Prompt contains inappropriate content"}
    assert refused_fields(client.get("/" + "a" * 501)) == [["path", "prompt"]]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('a system message is needed') }}", "does not take these roles"),
        ("{{ 1 + messages }}", "failed (TypeError)"),
        ("{{ 1 // 0 }}", "failed (ZeroDivisionError)"),
        ("{{ messages[0].name.first }}", "failed (UndefinedError)"),
        ("{% if %}", "failed (TemplateSyntaxError)"),
    ],
)
@pytest.mark.parametrize("path", ["/generate/text", "/v1/chat/completions"])
def test_chat_template_that_fails_refuses_the_request(
    backend: Any, path: str, template: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Was a 500 on /generate/text, and elsewhere for errors that are not the template's own."""
    monkeypatch.setattr(backend.tokenizer, "chat_template", template)
    if path == "/generate/text":
        for answer in (post({"prompt": "Sesame"}, path), client.get(f"{path}?prompt=Sesame")):
            assert refused_fields(answer)[0][-1] == "prompt"
            assert reason in answer.json()["detail"][0]["msg"]
            assert "Sesame" not in answer.text
        return
    answer = post({"model": NAME, "messages": [{"role": "user", "content": "Sesame"}]}, path)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
    assert reason in answer.json()["error"]["message"]
