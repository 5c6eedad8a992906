"""Text of another server is held back while a forbidden word may have begun in it."""

import pytest

from backends.held_text import HeldText
from serving.content_filter import ContentFilter


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_choice_never_gives_out_what_may_become_forbidden(size: int) -> None:
    text = "He has a hat, a h.a.t, he will hate you"
    choice, given = HeldText(True, ContentFilter("hate*").read("Once h")), ""
    for start in range(0, len(text), size):
        gained = choice.add(text[start : start + size], None, None)
        given += gained[0] if gained else ""
        if choice.finish_reason:
            break
    assert (given, choice.finish_reason) == ("He has a hat, a h.a.t, he will ", "content_filter")


def test_choice_sees_a_word_that_begins_in_a_long_prompt() -> None:
    choice = HeldText(True, ContentFilter("hate*").read("a king " * 1000 + "did ha"))
    assert choice.add("t", None, None) is None
    assert choice.add("ed", None, None) == ("", None)
    assert choice.finish_reason == "content_filter"
    long = HeldText(True, ContentFilter("hate*").read(""))
    assert "".join(g[0] for _ in range(1000) if (g := long.add("a king ", None, None)))
    assert long.reading
    assert len(long.reading.characters) < 50


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("text", "given", "reason"),
    [
        ("He has a hat. She has none", "He has a hat", "stop"),
        ("He has a hat, she", "He has a hat, she", "length"),
        ("He has hate. She", "He has ", "content_filter"),
        ("He has a ha. Sted", "He has a ha", "stop"),
    ],
)
def test_choice_ends_before_a_stop_string(size: int, text: str, given: str, reason: str) -> None:
    choice = HeldText(True, ContentFilter("hate*").read("Once "), [". S", "never"])
    gained = ""
    for start in range(0, len(text), size):
        is_last = start + size >= len(text)
        part = choice.add(text[start : start + size], None, "length" if is_last else None)
        gained += part[0] if part else ""
        assert text.startswith(gained)
        if choice.finish_reason:
            break
    assert (gained, choice.finish_reason) == (given, reason)
