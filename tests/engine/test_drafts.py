"""What is drafted, and that texts are the same to the bit whatever is drafted.

Where it is to be shown that a text does not change, half of the guesses are right: looked up in the
texts that the engine makes without drafts.
"""

from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from engine import Delta, Engine, StepStats, TokenRules
from engine import drafts as drafts_module
from engine.drafts import MOST_ROWS, Drafter, learn, look_up
from engine.model_runner import ModelRunner
from engine.request import SamplingParams, Sequence
from serving.content_filter import ContentFilter
from tests.support import (
    LONG_PROMPT,
    PROMPT,
    OneOf,
    among,
    deltas,
    ids,
    load,
    run,
    saying,
    sequences,
    tiny_llama,
    token,
    tokenizer,
)

# --- Guesses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [
        ([1, 2, 3, 4, 5, 9, 1, 2, 3], [4, 5, 9, 1]),
        ([1, 2, 3, 4, 1, 2, 3, 5, 6, 7, 8, 1, 2, 3], [5, 6, 7, 8]),  # the last time
        ([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], [4, 9, 2, 3]),  # three tokens rather than two
        ([8, 2, 3, 4, 5, 6, 9, 2, 3], [4, 5, 6, 9]),  # two where there are no three
        ([5, 7, 7, 7], [7, 7, 7, 7]),
        ([5, 1, 2, 3, 1, 2, 3], [1, 2, 3, 1]),
        ([0, 0, 256, 0, 0], [256, 0, 0, 256]),
        ([5, 8, 5], [8, 5, 8, 5]),  # one where there are no two
        ([256, 9, 65536, 1], []),  # whose bytes are there, between tokens
        ([1, 2, 3, 4], []),
        ([1, 2], []),
        ([1], []),
    ],
)
def test_look_up_goes_on_as_it_did_before(token_ids: list[int], expected: list[int]) -> None:
    assert look_up(token_ids, 4) == expected


def test_look_up_gives_up_where_all_that_is_found_lies_across_two_tokens() -> None:
    """Each step looked at all of 1,000 places in a prompt that was made to have them."""
    across = [1] * 1000  # the bytes of 256 lie between each two of them
    assert look_up([256, 7, *across[:9], 256], 1) == [7]
    assert look_up([256, 7, *across, 256], 1) == []


def repeating(count: int = 1, max_new_tokens: int = 50, hit_rate: float = 0.5) -> list[Sequence]:
    """Sequences whose next tokens can be guessed."""
    seqs = sequences(SamplingParams(max_new_tokens=max_new_tokens), prompt=[5, 6, 7] * 3)
    seqs += sequences(seqs[0].params, prompt=[5, 6, 7] * 3, count=count - 1)
    for seq in seqs:
        seq.hit_rate = hit_rate
    return seqs


def draft(drafter: Drafter, seqs: list[Sequence], until_renewal: float = 99) -> list[int]:
    """The lengths of the drafts."""
    return [len(draft) for draft in drafter.draft(seqs, lambda seq: until_renewal)]


def test_draft_is_longer_where_guesses_are_right() -> None:
    lengths = [draft(Drafter(15), repeating(hit_rate=rate)) for rate in (0.01, 0.2, 0.5, 0.9, 0.99)]
    assert lengths == [[], [1], [3], [11], [15]]
    assert draft(Drafter(4), repeating(hit_rate=0.99)) == [4]
    assert draft(Drafter(0), repeating(hit_rate=0.99)) == []


@pytest.mark.parametrize(("max_new_tokens", "expected"), [(9, [8]), (3, [2]), (2, [1]), (1, [])])
def test_draft_leaves_room_for_the_token_behind_it(
    max_new_tokens: int, expected: list[int]
) -> None:
    assert draft(Drafter(15), repeating(max_new_tokens=max_new_tokens, hit_rate=0.99)) == expected


def test_draft_ends_where_keys_are_computed_anew() -> None:
    assert draft(Drafter(8), repeating(hit_rate=0.99), until_renewal=3) == [3]
    assert draft(Drafter(8), repeating(hit_rate=0.99), until_renewal=0) == []


@pytest.mark.parametrize("num_seqs", [1, 3, 8, 12, 15, 16, 64])
def test_drafts_take_free_rows_alone(num_seqs: int) -> None:
    lengths = draft(Drafter(15), repeating(num_seqs, hit_rate=0.99))
    assert sum(lengths) == max(0, MOST_ROWS - num_seqs)
    assert all(length <= max(0, MOST_ROWS - num_seqs) // num_seqs + 1 for length in lengths)


def test_draft_goes_to_who_is_guessed_best_while_that_pays() -> None:
    """With eight rows, one more has to be right as often as it makes the pass longer."""
    seqs = repeating(8, hit_rate=0.2)
    seqs[3].hit_rate = 0.99
    assert draft(Drafter(4), seqs) == [0, 0, 0, 4, 0, 0, 0, 0]
    assert draft(Drafter(4), repeating(8, hit_rate=0.2)) == []


def test_learn_counts_guesses_until_one_is_wrong() -> None:
    (seq,) = repeating(hit_rate=0.5)
    Drafter(4).draft([seq], lambda seq: 99)
    assert seq.guess == [5, 6, 7, 5]
    seq.output_token_ids += [5, 6, 9, 5]
    learn(seq)
    assert seq.hit_rate == pytest.approx(((0.5 * 0.9 + 0.1) * 0.9 + 0.1) * 0.9)


def test_learn_counts_guesses_that_got_no_row() -> None:
    (seq,) = repeating(hit_rate=0.01)
    rates = []
    for token_id in [5, 6, 7] * 5:
        assert (draft(Drafter(8), [seq]) == []) == (seq.hit_rate < 0.1)
        rates.append(seq.hit_rate)
        seq.output_token_ids.append(token_id)
    assert rates == sorted(rates)
    assert rates[-1] > 0.7


# --- Texts ----------------------------------------------------------------------------------------

RULES = TokenRules(
    no_repeat_ngram_size=4,
    begin_suppress_tokens=[token(" the")],
    exponential_decay_length_penalty=(8, 1.05),
)
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "num_logprobs": 2, "frequency_penalty": 0.2},
    {},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "num_logprobs": 0},
    {"temperature": 0.3, "top_p": 0.95, "ignore_eos": True},
    {"temperature": 1.4, "top_k": 100},
    {"min_p": 0.1, "num_prompt_logprobs": 1},
    {"temperature": 0.2, "repetition_penalty": 1.2},
    {"temperature": 0.5, "repetition_penalty": 1.5, "repetition_penalty_range": 4},
    {"temperature": 0.4, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"logit_bias": among(" ha", " one", " hate", "te")},
    {"logit_bias": {0: 8.0}, "min_tokens": 9},
    {"temperature": 0.4, "stop": (" the", "king"), "min_tokens": 3},
    {"temperature": 0.4, "stop": ("oung",), "includes_stop": True},
    {"temperature": 0.4, "stop_token_ids": {token(" and"): " and"}},
    {"temperature": 0.3, "rules": RULES},
    {"temperature": 0.3, "n": 3},
    {"temperature": 0, "max_new_tokens": 2},
    {"temperature": 0.8, "max_new_tokens": 40},
    {"temperature": 0.5, "constraint": OneOf(ids(" one two one two one"), ids(" one two three"))},
]
PROMPTS = (PROMPT, "ha one ha one ha one ha one", LONG_PROMPT[:110], "The")


def texts(count: int) -> list[dict[str, Any]]:
    """Requests of all kinds, all seeded."""
    return [
        {
            "prompt": PROMPTS[i % len(PROMPTS)],
            "seed": i,
            "streams": i % 2 == 0,
            "max_new_tokens": 14,
            **KINDS[i % len(KINDS)],
        }
        for i in range(count)
    ]


async def leave(engine: Engine, seed: int) -> None:
    """A client that goes when it has got something."""
    params = SamplingParams(max_new_tokens=60, temperature=0, seed=seed)
    async for _ in engine.stream(engine.submit(ids(LONG_PROMPT), params, streams=True)):
        return


def look_up_in(known: dict[tuple[int, ...], list[int]]) -> Callable[..., list[int]]:
    """Guesses most of which are right, others up to a token that is wrong, or looked up."""

    def guess(token_ids: list[int], num_tokens: int) -> list[int]:
        following = known.get(tuple(token_ids), [])[:num_tokens]
        match len(token_ids) % 5:
            case 0:
                return look_up(token_ids, num_tokens)
            case 1 | 2 as right:
                return [*following[:right], 7, *following[right + 1 :]]
        return following

    return guess


def settle(engine: Engine) -> None:
    """Waits for the last step: what it did is counted after its deltas have gone out."""
    engine.stop()
    engine.start()


def check_texts(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, count: int, num_together: int
) -> None:
    """Every delta is the same with drafts and without, in company and alone."""
    requests, steps = texts(count), list[StepStats]()
    monkeypatch.setattr(engine.scheduler, "max_num_seqs", num_together)
    monkeypatch.setattr(engine, "on_step", steps.append)
    monkeypatch.setattr(engine.drafter, "max_tokens", 0)

    def answers(*others: Coroutine[Any, Any, None]) -> list[list[Delta]]:
        asked = [deltas(engine, **request) for request in requests]
        got = run(*asked[: count // 2], *others, *asked[count // 2 :])
        got = got[: count // 2] + got[count // 2 + len(others) :]
        return [sorted(answer, key=lambda delta: delta.index) for answer in got]

    expected, known = answers(), dict[tuple[int, ...], list[int]]()
    settle(engine)
    assert sum(stats.num_draft_tokens for stats in steps) == 0
    for request, answer in zip(requests, expected, strict=True):
        prompt = ids(request["prompt"])
        output = [i for delta in answer if delta.index == 0 for i in delta.token_ids]
        known |= {(*prompt, *output[:at]): output[at:] for at in range(len(output))}

    monkeypatch.setattr(engine.drafter, "max_tokens", 8)
    monkeypatch.setattr(drafts_module, "look_up", look_up_in(known))
    assert answers(*(leave(engine, seed) for seed in range(9))) == expected
    settle(engine)
    num_drafted = sum(stats.num_draft_tokens for stats in steps)
    assert num_drafted / 4 < sum(stats.num_accepted_tokens for stats in steps) < num_drafted
    assert sum(stats.num_rollbacks for stats in steps) > 0
    alone = [run(deltas(engine, **request))[0] for request in requests[9:14]]
    assert [sorted(a, key=lambda delta: delta.index) for a in alone] == expected[9:14]


@pytest.fixture(scope="module")
def int8_engine() -> Iterator[Engine]:
    made = Engine(load(), tokenizer, quantization="int8", num_threads=1, prefix_cache_bytes=2**20)
    yield made
    made.stop()


def test_texts_are_the_same_with_drafts_int8(
    int8_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_engine.output, "text_filter", ContentFilter("hate*,king,so"))
    check_texts(int8_engine, monkeypatch, count=200, num_together=12)


@pytest.mark.parametrize("name", ["engine", "llama_engine"])
def test_texts_are_the_same_with_drafts_in_floats(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many rows as have been measured to change nothing."""
    engine = request.getfixturevalue(name)
    monkeypatch.setattr(engine.output, "text_filter", ContentFilter("hate*,king,so"))
    check_texts(engine, monkeypatch, count=12, num_together=4)


def test_step_of_several_tokens_ends_with_the_text(
    llama_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draft goes on beyond the stop string: nothing of it is drawn, or counted."""
    steps = list[StepStats]()
    settle(llama_engine)  # after clients of other tests, who have left
    monkeypatch.setattr(llama_engine, "on_step", steps.append)
    script = saying(token(" one"), token(" two"))
    got = run(deltas(llama_engine, " one two" * 3, stop=(" one two" * 4,), **script))[0]
    settle(llama_engine)
    assert [delta.text for delta in got] == [""]
    assert got[0].token_ids == [token(" one"), token(" two")] * 4
    assert [stats.num_draft_tokens for stats in steps] == [0, 1, 2, 3]
    assert [stats.num_rows for stats in steps] == [len(ids(" one two" * 3)), 2, 3, 4]
    assert [stats.num_accepted_tokens for stats in steps] == [0, 1, 2, 1]
    assert [len(stats.inter_token_seconds) for stats in steps] == [0, 2, 3, 2]
    assert [len(stats.finished) for stats in steps] == [0, 0, 0, 1]


def test_nothing_is_drafted_where_company_changes_bits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a mixture of experts, for which this is what is measured."""
    monkeypatch.setattr(ModelRunner, "measure_batch_invariance", lambda runner: (1, 40))
    caplog.set_level("INFO", "engine")
    made = Engine(tiny_llama(), tokenizer, max_num_seqs=2, num_threads=1)
    made.stop()
    assert made.drafter.max_tokens == 0
    assert "no tokens are drafted" in caplog.text
