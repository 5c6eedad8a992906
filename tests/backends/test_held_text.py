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
