"""What a text is and how it ends, asked of a real engine: length, stop strings, UTF-8, the filter.

A forbidden word leaks at no token border, streamed or not. Nothing here depends on what the
bundled model says; where a test needs a certain text, `saying` makes it come.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from engine import Delta, Engine, SamplingParams
from serving.content_filter import ContentFilter
from tests.support import (
    PROMPT,
    among,
    answer,
    byte_tokens,
    complete,
    deltas,
    ids,
    one,
    run,
    saying,
    token,
    tokenizer,
)

# --- How a text ends ------------------------------------------------------------------------------


def test_length_is_exact(engine: Engine) -> None:
    drawn = run(*(answer(engine, PROMPT, max_new_tokens=n, ignore_eos=True) for n in (1, 2, 50)))
    assert [(len(d.token_ids), d.finish_reason) for (d,) in drawn] == [
        (1, "length"),
        (2, "length"),
        (50, "length"),
    ]


@pytest.mark.parametrize("streams", [False, True])
def test_end_of_text_stops_and_leaves_no_trace(engine: Engine, streams: bool) -> None:
    script = saying(token(" one"), token(" two"), 0)
    got = one(engine, PROMPT, streams=streams, **script)
    assert (got.text, got.finish_reason) == (" one two", "stop")
    assert got.token_ids == [token(" one"), token(" two"), 0]


def test_ignore_eos_goes_on(engine: Engine) -> None:
    script = saying(token(" one"), 0, token(" two"))
    got = one(engine, PROMPT, max_new_tokens=6, ignore_eos=True, **script)
    assert (got.text, got.finish_reason) == (" one two one two", "length")


def test_min_tokens_delays_end_of_text(engine: Engine) -> None:
    params = {"temperature": 0, "logit_bias": {0: 1e5}}
    assert one(engine, PROMPT, **params).token_ids == [0]
    got = one(engine, PROMPT, min_tokens=5, **params)
    assert len(got.token_ids) == 6
    assert got.token_ids.index(0) == 5


ONE_TWO_THREE = saying(token(" one"), token(" two"), token(" three"))


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ((" three",), " one two"),
        (("e t",), " on"),
        (("two three one",), " one "),
        (("three one", "two three o", "e one"), " one "),
        (("o three one", "never"), " one tw"),
        ((" one",), ""),
        (("zero",), " one two three one two three"),
        (("three on", "hree one two"), " one two "),
    ],
)
def test_stop_string_cuts_before_it(
    engine: Engine, stop: tuple[str, ...], text: str, streams: bool
) -> None:
    got = one(engine, PROMPT, stop=stop, streams=streams, max_new_tokens=6, **ONE_TWO_THREE)
    assert got.text == text
    assert got.finish_reason == ("length" if stop == ("zero",) else "stop")


def test_stop_string_never_leaks_into_a_stream(engine: Engine) -> None:
    """Letters come one at a time; each that may begin a stop string waits for the next."""
    script = saying(*map(token, "abcdef"))
    (got,) = run(deltas(engine, PROMPT, stop=("cdx", "efabce", "fabcdef"), **script))
    assert "".join(delta.text for delta in got) == "abcde"
    assert got[-1].finish_reason == "stop"
    texts = [delta.text for delta in got[:3]]
    assert texts == ["a", "b", "cd"]


def test_stop_string_streamed_and_not_streamed_agree(engine: Engine) -> None:
    """Texts of three letters at random, so that beginnings of stop strings abound."""
    params = {"logit_bias": among("a", "b", "c"), "stop": ("abca", "bb", "cab"), "temperature": 2}
    whole = run(*(answer(engine, PROMPT, seed=i, **params) for i in range(30)))
    parts = run(*(answer(engine, PROMPT, seed=i, streams=True, **params) for i in range(30)))
    assert parts == whole
    for (got,) in whole:
        assert not any(stop in got.text for stop in params["stop"])
        spoken = tokenizer.decode(got.token_ids)
        if got.finish_reason == "stop":
            first = min(at for stop in params["stop"] if (at := spoken.find(stop)) >= 0)
            assert got.text == spoken[:first]
        else:
            assert got.text == spoken


@pytest.mark.parametrize("streams", [False, True])
def test_stop_string_of_several_tokens_under_a_filter(
    filtered: Callable[[str], Engine], streams: bool
) -> None:
    """The cut text is shorter than what the filter had already let pass."""
    script = saying(*map(token, "abcdef"))
    got = one(filtered("hate*"), PROMPT, stop=("bcde",), streams=streams, **script)
    assert (got.text, got.finish_reason) == ("a", "stop")


@pytest.mark.parametrize("streams", [False, True])
def test_stop_string_before_min_tokens_does_not_count(engine: Engine, streams: bool) -> None:
    got = one(engine, PROMPT, stop=(" one",), min_tokens=2, streams=streams, **ONE_TWO_THREE)
    assert got.text == " one two three"


@pytest.mark.parametrize("streams", [False, True])
def test_stop_string_before_min_tokens_stays_uncounted(engine: Engine, streams: bool) -> None:
    """A longer stop string made the search for the short one reach back too far."""
    stop = (" two", "something much longer that never comes")
    got = one(engine, PROMPT, stop=stop, min_tokens=2, streams=streams, **ONE_TWO_THREE)
    assert got.text == " one two three one"


# --- UTF-8 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["Once upon \ufffd", "\ufffd", "Once upon 🦊"])
def test_prompt_that_ends_in_half_a_character_is_not_repeated(engine: Engine, prompt: str) -> None:
    """The decoder gave its whole context out with the first token."""
    whole = ids(prompt)
    (king,) = ids(" king")
    params = SamplingParams(temperature=0, max_new_tokens=2, logit_bias={king: 1e5})

    async def text_after(token_ids: list[int]) -> str:
        return (await complete(engine, engine.submit(token_ids, params)))[0].text

    texts = run(text_after(whole), text_after(whole[:-1] or whole))
    assert [text.lstrip("\ufffd") for text in texts] == [" king king"] * 2


@pytest.mark.parametrize("character", ["é", "漢", "🦊"])
def test_stream_holds_back_part_of_a_character(engine: Engine, character: str) -> None:
    script = saying(*byte_tokens(character))
    num_bytes = len(character.encode())
    (got,) = run(deltas(engine, PROMPT, max_new_tokens=4 * num_bytes, **script))
    assert [delta.text for delta in got] == [character] * 4
    assert [len(delta.token_ids) for delta in got] == [num_bytes] * 4


def test_part_of_a_character_at_the_end_is_left_out(engine: Engine) -> None:
    script = saying(*byte_tokens("🦊"))
    (got,) = run(deltas(engine, PROMPT, max_new_tokens=7, **script))
    assert "".join(delta.text for delta in got) == "🦊"
    assert sum(len(delta.token_ids) for delta in got) == 7


@pytest.mark.parametrize("prompt", [PROMPT, "🦊" * 9, "x🦊漢é" * 9])
def test_stream_of_random_bytes_is_what_they_decode_to(engine: Engine, prompt: str) -> None:
    """Bytes in random order are no characters for the most part: U+FFFD is right there."""
    bias = dict.fromkeys([*byte_tokens("é漢🦊"), token("a")], 100.0)
    params = {"logit_bias": bias, "temperature": 2, "max_new_tokens": 60, "streams": True}
    for (got,) in run(*(answer(engine, prompt, seed=i, **params) for i in range(20))):
        spoken = tokenizer.decode(got.token_ids)
        assert spoken.startswith(got.text)
        assert set(spoken[len(got.text) :]) <= {"\ufffd"}


# --- The filter -----------------------------------------------------------------------------------


def check_clean(words: str, prompt: str, texts: list[str]) -> None:
    """No text holds a forbidden word, seen as the last one that ever comes."""
    content_filter = ContentFilter(words)
    for text in texts:
        assert content_filter.find(prompt + text) is None, (words, prompt, text)


def check_filter(engine: Engine, words: str, prompt: str, seeds: int, **params: Any) -> list[Delta]:
    """Streams and whole texts of the same seeds agree; no client at no moment has seen a
    forbidden word. Returns the whole texts."""
    request = {"prompt": prompt, "max_new_tokens": 40, "num_logprobs": 0, **params}
    results = run(
        *(answer(engine, seed=i, **request) for i in range(seeds)),
        *(deltas(engine, seed=i, **request) for i in range(seeds)),
    )
    whole = [delta for (delta,) in results[:seeds]]
    for final, parts in zip(whole, results[seeds:], strict=True):
        so_far = ["".join(delta.text for delta in parts[: i + 1]) for i in range(len(parts))]
        check_clean(words, prompt, so_far)
        assert so_far[-1] == final.text
        assert [t for delta in parts for t in delta.token_ids] == final.token_ids
        assert [p for delta in parts for p in delta.logprobs] == final.logprobs
        assert parts[-1].finish_reason == final.finish_reason
    check_clean(words, prompt, [final.text for final in whole])
    return whole


@pytest.fixture(scope="module")
def favourites(engine: Engine) -> list[str]:
    """The words that the model says most, most frequent first."""
    drawn = run(*(answer(engine, PROMPT, seed=i, max_new_tokens=60) for i in range(30)))
    words = Counter(w for (d,) in drawn for w in re.findall(r"[a-z]{3,}", d.text.lower()))
    return [word for word, _ in words.most_common(60) if word not in PROMPT.lower()]


@pytest.mark.parametrize("chosen", [slice(0, 1), slice(3, 6), slice(20, 24)])
def test_filter_words_the_model_likes(
    filtered: Callable[[str], Engine], favourites: list[str], chosen: slice
) -> None:
    words = ",".join(favourites[chosen]) + "," + favourites[10][:3] + "*"
    engine = filtered(words)
    before = engine.output.num_rollbacks
    whole = check_filter(engine, words, PROMPT, seeds=15, ignore_eos=True)
    assert engine.output.num_rollbacks > before
    full = [d for d in whole if d.finish_reason == "length" and len(d.token_ids) == 40]
    assert full == whole


def test_filter_long_text_is_full_length(
    filtered: Callable[[str], Engine], favourites: list[str]
) -> None:
    """The longer a text, the more often it has to be rolled back."""
    words = ",".join(favourites[:3])
    drawn = run(
        *(
            answer(filtered(words), PROMPT, seed=i, max_new_tokens=200, ignore_eos=True)
            for i in range(10)
        )
    )
    assert [(len(d.token_ids), d.finish_reason) for (d,) in drawn] == [(200, "length")] * 10


def test_filter_every_sequence_of_a_request(
    filtered: Callable[[str], Engine], favourites: list[str]
) -> None:
    words = favourites[0]
    got = run(
        answer(filtered(words), PROMPT, n=4, seed=1, ignore_eos=True),
        answer(filtered(words), PROMPT, n=4, seed=1, streams=True, ignore_eos=True),
    )
    assert got[0] == got[1]
    check_clean(words, PROMPT, [delta.text for delta in got[0]])
    assert [len(delta.token_ids) for delta in got[0]] == [50] * 4


PIECES = [
    ("hate*", "I", ("h", "a", "t", "e", " h", "at", "ate", " ", "ha")),
    ("hate", "I", ("h", "a", "t", "e", " h", "at", "ate", " ", ".")),
    ("ha*,eat,tea*", "I", ("h", "a", "t", "e", " h", "at", "ate", " ", " e")),
    ("hat-eat,at", "I", ("h", "a", "t", "e", " h", "at", "-", " ")),
]


@pytest.mark.parametrize(("words", "prompt", "pieces"), PIECES)
@pytest.mark.parametrize("stop", [(), ("e hh", "tteh", "hath", "aa")])
def test_filter_words_in_pieces(
    filtered: Callable[[str], Engine],
    words: str,
    prompt: str,
    pieces: tuple[str, ...],
    stop: tuple[str, ...],
) -> None:
    """Pieces of a forbidden word in random order, so that it is split everywhere."""
    engine = filtered(words)
    before = engine.output.num_rollbacks
    params = {"logit_bias": among(*pieces), "temperature": 2, "stop": stop, "max_new_tokens": 20}
    whole = check_filter(engine, words, prompt, seeds=30, **params)
    assert engine.output.num_rollbacks > before
    assert not any(s in delta.text for s in stop for delta in whole)


@pytest.mark.parametrize("length", range(1, 8))
def test_filter_word_begun_in_the_prompt(filtered: Callable[[str], Engine], length: int) -> None:
    words, word = "violence*", " violence"
    bias = dict.fromkeys(ids(word[length:]), 100.0) | among("s", "e", ".")
    check_filter(filtered(words), words, "No" + word[:length], seeds=10, logit_bias=bias)


def test_filter_rolls_back_to_the_first_token_of_the_word(
    filtered: Callable[[str], Engine],
) -> None:
    """`h` is wanted at every space; its place is taken by the next best."""
    script = saying(*map(token, " hate"))
    got = one(filtered("hate*"), "I", max_new_tokens=5, **script)
    assert got.text == " ahte"
    assert got.finish_reason == "length"


@pytest.mark.parametrize("streams", [False, True])
def test_filter_gives_up_in_the_end(filtered: Callable[[str], Engine], streams: bool) -> None:
    words = ",".join(f"{letter}*" for letter in "abcdefghijklmnopqrstuvwxyz")
    engine = filtered(words)
    params = {"max_new_tokens": 200, "ignore_eos": True, "streams": streams}
    for got in run(answer(engine, "The end.", seed=1, n=4, **params))[0]:
        assert got.finish_reason == "content_filter"
        assert len(got.token_ids) < 200
        check_clean(words, "", [got.text])


def test_filter_of_an_exact_word_waits_for_its_end(filtered: Callable[[str], Engine]) -> None:
    script = saying(token(" one"), *map(token, "sxyz"))
    (got,) = run(deltas(filtered("one"), "I", max_new_tokens=5, **script))
    assert "".join(delta.text for delta in got) == " onesxyz"
    assert got[0].text == " ones"


def test_filter_word_at_the_very_end(filtered: Callable[[str], Engine]) -> None:
    """Nothing follows, so the word is whole."""
    script = saying(token("s"), token(" one"), token("x"))
    got = one(filtered("one"), "I", max_new_tokens=2, **script)
    assert got.text == "sx"


def test_filter_off_lets_everything_pass(engine: Engine) -> None:
    assert one(engine, "I", max_new_tokens=5, **saying(*map(token, " hate"))).text == " hate"
