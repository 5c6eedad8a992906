"""The page for sounds, pictures, videos and shapes, in a real Chromium."""

import os
import shutil
from collections.abc import Iterator

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect, sync_playwright

from tests.support import Served, wait_until

pytestmark = [pytest.mark.media, pytest.mark.filterwarnings("ignore")]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
FLAGS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]


@pytest.fixture(scope="module")
def page(service: Served) -> Iterator[Page]:
    """One that has been given the key; its console holds no complaint in the end."""
    if not CHROMIUM and os.environ.get("CI") != "true":
        pytest.skip("no Chromium")
    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_context().new_page()
        page.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"{service.address}/static/media.html")
        page.fill("#key", "secret")
        page.press("#key", "Enter")
        expect(page.locator("#steps, #seconds")).to_be_enabled()
        yield page
        browser.close()
    assert complaints == []


def ask(page: Page, kind: str, **fields: str) -> None:
    # From here the tab's link always leads elsewhere; then the form is made anew, some time later.
    page.evaluate("history.replaceState(null, '', 'static/media.html')")
    page.evaluate("document.querySelector('#result').replaceChildren()")
    page.click(f"#tab-{kind}")
    expect(page.locator("#result")).to_have_text("The result appears here.")
    for name, value in {"prompt": "a fox", "seed": "7", **fields}.items():
        page.fill(f"#{name}", value)
    page.keyboard.press("Control+Enter")


def test_page_for_text_has_a_tab_for_each_kind(page: Page, service: Served) -> None:
    text = page.context.new_page()
    text.goto(f"{service.address}/")
    tabs = text.locator("nav[aria-label=Kinds] a").all_inner_texts()
    text.close()
    assert tabs == ["Text", "Sound", "Picture", "Video", "Shape"]


def test_page_shows_a_picture_to_take_along_and_its_link(page: Page) -> None:
    ask(page, "image", steps="3")
    expect(page.locator("#result h2")).to_have_text("image, seed 7")
    assert page.evaluate("document.querySelector('#result img').naturalWidth") == 64
    assert page.get_attribute("#result a[download]", "download") == "image-7.png"
    assert page.url.endswith("/static/media.html#image?prompt=a+fox&seed=7&steps=3")
    assert Axe().run(page).violations_count == 0


@pytest.mark.parametrize(
    ("kind", "fields", "shown"),
    [
        ("audio", {"seconds": "0.3"}, "audio[controls]"),
        ("video", {"steps": "2", "num_frames": "4"}, "video[controls]"),
        ("3d", {"steps": "2", "grid_size": "16"}, "canvas"),
    ],
)
def test_page_shows_what_came_of_it(
    page: Page, kind: str, fields: dict[str, str], shown: str
) -> None:
    ask(page, kind, **fields)
    expect(page.locator(f"#result {shown}")).to_be_visible()
    if kind != "3d":  # it can be played
        wait_until(lambda: page.evaluate(f"document.querySelector('#result {shown}').duration > 0"))


def test_page_tells_what_is_wrong_with_a_field(page: Page) -> None:
    ask(page, "image", steps="3", size="65x64")
    expect(page.locator("#problem")).to_contain_text("size: this model takes multiples of 2")
    ask(page, "image", steps="500", size="")
    expect(page.locator("#steps")).to_have_attribute("aria-invalid", "true")


def test_page_stops_what_is_under_way(page: Page) -> None:
    ask(page, "image", steps="150", size="160x160")
    expect(page.locator("#result progress")).to_have_attribute("max", "150")
    page.click("#stop")
    expect(page.locator("#result")).to_have_text("Stopped.")
