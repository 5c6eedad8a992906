"""A text that is read while it is written: nothing leaks, and each character costs the same."""

import random
import time

import pytest

from serving.content_filter import ContentFilter
from tests.filter_texts import HITS, PASSES

DEFAULT = ContentFilter("hate*,violence")

SAFE = [("the dog ", 8), ("the dog", 7), ("xh", 2), ("what", 4), ("ha, ", 4), ("w h a", 5)]
SAFE += [
    ("hat e", 5),
    ("I ha", 2),
    ("h. a. t", 0),
    ("no violence", 3),
    ("oh h a t e", 3),
    ("v!", 0),
]


@pytest.mark.parametrize(("text", "safe"), SAFE)
def test_safe_length_holds_back_what_may_become_a_word(text: str, safe: int) -> None:
    assert DEFAULT.read(text).scan()[1] == safe


@pytest.mark.parametrize(
    ("text", "more"), [("violence", "s"), ("h a t e", "el"), ("v i o l e n c e", " s ")]
)
def test_end_of_text_is_not_yet_the_end_of_a_word(text: str, more: str) -> None:
    assert DEFAULT.find(text, final=False) is None
    assert DEFAULT.find(text) is not None
    assert DEFAULT.find(text + more) is None
    assert DEFAULT.find(text + " and then", final=False) is not None


def assert_no_leak(content_filter: ContentFilter, text: str) -> None:
    """Read one character at a time, forgetting what is safe, as if it was all read at once."""
    reading, shown, hit = content_filter.read(""), 0, None
    for end in range(len(text) + 1):
        reading.append(text[end - 1 : end])
        hit, safe = reading.scan()
        assert hit == content_filter.find(text[:end], final=False)
        if hit:
            break
        assert shown <= safe <= end
        assert safe == content_filter.read(text[:end]).scan()[1]
        shown = safe
        reading.forget(safe)
    final = content_filter.find(text)
    assert (final is None) == ((hit or reading.scan(final=True)[0]) is None)
    assert all(span[0] >= shown for span in (hit, final) if span), (text, shown, hit, final)


@pytest.mark.parametrize("text", HITS + PASSES)
def test_stream_never_leaks(text: str) -> None:
    assert_no_leak(DEFAULT, text)


@pytest.mark.parametrize("words", ["hate*,violence", "hi,ill,kkk*,88,a-e*", "vi*,violet,h4h"])
def test_random_stream_never_leaks(words: str) -> None:
    rng, content_filter = random.Random(words), ContentFilter(words)
    pieces = [*"hatevilnck 4.-18I", "\u200b", "\u0301", "\u0435", "\ufb01", "🇭", "hate", "h.a.t.e"]
    pieces += ["violence", "v i o l e n c e", "ill", "88", "k k k"]
    for _ in range(800):
        assert_no_leak(content_filter, "".join(rng.choices(pieces, k=rng.randint(1, 14))))


@pytest.mark.parametrize("end", range(9))
def test_scan_up_to_an_earlier_end_is_as_if_no_more_was_read(end: int) -> None:
    text = "I h.a.t me, he ha"
    reading = DEFAULT.read(text[:end])
    expected = reading.scan()
    reading.append(text[end:])
    assert reading.scan(end) == expected


def test_copy_is_read_on_by_itself() -> None:
    reading = DEFAULT.read("so ha")
    other = reading.copy()
    other.append("ted")
    assert other.scan() == ((3, 7), 3)
    assert reading.scan() == (None, 3)
    reading.append("t off")
    assert reading.scan(final=True) == (None, 10)


def test_forgotten_text_still_shields_what_follows() -> None:
    reading = DEFAULT.read("w")
    for character in " h a t e v e r":
        reading.append(character)
        hit, safe = reading.scan()
        assert hit is None
        reading.forget(safe)
    assert len(reading.characters) < 20


PIECES = ["h", "ha", "h.", "h a t h a t ", "i h ", "h! ", "\u200b", "\u0301", "1", "12", "4@", " "]
PIECES += [
    "viiioooleeen ",
    "v i o l e n c ",
    "i1|!I ",
    "😀",
    "🇭",
    "The quick brown fox had a hat. ",
]
STEMS = ["hat", "vio", "ill", "kill", "ha", "has", "vil", "int", "the", "qui"]
FIFTY = ",".join(stem + end for stem in STEMS for end in ("ed*", "lence", "ler", "k", "ing*"))


@pytest.mark.parametrize("words", ["hate*,violence", FIFTY], ids=["two", "fifty"])
@pytest.mark.parametrize("piece", PIECES)
def test_time_is_linear(piece: str, words: str) -> None:
    """200,000 characters take about a second; a quadratic scan would take many minutes."""
    content_filter, text = ContentFilter(words), (piece * 200_000)[:200_000]
    start = time.perf_counter()
    content_filter.find(text)
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("letters", ["hat", "vi", "violenc"])
def test_time_is_linear_in_long_runs(letters: str) -> None:
    text = "".join(letter * (1_000_000 // len(letters)) for letter in letters)
    start = time.perf_counter()
    assert DEFAULT.find(text) is None
    assert DEFAULT.read(text).scan()[1] == 0
    assert time.perf_counter() - start < 20


# Of what runs, gaps and repetitions can be made of; the words are the worst for each.
RUNS = ["-", "\u200b", "h\u200b\u200b", "h" + "-" * 60, "1!", "a-", "haha", "h a ", "illlll", "4@"]


@pytest.mark.parametrize("words", ["hate*,violence", "illegal*", "aaa,aha*,haha", FIFTY])
@pytest.mark.parametrize("run", RUNS)
def test_next_piece_costs_the_same_after_any_text(run: str, words: str) -> None:
    """After 57,600 dashes each token scanned them all again: a tenth of a second each."""
    reading = ContentFilter(words).read((run * 57_600)[:57_600])
    start = time.perf_counter()
    for _ in range(1000):
        reading.append(run[:4])
        hit, safe = reading.scan()
        if not hit:
            reading.forget(safe)
    assert time.perf_counter() - start < 10
