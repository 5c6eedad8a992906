"""The text side of a sequence, from token ids alone: no model is loaded here.

What a test calls a model is a list of tokens that are wanted in turn, or random ones; one that was
rolled back at its place is passed over, as the sampler does.
"""

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from transformers import CTRLTokenizer

from engine import Delta, PositionLogprobs, SamplingParams
from engine.output import CONTEXT_TOKENS, MAX_ROLLBACKS, OutputProcessor
from engine.request import Sequence
from serving.content_filter import ContentFilter
from tests.support import (
    PROMPT,
    byte_fallback_tokenizer,
    byte_tokens,
    ids,
    sequences,
    token,
    tokenizer,
)

END_OF_TEXT = 0
ONE_TWO_THREE = [token(" one"), token(" two"), token(" three")]


def processor(words: str = "") -> OutputProcessor:
    text_filter = ContentFilter(words) if words else None
    return OutputProcessor(tokenizer, text_filter, {END_OF_TEXT})


def sequence(
    words: str = "", *, prompt: str = PROMPT, streams: bool = True, **params: Any
) -> Sequence:
    """One with its prompt, which the filter of these words has read."""
    _, reading = processor(words).read_prompt(ids(prompt))
    (seq,) = sequences(
        SamplingParams(**params), prompt=ids(prompt), streams=streams, reading=reading
    )
    return seq


def feed(output: OutputProcessor, seq: Sequence, token_ids: Iterable[int]) -> list[Delta | None]:
    """What each token gives, up to the one that ends the sequence."""
    got: list[Delta | None] = []
    for token_id in token_ids:
        got.append(output.append(seq, token_id))
        if got[-1] and got[-1].finish_reason:
            break
    return got


def draw(output: OutputProcessor, seq: Sequence, choose: Callable[[], int]) -> list[Delta]:
    """The deltas of a whole sequence; choose: what a model would say, again if that is banned."""
    got: list[Delta] = []
    while not got or not got[-1].finish_reason:
        banned = seq.banned.get(len(seq.output_token_ids), [])
        while (token_id := choose()) in banned:
            pass
        seq.logprobs.append(PositionLogprobs(token_id, -1.0, []))
        if delta := output.append(seq, token_id):
            got.append(delta)
    return got


def texts(got: Iterable[Delta | None]) -> list[str]:
    return [delta.text if delta else "" for delta in got]


# --- Deltas ---------------------------------------------------------------------------------------


def test_stream_gives_each_token_at_once() -> None:
    seq = sequence(max_new_tokens=3)
    assert feed(processor(), seq, ONE_TWO_THREE) == [
        Delta(0, " one", [ONE_TWO_THREE[0]], [], None),
        Delta(0, " two", [ONE_TWO_THREE[1]], [], None),
        Delta(0, " three", [ONE_TWO_THREE[2]], [], "length"),
    ]


def test_whole_answer_comes_with_the_last_token() -> None:
    seq = sequence(streams=False, max_new_tokens=3)
    whole = Delta(0, " one two three", ONE_TWO_THREE, [], "length")
    assert feed(processor(), seq, ONE_TWO_THREE) == [None, None, whole]


def test_index_counts_from_the_first_of_the_request() -> None:
    first, second = sequences(count=2, streams=True)
    first.request.first_index = 4
    got = [processor().append(seq, ONE_TWO_THREE[0]) for seq in (first, second)]
    assert [delta.index for delta in got if delta] == [4, 5]


def test_no_new_tokens_end_at_once_and_without_any() -> None:
    """The prompt's log probabilities were all that was asked for."""
    seq = sequence(max_new_tokens=0)
    assert feed(processor(), seq, ONE_TWO_THREE) == [Delta(0, "", [], [], "length")]
    assert seq.output_token_ids == []


def test_log_probabilities_go_with_their_tokens() -> None:
    """The first byte of a character has no text yet; it comes with the second one."""
    seq = sequence(max_new_tokens=3)
    seq.logprobs = [PositionLogprobs(i, -1.0, []) for i in range(3)]
    got = feed(processor(), seq, [*byte_tokens("é"), token("a")])
    told = [[logprobs.token_id for logprobs in delta.logprobs] for delta in got if delta]
    assert told == [[0, 1], [2]]


# --- UTF-8 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("character", ["é", "漢", "🦊"])
def test_part_of_a_character_is_held_back(character: str) -> None:
    spelled = byte_tokens(character)
    got = feed(processor(), sequence(), spelled * 2)
    nothing = [None] * (len(spelled) - 1)
    whole = Delta(0, character, spelled, [], None)
    assert got == [*nothing, whole, *nothing, whole]


@pytest.mark.parametrize("streams", [False, True])
def test_part_of_a_character_at_the_end_is_left_out(streams: bool) -> None:
    seq = sequence(streams=streams, max_new_tokens=4)
    *_, last = feed(processor(), seq, [token("a"), *byte_tokens("🦊")[:3]])
    assert last
    assert (last.text, last.finish_reason) == ("" if streams else "a", "length")
    assert seq.text == "a"


def test_character_begun_in_the_prompt_is_not_ours() -> None:
    seq = sequence()
    seq.request.prompt_token_ids = byte_tokens("x🦊")[:3]
    got = feed(processor(), seq, [token("a"), token("b")])
    assert "".join(texts(got)).lstrip("\ufffd") == "ab"


@pytest.mark.parametrize("ending", ["", "\ufffd", "🦊"])
def test_prompt_is_not_repeated(ending: str) -> None:
    """The decoder gave its whole context out with the first token."""
    seq = sequence(prompt="Once upon " * CONTEXT_TOKENS + ending)
    assert "".join(texts(feed(processor(), seq, ONE_TWO_THREE))) == " one two three"


# --- Byte fallback --------------------------------------------------------------------------------

BYTE_FALLBACK = byte_fallback_tokenizer()


def fallback_ids(*pieces: str | bytes) -> list[int]:
    """Of words as the vocabulary has them, and of single bytes."""
    names = [
        name
        for piece in pieces
        for name in ([piece] if isinstance(piece, str) else [f"<0x{byte:02X}>" for byte in piece])
    ]
    token_ids: list[int] = BYTE_FALLBACK.convert_tokens_to_ids(names)
    return token_ids


def fallback_text(prompt: list[int], output: list[int], words: str = "") -> str:
    text_filter = ContentFilter(words) if words else None
    made = OutputProcessor(BYTE_FALLBACK, text_filter, {2})
    _, reading = made.read_prompt(prompt)
    params = SamplingParams(max_new_tokens=len(output))
    (seq,) = sequences(params, prompt=prompt, streams=True, reading=reading)
    return "".join(texts(feed(made, seq, output)))


FOX = "🦊".encode()


@pytest.mark.parametrize(
    ("output", "text"),
    [
        ((FOX, FOX[:1], "▁the"), "🦊\ufffd the"),
        ((FOX, b"\x80", FOX, "▁the", "▁one"), "🦊" + "\ufffd" * 5 + " the one"),
        (("▁one", FOX, b"\x80\x80", "a", FOX, "▁two"), " one🦊\ufffd\ufffda🦊 two"),
        ((FOX, "</s>", FOX[:2], "</s>", "a"), "🦊"),
        ((FOX[:2], "▁the"), "\ufffd\ufffd the"),
        ((FOX * 20, "▁the", "▁one"), "🦊" * 20 + " the one"),
    ],
)
def test_byte_fallback_broken_character_behind_a_whole_one(
    output: tuple[str | bytes, ...], text: str
) -> None:
    """The decoder took the whole one back, and raised `Invalid prefix`: all sequences ended."""
    assert fallback_text(fallback_ids("<s>", "▁one"), fallback_ids(*output)) == text


@pytest.mark.parametrize(
    "prompt",
    [
        ("▁one", FOX * 10),
        ("▁one", b"\x80", FOX * 9),
        ("▁one", FOX * 9, FOX[:1]),
        ("▁one", FOX * 9, b"\xe6\xbc", FOX[:3]),
        ("▁one", b"\x80" * CONTEXT_TOKENS),
        (FOX, "</s>"),
    ],
)
def test_byte_fallback_space_behind_a_long_emoji(prompt: tuple[str | bytes, ...]) -> None:
    """The decoder began within a character, knew of no text before, and took the space away."""
    output = fallback_ids("▁two", "▁three")
    assert fallback_text(fallback_ids("<s>", *prompt), output) == " two three"


def test_byte_fallback_text_begins_without_a_space() -> None:
    assert fallback_text(fallback_ids("<s>"), fallback_ids("▁two", "▁three")) == "two three"


def test_byte_fallback_roll_back_goes_on_within_a_character() -> None:
    """The decoder that begins anew has the first bytes of the fox to read again."""
    output = fallback_ids("▁one", FOX, FOX[:2], *"hate", FOX[2:], "▁two")
    assert fallback_text(fallback_ids("<s>"), output, "hate*") == "one🦊🦊 two"


def test_tokenizer_without_a_fast_backend_is_refused(tmp_path: Path) -> None:
    """Its first request failed for want of an attribute."""
    (tmp_path / "vocab.json").write_text('{"<unk>": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    slow = CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    with pytest.raises(ValueError, match="CTRLTokenizer has no fast backend"):
        OutputProcessor(slow, None, set())


# --- How a text ends ------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [False, True])
def test_end_of_text_stops_and_leaves_no_trace(streams: bool) -> None:
    seq = sequence(streams=streams)
    got = feed(processor(), seq, [*ONE_TWO_THREE, END_OF_TEXT, token(" never")])
    assert len(got) == 4
    assert "".join(texts(got)) == " one two three"
    assert got[-1]
    assert (got[-1].finish_reason, got[-1].token_ids[-1]) == ("stop", END_OF_TEXT)


def test_end_of_text_is_what_the_processor_was_told() -> None:
    seq, output = sequence(), processor()
    output.eos_token_ids = {token(" two")}
    got = feed(output, seq, [END_OF_TEXT, *ONE_TWO_THREE])
    assert [delta.finish_reason for delta in got if delta] == [None, "stop"]


def test_ignore_eos_goes_on() -> None:
    seq = sequence(ignore_eos=True, max_new_tokens=4)
    got = feed(processor(), seq, [token(" one"), END_OF_TEXT, token(" two"), END_OF_TEXT])
    assert texts(got) == [" one", "", " two", ""]
    assert got[-1]
    assert got[-1].finish_reason == "length"


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
def test_stop_string_cuts_before_it(stop: tuple[str, ...], text: str, streams: bool) -> None:
    seq = sequence(stop=stop, streams=streams, max_new_tokens=6)
    got = feed(processor(), seq, ONE_TWO_THREE * 2)
    assert "".join(texts(got)) == text == seq.text
    assert got[-1]
    assert got[-1].finish_reason == ("length" if stop == ("zero",) else "stop")


def test_beginning_of_a_stop_string_waits_for_what_follows() -> None:
    """It goes out when no stop string can begin there any more, and not before."""
    seq = sequence(stop=("cdx", "efabce", "fabcdef"))
    got = feed(processor(), seq, map(token, "abcdef" * 3))
    assert texts(got) == ["a", "b", "", "", "cd", "", "", "", "", "e", "", ""]
    assert got[-1]
    assert got[-1].finish_reason == "stop"


def test_stop_string_that_does_not_come_is_given_in_the_end() -> None:
    seq = sequence(stop=(" one two three four",), max_new_tokens=3)
    assert texts(feed(processor(), seq, ONE_TWO_THREE)) == ["", "", " one two three"]


@pytest.mark.parametrize("stop", [(" one",), (" one", "something longer that never comes")])
def test_stop_string_before_min_tokens_does_not_count(stop: tuple[str, ...]) -> None:
    seq = sequence(stop=stop, min_tokens=2)
    assert "".join(texts(feed(processor(), seq, ONE_TWO_THREE * 2))) == " one two three"


# --- The filter and its roll-backs ----------------------------------------------------------------


def test_prompt_is_read_for_the_filter_alone() -> None:
    prompt = ids("There was no vio")
    assert processor().read_prompt(prompt) == (prompt, None)
    _, reading = processor("violence").read_prompt(prompt)
    assert reading
    assert reading.scan(None, final=False) == (None, len("There was no "))


def test_roll_back_bans_the_first_token_of_the_word() -> None:
    output, seq = processor("hate*"), sequence("hate*", streams=False, prompt="I")
    letters = list(map(token, " hate"))
    assert feed(output, seq, [token(" one"), *letters]) == [None] * 6
    assert seq.text == " one "
    assert seq.banned == {2: [token("h")]}
    assert seq.output_token_ids == [token(" one"), token(" ")]
    assert (output.num_rollbacks, seq.num_rollbacks) == (1, 1)
    assert seq.request.num_generated_tokens == 2


def test_text_is_given_again_after_a_roll_back() -> None:
    """The decoder begins anew, in the middle of the text."""
    output, seq = processor("hate*"), sequence("hate*", prompt="I", max_new_tokens=6)
    got = feed(output, seq, map(token, [" one", " ", "h", "a", "t", "e", "a", "t", "e", "s"]))
    assert "".join(texts(got)) == " one ates"
    assert seq.output_token_ids == list(map(token, [" one", " ", "a", "t", "e", "s"]))
    assert got[-1]
    assert got[-1].finish_reason == "length"


def test_roll_back_forgets_what_was_banned_behind_it() -> None:
    """There the text is another one now."""
    output, seq = processor("hate*"), sequence("hate*", prompt="I", streams=False)
    seq.banned = {0: [7], 1: [8], 5: [9]}
    feed(output, seq, map(token, " hate"))
    assert seq.banned == {0: [7], 1: [8, token("h")]}


def test_roll_back_takes_log_probabilities_with_it() -> None:
    output, seq = processor("hate*"), sequence("hate*", prompt="I", max_new_tokens=5)
    script = iter(map(token, [" ", "h", "a", "t", "e", "a", "t", "e", "s"]))
    got = draw(output, seq, lambda: next(script))
    told = [logprobs.token_id for delta in got for logprobs in delta.logprobs]
    assert told == [token_id for delta in got for token_id in delta.token_ids]
    assert "".join(texts(got)) == " ates"


def test_roll_back_finds_half_a_character_again() -> None:
    """It was begun before the word, which kept it from its end."""
    output, seq = processor("hate*"), sequence("hate*", prompt="I")
    *start, end = byte_tokens("🦊")
    got = feed(output, seq, [*start, *map(token, "hate"), end, token("s")])
    assert "".join(texts(got)) == "🦊s"
    assert output.num_rollbacks == 1


def test_roll_back_may_leave_the_beginning_of_another_word() -> None:
    """` h` was followed by `ate`; without them `ha` is followed by `te`."""
    output, seq = processor("hate*"), sequence("hate*", prompt="I")
    got = feed(output, seq, map(token, [" ", "ha", " h", "ate", "t", "e", "s", "."]))
    assert "".join(texts(got)) == " s."
    assert output.num_rollbacks == 2


def test_roll_back_may_leave_the_beginning_of_a_stop_string() -> None:
    output, seq = processor("hate*"), sequence("hate*", prompt="I", stop=("s x",))
    got = feed(output, seq, map(token, ["s", " h", "ate", " ", "x"]))
    assert "".join(texts(got)) == ""
    assert got[-1]
    assert got[-1].finish_reason == "stop"


@pytest.mark.parametrize("word", [" hate", " violence"])
def test_word_split_anywhere_never_leaks(word: str) -> None:
    """In two parts, and letter by letter; a stream has seen nothing of it."""
    splits = [ids(word[:i]) + ids(word[i:]) for i in range(1, len(word))] + [[*map(token, word)]]
    for split in splits:
        output, seq = processor("hate*,violence"), sequence("hate*,violence", prompt="I")
        got = feed(output, seq, [token(" one"), *split, token(".")])
        assert texts(got)[0] == " one"
        assert "".join(texts(got)).strip(" .") == "one", split
        assert output.num_rollbacks == 1, split


@pytest.mark.parametrize("length", range(1, 8))
def test_word_begun_in_the_prompt_never_leaks(length: int) -> None:
    word = " violence"
    output, seq = processor("violence*"), sequence("violence*", prompt="No" + word[:length])
    got = feed(output, seq, ids(word[length:]))
    assert texts(got) == [""] * len(got)
    assert output.num_rollbacks == 1
    assert seq.output_token_ids == []


def test_exact_word_waits_for_its_end() -> None:
    seq = sequence("one", prompt="I", max_new_tokens=3)
    got = feed(processor("one"), seq, [token(" one"), token("s"), token("x")])
    assert texts(got) == ["", " ones", "x"]


def test_exact_word_at_the_very_end_is_rolled_back() -> None:
    """Nothing follows, so the word is whole."""
    output, seq = processor("one"), sequence("one", prompt="I", max_new_tokens=2)
    assert texts(feed(output, seq, [token("s"), token(" one"), token("x")])) == ["s", "", "x"]
    assert output.num_rollbacks == 1


def test_stop_string_may_cut_what_the_filter_let_pass() -> None:
    seq = sequence("hate*", stop=("bcde",))
    got = feed(processor("hate*"), seq, map(token, "abcdef"))
    assert "".join(texts(got)) == "a"
    assert got[-1]
    assert got[-1].finish_reason == "stop"


@pytest.mark.parametrize(("words", "num_given"), [("", 7), ("ate", 7), ("hates", 2), ("hate*", 2)])
def test_stop_string_tokens_are_given_but_no_forbidden_word(words: str, num_given: int) -> None:
    """The text ends before both; which tokens they had, a client may see of the first alone."""
    seq = sequence(words, prompt="I", stop=("hates",))
    output = [token(" one"), *map(token, " hates")]
    (*_, last) = feed(processor(words), seq, output)
    assert last
    assert (seq.text, last.finish_reason) == (" one ", "stop")
    assert seq.num_released_tokens == num_given


def test_filter_off_lets_everything_pass() -> None:
    assert "".join(texts(feed(processor(), sequence(), map(token, " hate")))) == " hate"


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("num_kept", [0, 3])
def test_too_many_roll_backs_end_the_text(num_kept: int, streams: bool) -> None:
    """One more than MAX_ROLLBACKS and the tokens that stay; what is in order is given."""
    output = processor("hate*,love*")
    seq = sequence("hate*,love*", prompt="I", streams=streams, max_new_tokens=99)
    kept, words = [token(" one")] * num_kept, [ids(" hate"), ids(" love")]
    script = kept + (words[0] + words[1]) * MAX_ROLLBACKS * 2
    got = feed(output, seq, script)
    assert got[-1]
    assert got[-1].finish_reason == "content_filter"
    assert "".join(texts(got)) == " one" * num_kept
    assert seq.num_rollbacks == MAX_ROLLBACKS + num_kept + 1 == output.num_rollbacks


# --- Streamed and whole ---------------------------------------------------------------------------

WORDS = "hate*,at,eat*"
PIECES = [*map(token, [*"hate  ..", " h", "at", "ate", "ha", " one"]), *byte_tokens("é🦊")]


def draw_both(seed: int, **params: Any) -> tuple[list[Delta], Delta, int]:
    """The parts of a stream, the whole of the same tokens, and the number of roll-backs."""
    drawn = []
    for streams in (True, False):
        rng, output = random.Random(seed), processor(WORDS)
        seq = sequence(WORDS, prompt="I", streams=streams, max_new_tokens=30, **params)
        drawn.append(draw(output, seq, lambda rng=rng: rng.choice(PIECES)))
    parts, (whole,) = drawn
    return parts, whole, output.num_rollbacks


@pytest.mark.parametrize("stop", [(), ("e hh", "tteh", "hath", "aa")])
def test_parts_together_are_the_whole_and_nothing_leaks(stop: tuple[str, ...]) -> None:
    """Words in pieces and half characters, at random: words are split everywhere."""
    content_filter, num_rollbacks = ContentFilter(WORDS), 0
    for seed in range(200):
        parts, whole, num_more = draw_both(seed, stop=stop)
        num_rollbacks += num_more
        assert "".join(texts(parts)) == whole.text
        assert [t for delta in parts for t in delta.token_ids] == whole.token_ids
        assert [p for delta in parts for p in delta.logprobs] == whole.logprobs
        assert parts[-1].finish_reason == whole.finish_reason
        so_far = ["I" + "".join(texts(parts[:end])) for end in range(len(parts))]
        assert [text for text in so_far if content_filter.find(text, final=False)] == []
        assert content_filter.find("I" + whole.text) is None
        assert not any(s in whole.text for s in stop)
    assert num_rollbacks > 100
