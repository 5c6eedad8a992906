"""Texts under a constraint, on a real engine. The constraints here are made up of tokens; what
clients ask for is in tests/backends/test_structure.py."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from engine import ConstraintFailed, Engine, InferenceError, TokenMask
from tests.support import PROMPT, OneOf, answer, deltas, ids, one, run, token

TEXTS = [ids(" one two three"), ids(" one two four"), ids(" six")]


class Failing(OneOf):
    """Fails at its second token."""

    def __init__(self, failure: Exception):
        super().__init__(*TEXTS)
        self.failure = failure

    def mask(self, token_ids: Sequence[int]) -> TokenMask:
        if token_ids:
            raise self.failure
        return super().mask(token_ids)


@pytest.mark.parametrize("streams", [False, True])
def test_texts_are_within_the_constraint_and_stop_at_its_end(engine: Engine, streams: bool) -> None:
    constraint = OneOf(*TEXTS)
    (drawn,) = run(answer(engine, PROMPT, n=8, streams=streams, seed=1, constraint=constraint))
    assert all(delta.token_ids in TEXTS for delta in drawn)
    assert {delta.finish_reason for delta in drawn} == {"stop"}
    assert constraint.threads == {"masks"}


def test_a_text_that_may_go_on_ends_with_end_of_text(engine: Engine) -> None:
    constraint = OneOf(TEXTS[0], TEXTS[0][:2])
    biased = {"temperature": 0, "logit_bias": {0: 1e4}, "constraint": constraint}
    ended, longer, going_on = (
        one(engine, PROMPT, **biased, **params)
        for params in ({}, {"min_tokens": 3}, {"ignore_eos": True})
    )
    assert (ended.token_ids, ended.finish_reason) == ([*TEXTS[0][:2], 0], "stop")
    assert longer.token_ids == going_on.token_ids == TEXTS[0]


def test_a_complete_text_ends_before_min_tokens(engine: Engine) -> None:
    delta = one(engine, PROMPT, constraint=OneOf(TEXTS[2]), min_tokens=9)
    assert (delta.token_ids, delta.finish_reason) == (TEXTS[2], "stop")


def test_stop_tokens_end_a_text_only_where_it_may_end(engine: Engine) -> None:
    stop = token(".")
    params = {"logit_bias": {stop: 1e4}, "stop_token_ids": {stop: stop}, "ignore_eos": True}
    delta = one(engine, PROMPT, constraint=OneOf(TEXTS[0], TEXTS[0][:2]), temperature=0, **params)
    assert (delta.text, delta.token_ids) == (" one two", [*TEXTS[0][:2], stop])


def test_a_text_that_is_cut_ends_with_length(engine: Engine) -> None:
    delta = one(engine, PROMPT, constraint=OneOf(TEXTS[0]), max_new_tokens=2)
    assert (delta.text, delta.finish_reason) == (" one two", "length")
    whole = one(engine, PROMPT, constraint=OneOf(TEXTS[0]), max_new_tokens=3)
    assert (whole.text, whole.finish_reason) == (" one two three", "stop")


def test_log_probabilities_are_of_the_model_without_the_constraint(engine: Engine) -> None:
    delta = one(engine, PROMPT, constraint=OneOf(TEXTS[2]), num_logprobs=1)
    assert delta.logprobs[0].token_id == TEXTS[2][0]
    assert delta.logprobs[0].logprob < delta.logprobs[0].top[0][1]


@pytest.mark.parametrize("streams", [False, True])
def test_a_forbidden_word_is_gone_round(filtered: Callable[[str], Engine], streams: bool) -> None:
    engine = filtered("three")
    (drawn,) = run(answer(engine, PROMPT, n=8, streams=streams, constraint=OneOf(*TEXTS[:2])))
    assert {(delta.text, delta.finish_reason) for delta in drawn} == {(" one two four", "stop")}


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(("word", "left"), [("three", " one two"), ("one", "")])
def test_a_constraint_that_needs_a_forbidden_word_ends_with_content_filter(
    filtered: Callable[[str], Engine], streams: bool, word: str, left: str
) -> None:
    engine = filtered(word)
    delta = one(engine, PROMPT, streams=streams, constraint=OneOf(TEXTS[0]))
    assert (delta.text, delta.finish_reason) == (left, "content_filter")


@pytest.mark.parametrize("failure", [ConstraintFailed("structured_outputs"), RuntimeError()])
def test_a_constraint_that_fails_ends_its_request_alone(engine: Engine, failure: Any) -> None:
    failing = deltas(engine, PROMPT, constraint=Failing(failure))
    error, other = run(failing, answer(engine, PROMPT, seed=1, max_new_tokens=9))
    assert isinstance(error, InferenceError)
    assert failure in (error, error.__cause__)
    assert other == run(answer(engine, PROMPT, seed=1, max_new_tokens=9))[0]


def test_a_constraint_on_one_row_changes_no_other(engine: Engine) -> None:
    free = {"seed": 1, "max_new_tokens": 9}
    constrained = answer(engine, PROMPT, n=3, seed=2, constraint=OneOf(*TEXTS))
    together = run(answer(engine, PROMPT, **free), constrained)
    assert together[0] == run(answer(engine, PROMPT, **free))[0]
    assert together[1] == run(answer(engine, PROMPT, n=3, seed=2, constraint=OneOf(*TEXTS)))[0]
