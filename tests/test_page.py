"""The page in a real browser: Chromium, which finds no address but the loopback.

Most tests share a server in a thread of this process, so that each may
change settings and engine; one server with two models runs in a process of its own, which the
last test kills. Without a Chromium these tests are skipped, where CI is "true" they fail.
"""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlencode

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from fastapi.responses import HTMLResponse
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright
from playwright.sync_api import Error as PlaywrightError

import main
from serving.documentation import NO_CHAT
from serving.middleware import ApiKeyMiddleware, RequestContextMiddleware, key_digest
from serving.rate_limits import RateLimitMiddleware
from tests.support import (
    PROMPT,
    ROOT,
    Served,
    new_client,
    serve_in_thread,
    served,
    stream,
    wait_until,
)

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
NO_CHROMIUM = "no Chromium: apt-get install chromium, or put another Chrome on the PATH"
if not CHROMIUM and os.environ.get("CI") != "true":
    pytest.skip(NO_CHROMIUM, allow_module_level=True)  # one line for all of them
HTML = "<img src=x onerror=alert(1)><script>alert(2)</script><b>bold</b> &amp;"

client = new_client()
expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM, NO_CHROMIUM
    flags = ["--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]
    if hasattr(os, "getuid") and os.getuid() == 0:
        flags.append("--no-sandbox")  # which does not work for root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serve_in_thread(main.app) as address:
        yield address


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    second = tmp_path_factory.mktemp("models") / "second-tales"
    shutil.copytree(ROOT / "gpt2-tales", second)
    with served(MODEL_NAME=f"{ROOT / 'gpt2-tales'},{second}") as service:
        yield service


Visit = Callable[..., Page]


@pytest.fixture
def visit(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Visit]:
    """Opens the page in a context of its own.

    Afterwards: it has asked for nothing elsewhere, and the console holds no complaint but,
    where `refused` says that a test is about that, the browser's own on a status or connection.
    """
    contexts, asked, complaints = [], [], []

    def open_page(link: str = "", at: str = "", refused: bool = False, **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(30_000)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))

        def read(message: ConsoleMessage) -> None:
            is_own = message.text.startswith("Failed to load resource")
            if message.type in ("error", "warning") and not (refused and is_own):
                complaints.append(message.text)

        page.on("console", read)
        page.goto(f"{at or request.getfixturevalue('address')}/{link}")
        if not refused and options.get("java_script_enabled", True):
            expect(page.locator("#seed")).to_be_enabled()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert [url for url in asked if not url.startswith(("http://127.0.0.1:", "data:"))] == []
    wait_until(is_idle)  # whoever leaves frees the place


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 20 ms: what a test looks at in mid-stream is there long enough."""
    forward = main.engine.model.forward

    def wait_and_forward(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.02)
        return forward(*args, **kwargs)

    monkeypatch.setattr(main.engine.model, "forward", wait_and_forward)


def is_idle() -> bool:
    return main.registry.num_unfinished == 0


def guarded(key_names: dict[bytes, str], **update: Any) -> RequestContextMiddleware:
    """The app behind keys and limits of its own, with these settings."""
    settings = main.settings.model_copy(update=update)
    limited = RateLimitMiddleware(main.app, settings)
    keyed = ApiKeyMiddleware(limited, key_names, settings.metrics_need_key, settings.docs_need_key)
    return RequestContextMiddleware(keyed)


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).first.click()


def finish(page: Page) -> str:
    """The text on display once nothing runs any more."""
    expect(page.locator(".pane[aria-busy=false] .end span:not(:empty)").first).to_be_visible()
    expect(page.locator(".pane[aria-busy=true]")).to_have_count(0)
    return page.locator(".text").first.text_content() or ""


def link(**fields: Any) -> str:
    return "#" + urlencode({"prompt": PROMPT, "seed": 7, "max_tokens": 20} | fields, doseq=True)


def fragment(page: Page) -> dict[str, list[str]]:
    return parse_qs(page.url.partition("#")[2])


def completion(**fields: Any) -> str:
    """What the service itself says to the page's first values."""
    body = {"prompt": PROMPT, "seed": 7, "max_tokens": 20, "top_p": 0.9, "top_k": 50} | fields
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return PROMPT + answer.json()["choices"][0]["text"]


# --- Generating ---------------------------------------------------------------------------------

WATCH_TEXT = """() => {
  window.lengths = [];
  const look = () => lengths.push(document.querySelector(".text")?.textContent.length ?? 0);
  const everything = {subtree: true, childList: true, characterData: true};
  new MutationObserver(look).observe(document.querySelector("#result"), everything);
}"""


def test_generate_streams_and_says_how_it_went(visit: Visit) -> None:
    page = visit()
    page.get_by_label("Prompt").fill(PROMPT)
    page.evaluate(WATCH_TEXT)
    press(page, "Generate")
    text = finish(page)
    lengths = page.evaluate("lengths")
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 5
    assert text.startswith(PROMPT)
    assert len(text) == lengths[-1] > len(PROMPT) + 50
    assert page.locator(".given").text_content() == PROMPT
    expect(page.locator(".caret")).to_have_count(0)
    expect(page.locator(".pane h3")).to_have_text("gpt2-tales")
    expect(page.locator(".figures")).to_have_text(
        re.compile(r"^50 tokens · \d+ tokens/s · first token after \d+ ms$")
    )
    expect(page.locator(".end span")).to_have_text("reached the length of 50 tokens")
    expect(page.locator("#announcer")).to_have_text(
        "gpt2-tales: 50 tokens, reached the length of 50 tokens."
    )


def test_stop_frees_the_place_and_keeps_the_text(visit: Visit, slow: None) -> None:
    page = visit(link(max_tokens=200, n=8))
    press(page, "Generate")
    expect(page.locator("#announcer")).to_have_text("Generating.")
    expect(page.locator(".caret")).to_have_count(8)
    expect(page.locator(".text").first).to_contain_text(re.compile(f"{PROMPT} ?[a-z,]"))
    assert main.engine.num_running == 8
    press(page, "Stop")
    wait_until(is_idle)
    text = finish(page)
    assert len(text) > len(PROMPT)
    assert page.locator(".end span").all_text_contents() == ["stopped"] * 8
    expect(page.locator("#announcer")).to_have_text("Stopped.")


def test_generate_and_stop_many_times(visit: Visit, slow: None) -> None:
    """Each press takes the place of what runs; nothing of an old run is left over."""
    page = visit(link())
    page.evaluate("""() => {
      const [main, stop] = document.querySelectorAll(".actions button");
      for (let i = 0; i < 30; i += 1) { main.click(); if (i % 3) stop.click(); }
      main.click();
    }""")
    assert finish(page) == completion()
    expect(page.locator(".pane")).to_have_count(1)


def test_generate_several_sequences_each_by_itself(visit: Visit) -> None:
    page = visit(link(n=3))
    press(page, "Generate")
    finish(page)
    texts = page.locator(".text").all_text_contents()
    assert texts[0] == completion(n=3)
    assert len(set(texts)) == 3
    assert page.locator(".end span").all_text_contents() == ["reached the length of 20 tokens"] * 3


def test_examples_fill_the_prompt(visit: Visit) -> None:
    page = visit()
    examples = page.locator("#examples button")
    expect(examples).to_have_count(3)
    examples.nth(1).click()
    expect(page.get_by_label("Prompt")).to_have_value(examples.nth(1).text_content() or "")
    expect(page.get_by_label("Prompt")).to_be_focused()


def test_stop_strings_are_one_a_line(visit: Visit) -> None:
    whole = completion()
    stop = max(whole.removeprefix(PROMPT).split(), key=len)
    page = visit(link(stop=["\n", stop]))
    expect(page.get_by_label("Stop before")).to_have_value(f"\\n\n{stop}")
    press(page, "Generate")
    assert finish(page) == re.split(f"\n|{re.escape(stop)}", whole)[0] != whole
    expect(page.locator(".end span")).to_have_text("ended by the model, or before a stop string")
    assert fragment(page)["stop"] == ["\n", stop]


# --- Parameters and links -----------------------------------------------------------------------


def test_ranges_and_first_values_are_those_of_the_openapi_document(visit: Visit) -> None:
    page = visit()
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    asked = schemas["CompletionRequest"]["properties"]
    native = schemas["GenerateRequest"]["properties"]
    for name in ("temperature", "top_k", "n"):
        bounds = page.locator(f"#{name}").evaluate("field => [field.min, field.max]")
        lowest = max(asked[name]["minimum"], 0)  # -1 is another word for "off"
        assert list(map(float, bounds)) == [lowest, asked[name]["maximum"]]
    expect(page.locator("#max_tokens")).to_have_attribute("max", "200")
    for name in ("temperature", "top_p", "top_k"):
        assert float(page.locator(f"#{name}").input_value()) == native[name]["default"]
    expect(page.locator("#seed")).to_have_attribute("max", str(2**53 - 1))


def test_value_out_of_range_is_named_and_nothing_is_sent(visit: Visit) -> None:
    page = visit(link())
    for name, value, words in (
        ("temperature", "2.5", "Temperature takes a number from 0 up to 2."),
        ("top_p", "-0.1", "Top-p takes a number from 0 up to 1."),
        ("n", "1.5", "Sequences takes a whole number from 1 up to 8."),
        ("max_tokens", "", "Length takes a whole number from 1 up to 200."),
        ("stop_strings", "a\n" * 17, "At most 16 strings to stop before."),
        ("prompt", "", "Write how the text begins."),
    ):
        field = page.locator(f"#{name}")
        before = field.input_value()
        field.fill(value)
        press(page, "Generate")
        expect(page.locator("#problem")).to_have_text(words)
        expect(field).to_be_focused()
        expect(field).to_have_attribute("aria-invalid", "true")
        field.fill(before)
    expect(page.locator(".pane")).to_have_count(0)


def test_sliders_and_numbers_go_together(visit: Visit) -> None:
    page = visit(link())
    slider, field = page.locator("[data-of=temperature]"), page.locator("#temperature")
    slider.focus()
    slider.press("ArrowRight")
    expect(field).to_have_value("1.05")
    field.fill("0.5")
    expect(slider).to_have_value("0.5")
    page.wait_for_url(lambda url: "temperature=0.5" in url)


def test_link_fills_the_form_and_gives_the_same_text(visit: Visit) -> None:
    fields = {"temperature": 0.73, "top_p": 0.81, "top_k": 20, "seed": 2**53 - 1}
    page = visit(link(**fields))
    expect(page.locator(".pane")).to_have_count(0)  # it does not start by itself
    page.keyboard.press("Control+Enter")
    assert finish(page) == completion(**fields)
    assert fragment(page).items() >= {name: [str(value)] for name, value in fields.items()}.items()


def test_link_of_a_result_has_the_seed_that_was_drawn(visit: Visit) -> None:
    page = visit("#prompt=Once+upon+a+time", permissions=["clipboard-read", "clipboard-write"])
    press(page, "Generate")
    text = finish(page)
    seed = fragment(page)["seed"][0]
    expect(page.locator("#result h2")).to_have_text(f"Result, seed {seed}")
    expect(page.locator("#seed")).to_have_value("")
    press(page, "Copy link")
    assert page.evaluate("navigator.clipboard.readText()") == page.url
    page.reload()
    expect(page.locator("#seed")).to_have_value(seed)
    press(page, "Generate")
    assert finish(page) == text


@pytest.mark.parametrize(
    ("garbage", "expected"),
    [
        ("temperature=99&top_p=-1&top_k=1e9&seed=-5", ("2", "0", "8192", "0")),
        ("temperature=abc&top_p=&top_k=NaN&seed=1e999", ("1", "0.9", "50", "")),
        ("temperature=0.3&top_p=0.2&top_k=1.9&seed=9e3&model=no", ("0.3", "0.2", "1", "9000")),
        ("%&%%zz=%ff&&&=&prompt&seed=3&seed=4&n=%00", ("1", "0.9", "50", "3")),
    ],
)  # fmt: skip
def test_link_with_garbage_is_clamped_or_ignored(
    visit: Visit, garbage: str, expected: tuple[str, ...]
) -> None:
    page = visit(f"#max_tokens=3&{garbage}")
    values = [
        page.locator(f"#{name}").input_value() for name in ("temperature", "top_p", "top_k", "seed")
    ]
    assert tuple(values) == expected
    page.locator("#prompt").fill(PROMPT)
    press(page, "Generate")
    finish(page)


def test_link_that_is_pasted_into_the_open_page_is_read(visit: Visit) -> None:
    page = visit(link())
    page.evaluate("location.hash = 'prompt=Deep+in+the+forest&seed=8'")
    expect(page.get_by_label("Prompt")).to_have_value("Deep in the forest")
    expect(page.locator("#seed")).to_have_value("8")


# --- Copying ------------------------------------------------------------------------------------

NASTY = "It's \"5\" $HOME `ls` \\n\n%s 'quoted' 😀 \u2028 end !"


@pytest.fixture
def copied(visit: Visit) -> Callable[[str], str]:
    page = visit(
        link(prompt=NASTY, stop=["'", "\n"], max_tokens=9),
        permissions=["clipboard-read", "clipboard-write"],
    )
    press(page, "Generate")
    finish(page)

    def copy(name: str) -> str:
        press(page, name)
        return page.evaluate("navigator.clipboard.readText()")

    return copy


FIELDS = {
    "model": "gpt2-tales", "prompt": NASTY, "max_tokens": 9, "temperature": 1, "top_p": 0.9,
    "top_k": 50, "n": 1, "seed": 7, "stop": ["'", "\n"],
}  # fmt: skip


def test_copy_as_curl_is_the_request(copied: Callable[[str], str], address: str) -> None:
    """A shell reads it, with a curl that prints what it was given."""
    script = 'curl() { printf "%s\\0" "$@"; }\n' + copied("Copy as curl")
    printed = subprocess.run(["sh", "-c", script], capture_output=True, check=True).stdout
    url, *options = printed.decode().split("\0")[:-1]
    assert url == f"{address}/v1/completions"
    assert options[:3] == ["-H", "Content-Type: application/json", "-d"]
    assert json.loads(options[3]) == FIELDS
    assert httpx.post(url, json=json.loads(options[3])).status_code == 200


def test_copy_as_python_is_the_request(copied: Callable[[str], str]) -> None:
    script, printed = copied("Copy as Python"), []
    exec(script, {"print": printed.append})
    answer = client.post("/v1/completions", json=FIELDS).json()
    assert printed == [answer["choices"][0]["text"]]


def test_copy_takes_prompt_and_text_also_without_the_clipboard_interface(visit: Visit) -> None:
    """A browser has none where the page comes by plain http from another machine."""
    page = visit(link(), permissions=["clipboard-read", "clipboard-write"])
    page.evaluate("() => Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    press(page, "Generate")
    text = finish(page)
    page.locator(".end button").click()
    expect(page.locator(".end button")).to_have_text("Copied")
    page.locator("#prompt").fill("")
    page.keyboard.press("Control+V")
    expect(page.locator("#prompt")).to_have_value(text)


# --- Token view ---------------------------------------------------------------------------------


def test_token_view_shows_probabilities_of_the_same_text(visit: Visit) -> None:
    page = visit(link())
    press(page, "Generate")
    text = finish(page)
    page.get_by_label("Token view").check()
    expect(page.locator(".token")).to_have_count(20)
    finish(page)
    tokens = page.locator(".token").all_text_contents()
    assert PROMPT + "".join(tokens).replace("↵", "") == text
    assert fragment(page)["logprobs"] == ["5"]
    assert sum(page.locator(f".token.p{step}").count() > 0 for step in range(5)) > 2
    page.get_by_label("Token view").uncheck()
    expect(page.locator(".token")).to_have_count(0)
    assert finish(page) == text


def test_token_view_by_mouse(visit: Visit) -> None:
    page = visit(link(logprobs=5))
    press(page, "Generate")
    finish(page)
    detail = page.locator(".detail")
    expect(detail).to_be_hidden()
    page.locator(".token").nth(5).hover()
    expect(detail).to_be_visible()
    shares = [float(s.strip("%")) for s in detail.locator("li span").all_text_contents()]
    assert 5 <= len(shares) <= 6
    assert shares == sorted(shares, reverse=True)
    drawn = (page.locator(".token").nth(5).text_content() or "").replace(" ", "␣")
    expect(detail.locator(".drawn code")).to_have_text(drawn)
    page.locator("#prompt").hover()
    expect(detail).to_be_hidden()


def test_token_view_by_keyboard(visit: Visit) -> None:
    page = visit(link(logprobs=5))
    press(page, "Generate")
    finish(page)
    tokens = page.locator(".token")
    expect(page.locator(".token[tabindex='0']")).to_have_count(1)
    tokens.first.focus()
    expect(page.locator(".detail")).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    expect(page.locator(".token[tabindex='0']")).to_have_count(1)
    page.keyboard.press("End")
    expect(tokens.last).to_be_focused()
    page.keyboard.press("Home")
    expect(tokens.first).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator(".detail")).to_be_hidden()


def test_token_view_by_touch(visit: Visit) -> None:
    page = visit(link(logprobs=5), has_touch=True, viewport={"width": 360, "height": 780})
    press(page, "Generate")
    finish(page)
    for number in (3, 15):
        page.locator(".token").nth(number).tap()
        expect(page.locator(".detail")).to_be_visible()
        box = page.locator(".detail").bounding_box()
        assert box
        assert 0 <= box["x"] <= box["x"] + box["width"] <= 360
    page.locator("#result h2").tap()
    expect(page.locator(".detail")).to_be_hidden()


# --- Text is text -------------------------------------------------------------------------------


def chunk(text: str, tokens: list[str] | None = None, end: str | None = None) -> str:
    top = {"a": -0.1, HTML: -3}
    logprobs = tokens and {
        "tokens": tokens, "token_logprobs": [-1.0] * len(tokens),
        "top_logprobs": [top] * len(tokens), "text_offset": [0] * len(tokens),
    }  # fmt: skip
    choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": end}
    usage = {"completion_tokens": 1, "prompt_tokens": 1, "total_tokens": 2}
    return f"data: {json.dumps({'model': HTML, 'choices': [choice], 'usage': usage})}\n\n"


def answer_with(page: Page, *parts: str) -> None:
    """No model writes HTML on demand, so here the stream is made up."""
    headers = {"Content-Type": "text/event-stream"}
    page.route(
        "**/v1/completions", lambda route: route.fulfill(headers=headers, body="".join(parts))
    )


def test_html_in_prompt_and_text_stays_text(visit: Visit) -> None:
    page = visit(link(prompt=HTML))
    done = chunk("", end="stop") + "data: [DONE]\n\n"
    answer_with(page, ": ping\n\n", chunk(HTML), done)
    press(page, "Generate")
    assert finish(page) == HTML + HTML
    answer_with(page, chunk(HTML, [HTML]), done)
    page.get_by_label("Token view").check()
    expect(page.locator(".token")).to_have_text(HTML)
    page.locator(".token").hover()
    expect(page.locator(".detail li code").last).to_have_text(HTML.replace(" ", "␣"))
    expect(page.locator("#runs button span")).to_have_text(HTML)
    assert page.locator("main img, main script, main b:not(#legend b)").count() == 0


def test_html_in_an_error_in_mid_stream_stays_text(visit: Visit) -> None:
    page = visit(link())
    answer_with(page, chunk(" so far"), f"data: {json.dumps({'error': {'message': HTML}})}\n\n")
    press(page, "Generate")
    assert finish(page) == f"{PROMPT} so far"
    expect(page.locator(".pane .notice small")).to_have_text(HTML)


def test_tokens_that_are_parts_of_a_character_are_shown_together(visit: Visit) -> None:
    page = visit(link(logprobs=5))
    parts = ["bytes:\\xf0\\x9f", "bytes:\\x98", "bytes:\\x80", " a", "bytes:\\xe2", "b"]
    answer_with(
        page,
        chunk("", parts[:2]),
        chunk("😀 a\ufffdb", parts[2:], end="length"),
        "data: [DONE]\n\n",
    )
    press(page, "Generate")
    finish(page)
    assert page.locator(".token").all_text_contents() == ["😀", " a", "\ufffd", "b"]


# --- Errors, in words ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("I hate it", "The prompt has a word that is not allowed here. Change it and try again."),
        ("word " * 600, "This is too long for the model."),
        ("a" * 300_000, "This is too long for the model."),
        ("a" * 1_100_000, "The prompt is too large to send."),
        ("nul \0", "The service did not accept this."),
    ],
    ids=["forbidden", "too long", "far too long", "too large", "nul"],
)  # fmt: skip
def test_error_of_the_prompt(visit: Visit, prompt: str, words: str) -> None:
    page = visit(refused=True)
    expect(page.locator("#seed")).to_be_enabled()
    page.evaluate("text => { document.querySelector('#prompt').value = text }", prompt)
    press(page, "Generate")
    expect(page.locator(".pane .notice")).to_contain_text(words)
    expect(page.locator("#announcer")).to_contain_text(words)
    expect(page.locator(".pane[aria-busy=true]")).to_have_count(0)
    expect(page.locator("#runs li")).to_have_count(0)


def test_error_busy_counts_down_and_tries_again(
    visit: Visit, slow: None, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main.engine.scheduler, "max_num_seqs", 1)
    monkeypatch.setattr(main.engine.scheduler, "max_queue_size", 1)
    page = visit(link(max_tokens=5), refused=True)
    hog = {"prompt": PROMPT, "n": 2, "max_tokens": 400, "ignore_eos": True, "stream": True}
    notice = page.locator(".pane .notice")
    with stream(address, hog, "/v1/completions"):
        press(page, "Generate")
        expect(notice).to_contain_text("The service is busy: too many requests are waiting.")
        expect(notice).to_contain_text(re.compile(r"Trying again in \d+ s\."))
        press(page, "Cancel")
        expect(notice).to_have_text("Cancelled. Generate tries again.")
        press(page, "Generate")
        expect(notice).to_contain_text("Trying again")
    assert finish(page) == completion(max_tokens=5)
    expect(notice).to_be_hidden()


def test_error_rate_limit_says_how_long(visit: Visit) -> None:
    with serve_in_thread(guarded({}, rate_limit=3)) as address:  # two of them to be set up
        page = visit(link(max_tokens=3), at=address, refused=True)
        expect(page.locator("#seed")).to_be_enabled()
        press(page, "Generate")
        finish(page)
        press(page, "Generate")
        notice = page.locator(".pane .notice")
        expect(notice).to_contain_text("You have reached your limit for this minute.")
        expect(notice).to_contain_text("Over the limit of 3 requests a minute")
        expect(notice).to_contain_text(re.compile(r"Trying again in \d+ s\."))
        press(page, "Stop")
        expect(notice).to_have_text("Cancelled. Generate tries again.")


def test_error_key_is_asked_for_and_kept_in_the_tab_alone(visit: Visit) -> None:
    with serve_in_thread(guarded({key_digest("open-sesame"): "alice"})) as address:
        permissions = ["clipboard-read", "clipboard-write"]
        page = visit(link(), at=address, refused=True, permissions=permissions)
        expect(page.locator("#problem")).to_contain_text("This service needs an API key.")
        expect(page.locator("#live")).to_be_hidden()
        for key, words in (
            ("wörter", "A key has letters"),
            ("wrong", "does not know this API key"),
        ):
            expect(page.locator("#key")).to_be_focused()
            page.locator("#key").fill(key)
            page.keyboard.press("Enter")
            expect(page.locator("#problem")).to_contain_text(words)
        page.locator("#key").fill("open-sesame")
        press(page, "Use key")
        expect(page.locator("#seed")).to_be_enabled()
        expect(page.locator("#problem")).to_be_hidden()
        expect(page.locator("#live")).to_be_visible()
        press(page, "Generate")
        assert finish(page) == completion()
        for name, wanted in (("curl", "Bearer $API_KEY"), ("Python", 'os.environ["API_KEY"]')):
            press(page, f"Copy as {name}")
            code = page.evaluate("navigator.clipboard.readText()")
            assert wanted in code
            assert "open-sesame" not in code
        assert "open-sesame" not in page.url
        kept = page.evaluate("[{...localStorage}, document.cookie, sessionStorage.getItem('key')]")
        assert kept == [{}, "", "open-sesame"]
        press(page, "Forget key")
        assert page.evaluate("sessionStorage.getItem('key')") is None


def test_error_stopping_waits_for_what_comes_next(
    visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = visit(link(), refused=True)
    expect(page.locator("#seed")).to_be_enabled()
    monkeypatch.setattr(main.service.shutdown, "has_begun", True)
    press(page, "Generate")
    expect(page.locator(".pane .notice")).to_contain_text("stopping and takes no new work")
    page.reload()
    expect(page.locator("#problem")).to_contain_text("The service is stopping")
    monkeypatch.setattr(main.service.shutdown, "has_begun", False)
    expect(page.locator("#seed")).to_be_enabled()
    expect(page.locator("#problem")).to_be_hidden()


def test_error_timeout_keeps_the_text(
    visit: Visit, slow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main.registry.default, "request_timeout_seconds", 0.5)
    page = visit(link(max_tokens=200))
    press(page, "Generate")
    notice = page.locator(".pane .notice")
    expect(notice).to_contain_text("The text broke off here.")
    expect(notice).to_contain_text("The request took longer than 0.5 seconds")
    assert len(finish(page)) > len(PROMPT)
    expect(page.locator(".end span")).to_have_text("broken off")


def test_error_of_the_model_in_mid_stream_keeps_the_text(
    visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, steps = main.engine.model.forward, iter(range(9))

    def fail_later(*args: Any, **kwargs: Any) -> Any:
        if next(steps, None) is None:
            raise RuntimeError("injected")
        return forward(*args, **kwargs)

    page = visit(link())
    monkeypatch.setattr(main.engine.model, "forward", fail_later)
    press(page, "Generate")
    expect(page.locator(".pane .notice")).to_contain_text("Model inference failed")
    assert len(finish(page)) > len(PROMPT)


# --- Compare, and a service that goes -----------------------------------------------------------


def test_compare_shows_models_side_by_side(visit: Visit, two_models: Served) -> None:
    page = visit(at=two_models.address, viewport={"width": 1440, "height": 900})
    expect(page.locator("#models input")).to_have_count(2)
    page.get_by_label("second-tales").check()
    page.get_by_label("Prompt").fill(PROMPT)
    press(page, "Generate")
    finish(page)
    assert page.locator(".pane h3").all_text_contents() == ["gpt2-tales", "second-tales"]
    first, second = (pane.bounding_box() for pane in page.locator(".pane").all())
    assert first
    assert second
    assert first["y"] == second["y"]
    assert first["x"] + first["width"] < second["x"]
    texts = page.locator(".text").all_text_contents()
    assert texts[0] == texts[1]  # the same weights and the same seed
    assert fragment(page)["model"] == ["gpt2-tales", "second-tales"]
    page.reload()
    expect(page.locator("#models input:checked")).to_have_count(2)


def test_compare_eight_sequences_of_each_fit(visit: Visit, two_models: Served) -> None:
    both = ["gpt2-tales", "second-tales"]
    page = visit(link(n=8, max_tokens=20, prompt="long " * 80, logprobs=5, model=both),
                 at=two_models.address, viewport={"width": 360, "height": 780})  # fmt: skip
    press(page, "Generate")
    finish(page)
    expect(page.locator(".text")).to_have_count(16)
    assert not is_wider_than_the_window(page)
    page.locator("#runs button").click()
    expect(page.locator(".text")).to_have_count(16)


def test_compare_announces_text_and_problem(visit: Visit, two_models: Served) -> None:
    """The one drowned the other."""
    both = ["gpt2-tales", "second-tales"]
    page = visit(link(max_tokens=3, model=both), at=two_models.address, refused=True)
    expect(page.locator("#models input:checked")).to_have_count(2)

    def refuse_one(route: Any) -> None:
        if route.request.post_data_json["model"] == both[1]:
            route.fulfill(status=413, json={})
        else:
            route.continue_()

    page.route("**/v1/completions", refuse_one)
    press(page, "Generate")
    expect(page.locator("#announcer")).to_have_text(
        "gpt2-tales: 3 tokens, reached the length of 3 tokens. "
        "second-tales: The prompt is too large to send. Shorten it."
    )


def test_error_gone_in_mid_stream_keeps_the_text_and_says_when_it_is_back(
    visit: Visit, two_models: Served
) -> None:
    """The last one of that process, which others keep busy: the text is to take its time."""
    page = visit(link(max_tokens=200, n=8), at=two_models.address, refused=True)
    expect(page.locator("#seed")).to_be_enabled()
    others = {"prompt": PROMPT, "max_tokens": 400, "n": 8, "ignore_eos": True, "stream": True}
    with ExitStack() as streams:
        http = streams.enter_context(two_models.client())
        for _ in range(6):
            streams.enter_context(http.stream("POST", "/v1/completions", json=others))
        press(page, "Generate")
        expect(page.locator(".text").first).to_contain_text(re.compile(f"{PROMPT} ?[a-z,]"))
        two_models.process.kill()
    notice = page.locator(".pane .notice")
    expect(notice).to_contain_text("The service does not answer")
    assert len(finish(page)) > len(PROMPT)
    with serve_in_thread(main.app, int(two_models.address.rpartition(":")[2])):
        expect(notice).to_have_text("The service is back. Generate again.")
        page.locator("#max_tokens").fill("5")
        press(page, "Generate")
        expect(page.locator(".end span").first).to_have_text("reached the length of 5 tokens")


# --- Keys, another origin, and a proxy that strips `/svc` ----------------------------------------

KEY = "open-sesame"


class Keyed(NamedTuple):
    address: str
    origin: str  # of pages that may call it


@pytest.fixture(scope="module")
def keyed() -> Iterator[Keyed]:
    """A service with a key, behind a prefix, for the pages of another origin."""
    with (
        serve_in_thread(HTMLResponse("<!doctype html>")) as origin,
        served("--root-path", "/svc", API_KEYS=KEY, CORS_ORIGINS=origin) as service,
    ):
        yield Keyed(service.address, origin)


@pytest.fixture
def proxied(browser: Browser) -> Iterator[Page]:
    """A tab whose requests for `/svc/…` go to `/…`, as through a proxy that strips that."""
    with browser.new_context() as context:
        context.set_default_timeout(30_000)
        context.route(
            "**/svc/**",
            lambda route: route.continue_(url=route.request.url.replace("/svc/", "/", 1)),
        )
        yield context.new_page()


# What the npm package `openai` 6 sends from a browser, and what it is told to send besides.
OPENAI_HEADERS = {
    "accept": "application/json", "authorization": f"Bearer {KEY}",
    "content-type": "application/json", "x-stainless-arch": "unknown", "x-stainless-lang": "js",
    "x-stainless-os": "Unknown", "x-stainless-package-version": "6.49.0",
    "x-stainless-retry-count": "0", "x-stainless-runtime": "browser:chrome",
    "x-stainless-runtime-version": "140.0.0", "x-stainless-timeout": "600",
    "openai-beta": "assistants=v2", "openai-organization": "org", "traceparent": "00-1-2-01",
}  # fmt: skip

COMPLETE = """async ([address, headers, body]) => {
  const options = {method: "POST", headers, body: JSON.stringify(body)};
  const answer = await fetch(`${address}/v1/completions`, options);
  return [answer.status, await answer.json(), answer.headers.get("X-Request-ID")];
}"""


def test_page_of_another_origin_may_send_whatever_headers(keyed: Keyed, proxied: Page) -> None:
    """OpenAI's JavaScript client was blocked in every browser: only some headers were allowed."""
    body = {"prompt": PROMPT, "max_tokens": 3, "seed": 7}
    asked = [keyed.address, OPENAI_HEADERS, body]
    proxied.goto(keyed.origin)
    status, answer, request_id = proxied.evaluate(COMPLETE, asked)
    assert (status, answer["usage"]["completion_tokens"]) == (200, 3)
    assert re.fullmatch("[0-9a-f]{32}", request_id)
    with serve_in_thread(HTMLResponse("<!doctype html>")) as elsewhere:
        proxied.goto(elsewhere)
        with pytest.raises(PlaywrightError, match="Failed to fetch"):
            proxied.evaluate(COMPLETE, asked)


def test_docs_authorize_and_try_out_with_a_key(keyed: Keyed, proxied: Page) -> None:
    """The document had no security schemes, so Swagger could ask for nothing but 401s."""
    proxied.goto(f"{keyed.address}/svc/docs")
    operation = proxied.locator("#operations-openai-create_completion")
    operation.locator(".opblock-summary-control").click()
    operation.get_by_role("button", name="Try it out").click()
    for status in ("401", "200"):
        if status == "200":
            proxied.locator(".scheme-container .authorize").click()
            proxied.get_by_label("auth-bearer-value").fill(KEY)
            proxied.get_by_label("Apply credentials").first.click()
            proxied.get_by_role("button", name="Close", exact=True).first.click()
        operation.locator(".execute").click()
        answered = operation.locator(".live-responses-table .response-col_status")
        expect(answered.last).to_have_text(re.compile(status))
    expect(operation.locator(".live-responses-table")).to_contain_text('"text_completion"')


def test_docs_try_out_every_operation_as_it_is_filled_in(proxied: Page) -> None:
    """Swagger does not fill in the examples within a parameter's schema: `prompt` was empty."""
    with serve_in_thread(main.app) as address:
        document = httpx.get(f"{address}/openapi.json").json()
        described = [each for methods in document["paths"].values() for each in methods.values()]
        proxied.goto(f"{address}/docs")
        expect(proxied.locator(".opblock")).to_have_count(len(described))
        for button in (".opblock-summary-control", ".try-out__btn", ".execute"):
            expect(proxied.locator(button)).to_have_count(len(described))
            script = "all => document.querySelectorAll(all).forEach(each => each.click())"
            proxied.evaluate(script, button)
        for each in described:
            block = proxied.locator(f"#operations-{each['tags'][0]}-{each['operationId']}")
            answered = block.locator(".live-responses-table tbody .response-col_status")
            status = "400" if NO_CHAT in each["description"] else "200"
            if each["tags"] == ["media"]:
                status = "404"  # no model of sounds or pictures is set here
            expect(answered).to_contain_text(status)


@pytest.mark.parametrize("has_key", [False, True])
def test_prefix_of_a_proxy_is_kept_by_page_docs_and_errors(
    has_key: bool, proxied: Page, request: pytest.FixtureRequest
) -> None:
    """Under `--root-path`, probes and page needed a key, and `/v1` had errors of native routes."""
    with ExitStack() as stack:
        if has_key:
            address = request.getfixturevalue("keyed").address
        else:
            address = stack.enter_context(serve_in_thread(main.app, root_path="/svc"))
        proxied.goto(f"{address}/svc/{link(max_tokens=3)}")
        if has_key:
            proxied.locator("#key").fill(KEY)
            press(proxied, "Use key")
        expect(proxied.locator("#seed")).to_be_enabled()
        press(proxied, "Generate")
        assert finish(proxied) == completion(max_tokens=3)
        proxied.get_by_role("link", name="API").click()
        expect(proxied.locator("#operations-openai-create_completion")).to_be_visible()
        assert proxied.url == f"{address}/svc/docs"
        headers = {"Authorization": f"Bearer {KEY}"}
        wrong = httpx.post(f"{address}/v1/completions", json={"prompt": 1.5}, headers=headers)
        assert (wrong.status_code, set(wrong.json())) == (400, {"error"})
        refused = httpx.get(f"{address}/v1/models")
        assert refused.status_code == (401 if has_key else 200)
        assert set(refused.json()) == ({"error"} if has_key else {"object", "data"})
        assert httpx.get(f"{address}/livez").json() == {"health": "ok"}


# --- For everybody ------------------------------------------------------------------------------


def is_wider_than_the_window(page: Page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth > innerWidth")


def test_keyboard_alone_is_enough(visit: Visit) -> None:
    """From the top by Tab: every stop has a name and a visible focus."""
    page = visit()
    stops = []
    while True:
        page.keyboard.press("Tab")
        focused = page.evaluate("""() => {
          const e = document.activeElement;
          if (e === document.body) return null;
          const name = e.ariaLabel ?? e.labels?.[0]?.textContent ?? e.textContent;
          return [e.id || name, name.trim(), getComputedStyle(e).outlineStyle];
        }""")
        if focused is None or focused[0] in {stop[0] for stop in stops}:
            break
        stops.append(focused)
    assert all(name and outline != "none" for _, name, outline in stops), stops
    order = [id_ for id_, *_ in stops]
    wanted = ["prompt", "stop", "logprobs", "max_tokens", "temperature", "seed", "dice"]
    assert [each for each in order if each in wanted] == wanted
    page.locator("#prompt").focus()
    page.keyboard.type(PROMPT)
    page.keyboard.press("Control+Enter")
    finish(page)
    expect(page.locator("#prompt")).to_be_focused()


WORD = "Donaudampfschifffahrt" * 12
RTL = "היה היה פעם מלך 😀"


@pytest.mark.parametrize("prompt", [WORD, RTL], ids=["long word", "right to left"])
def test_narrow_window_needs_no_sideways_scrolling(visit: Visit, prompt: str) -> None:
    """360 px; also what 720 px are at a zoom of 200 %."""
    page = visit(link(prompt=prompt, n=2), viewport={"width": 360, "height": 780})
    press(page, "Generate")
    finish(page)
    assert not is_wider_than_the_window(page)
    if prompt == RTL:
        right = "e => e.getBoundingClientRect().right"
        texts, prompts = (page.locator(name).first for name in (".text", ".given"))
        assert texts.evaluate(right) - prompts.evaluate(right) < 2


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1440, "light")])
def test_accessibility_check_finds_nothing(visit: Visit, width: int, scheme: Any) -> None:
    """axe, with everything open at once: a problem, the key's field, tokens and a detail."""
    page = visit(
        link(logprobs=5, n=2),
        viewport={"width": width, "height": 900},
        color_scheme=scheme,
    )
    assert Axe().run(page).violations_count == 0
    press(page, "Generate")
    finish(page)
    page.locator("#top_p").fill("7")
    press(page, "Generate")
    page.evaluate("document.querySelector('#key-field').hidden = false")
    page.locator(".token").nth(5).focus()
    expect(page.locator(".detail").first).to_be_visible()
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"dark": "rgb(21, 24, 27)", "light": "rgb(250, 249, 246)"}[scheme]


def test_reduced_motion_stills_the_caret(visit: Visit, slow: None) -> None:
    for motion, name in (("reduce", "none"), ("no-preference", "blink")):
        page = visit(link(max_tokens=200), reduced_motion=motion)
        press(page, "Generate")
        expect(page.locator(".text")).to_contain_text(re.compile(f"{PROMPT} ?[a-z,]"))
        caret = page.locator(".caret")
        assert caret.evaluate("e => getComputedStyle(e).animationName") == name


def test_first_paint_needs_nothing_but_the_document(visit: Visit) -> None:
    page = visit(java_script_enabled=False)
    expect(page.get_by_label("Prompt")).to_be_visible()
    background = page.locator(".main").evaluate("e => getComputedStyle(e).backgroundColor")
    assert background == "rgb(20, 96, 107)"


# --- History, and the service now ---------------------------------------------------------------


def test_history_brings_back_and_is_cleared(visit: Visit) -> None:
    page = visit(link())
    press(page, "Generate")
    text = finish(page)
    page.locator("#prompt").fill("Deep in the forest")
    page.locator("#temperature").fill("0.4")
    press(page, "Generate")
    expect(page.locator("#runs li")).to_have_count(2)
    page.reload()  # it is the tab's
    expect(page.locator("#seed")).to_be_enabled()
    page.locator("#runs button").last.click()
    assert finish(page) == text
    expect(page.locator("#prompt")).to_have_value(PROMPT)
    expect(page.locator("#temperature")).to_have_value("1")
    press(page, "Clear history")
    expect(page.locator("#runs li")).to_have_count(0)
    assert page.evaluate("sessionStorage.runs") == "[]"


def test_live_panel_follows_the_service(visit: Visit, slow: None, address: str) -> None:
    page = visit()
    expect(page.locator("#running")).to_have_text("0")
    hog = {"prompt": PROMPT, "n": 3, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with stream(address, hog, "/v1/completions"):
        expect(page.locator("#running")).to_have_text("3")
        expect(page.locator("#rate")).not_to_have_text("0")
    expect(page.locator("#running")).to_have_text("0")
    points = page.locator("#spark polyline").get_attribute("points") or ""
    assert len(points.split()) >= 2


# --- Mended: what the page once did -------------------------------------------------------------


def test_address_keeps_the_seed_that_was_drawn(visit: Visit) -> None:
    """A change just before Generate wrote the form's address, without a seed, over the run's."""
    page = visit("#max_tokens=3")
    page.locator("#prompt").fill(PROMPT)
    page.keyboard.press("Control+Enter")
    finish(page)
    page.wait_for_timeout(700)
    assert "seed" in fragment(page)
    page.get_by_label("Token view").check()
    finish(page)
    page.get_by_label("Token view").uncheck()
    page.wait_for_timeout(700)
    assert "seed" in fragment(page)
    assert "logprobs" not in fragment(page)


def test_live_panel_survives_a_failure(visit: Visit) -> None:
    """One 502 from a proxy ended the panel for good."""
    page = visit(refused=True)
    expect(page.locator("#live")).to_be_visible()
    page.route("**/metrics", lambda route: route.fulfill(status=502, body="<h1>Bad Gateway</h1>"))
    expect(page.locator("#live")).to_be_hidden()
    page.unroute("**/metrics")
    expect(page.locator("#live")).to_be_visible()


def test_error_of_a_proxy_is_a_service_that_is_gone(visit: Visit) -> None:
    """A 504 in HTML said to ask for less length."""
    page = visit(link(), refused=True)
    page.route("**/v1/completions", lambda route: route.fulfill(status=504, body="<h1>no</h1>"))
    press(page, "Generate")
    notice = page.locator(".pane .notice")
    expect(page.locator("#announcer")).to_contain_text("The service does not answer")
    expect(notice).to_have_text("The service is back. Generate again.")


def test_second_link_keeps_nothing_of_the_first(visit: Visit) -> None:
    """Fields that the second one lacks kept the values of the first."""
    page = visit(link(temperature=0.3, stop="\n", logprobs=5))
    page.evaluate("location.hash = 'prompt=Deep&max_tokens=9'")
    expect(page.get_by_label("Prompt")).to_have_value("Deep")
    values = [page.locator(f"#{name}").input_value() for name in ("temperature", "seed")]
    assert values == ["1", ""]
    expect(page.locator("#max_tokens")).to_have_value("9")
    expect(page.locator("#stop_strings")).to_have_value("")
    expect(page.get_by_label("Token view")).not_to_be_checked()


def test_error_key_that_was_lacking_in_mid_session(visit: Visit) -> None:
    """Its entry set the form back, and the old notice stayed."""
    page = visit(link(), refused=True)
    expect(page.locator("#seed")).to_be_enabled()
    page.locator("#max_tokens").fill("4")
    page.route("**/v1/completions", lambda route: route.fulfill(status=401, json={}))
    press(page, "Generate")
    expect(page.locator(".pane .notice")).to_contain_text("needs an API key")
    page.unroute("**/v1/completions")
    page.evaluate("""() => new MutationObserver(([{target}]) => {
      window.said = `${window.said ?? ""}|${target.textContent}`;
    }).observe(document.querySelector("#announcer"), {childList: true})""")
    page.locator("#key").fill("any")
    page.keyboard.press("Enter")
    assert finish(page) == completion(max_tokens=4)
    expect(page.locator(".pane .notice")).to_be_hidden()
    expect(page.locator("#max_tokens")).to_have_value("4")
    assert "|The key is accepted. Generating." in page.evaluate("said")


def test_address_of_a_long_prompt_keeps_the_parameters(visit: Visit) -> None:
    """It was empty."""
    page = visit(link(temperature=0.3))
    page.locator("#prompt").fill("a" * 33_000)
    page.wait_for_url(lambda url: "prompt" not in url)
    assert fragment(page)["temperature"] == ["0.3"]


def test_keys_held_down_ask_once(visit: Visit) -> None:
    """Each repetition of Ctrl+Enter began a run."""
    page = visit(link(max_tokens=3))
    asked = []
    page.on("request", lambda request: asked.append(request.url.endswith("completions")))
    page.keyboard.down("Control")
    for _ in range(3):
        page.keyboard.down("Enter")
    page.keyboard.up("Enter")
    page.keyboard.up("Control")
    finish(page)
    assert sum(asked) == 1


@pytest.mark.parametrize("runs", ["{", "null", '{"a": 1}', '[null, {"fields": {}}, {"fields": 3}]'])
def test_history_that_cannot_be_read_is_dropped(visit: Visit, runs: str) -> None:
    """It stopped the page's script."""
    page = visit()
    page.evaluate("runs => { sessionStorage.runs = runs }", runs)
    page.reload()
    expect(page.locator("#seed")).to_be_enabled()
    expect(page.locator("#no-runs")).to_be_visible()


def test_event_that_is_no_json_is_told(visit: Visit) -> None:
    """Stop stayed lit and nothing was said."""
    page = visit(link())
    answer_with(page, chunk(" so far"), "data: {oops\n\n")
    press(page, "Generate")
    expect(page.locator(".pane .notice")).to_contain_text("The answer came garbled")
    expect(page.locator("#stop")).to_have_attribute("aria-disabled", "true")


def test_error_with_a_list_of_details_names_the_first(visit: Visit) -> None:
    """It said the status alone; and there was a Copy of no text."""
    page = visit(link(), refused=True)
    expect(page.locator("#seed")).to_be_enabled()
    detail = [{"loc": ["body", "top_k"], "msg": "Input should be smaller"}]
    page.route(
        "**/v1/completions", lambda route: route.fulfill(status=422, json={"detail": detail})
    )
    press(page, "Generate")
    expect(page.locator(".pane .notice small")).to_have_text("top_k: Input should be smaller")
    expect(page.locator(".end button")).to_be_hidden()


def test_token_detail_is_out_of_the_way(visit: Visit) -> None:
    """It covered the next line; Escape worked in the text alone, and Enter opened nothing."""
    page = visit(link(logprobs=5))
    press(page, "Generate")
    finish(page)
    detail, tokens = page.locator(".detail"), page.locator(".token")
    tokens.first.hover()
    expect(detail).to_be_visible()
    assert detail.evaluate("e => getComputedStyle(e).pointerEvents") == "none"
    page.locator("#prompt").focus()
    page.keyboard.press("Escape")
    expect(detail).to_be_hidden()
    tokens.nth(1).focus()
    for key in ("Enter", "Space"):
        page.keyboard.press("Escape")
        expect(detail).to_be_hidden()
        page.keyboard.press(key)
        expect(detail).to_be_visible()


def test_cancel_leaves_the_focus_to_generate(visit: Visit) -> None:
    """It went with the button."""
    page = visit(link(), refused=True)
    expect(page.locator("#seed")).to_be_enabled()
    page.route("**/v1/completions", lambda route: route.fulfill(status=429, json={}))
    press(page, "Generate")
    page.get_by_role("button", name="Cancel").press("Enter")
    expect(page.locator("button.main")).to_be_focused()


def test_history_asks_again_for_tokens(visit: Visit) -> None:
    """After a reload an entry had none, with the token view on."""
    page = visit(link(logprobs=5, max_tokens=4))
    press(page, "Generate")
    finish(page)
    page.reload()
    expect(page.locator("#runs small")).to_contain_text("length 4 · 1 sequence")
    expect(page.locator("#seed")).to_be_enabled()
    page.locator("#runs button").click()
    expect(page.locator(".token")).to_have_count(4)


def test_token_view_shows_the_text_and_nothing_else(visit: Visit) -> None:
    """It showed a token of the end, which is no text, and left out what no token covers."""
    page = visit(link(logprobs=5))
    tokens = [" a", "<|endoftext|>"]
    answer_with(page, chunk("", tokens), chunk(" a end", end="stop"), "data: [DONE]\n\n")
    press(page, "Generate")
    assert finish(page) == f"{PROMPT} a end"
    expect(page.locator(".token")).to_have_text(" a")
