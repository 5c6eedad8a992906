"""What a request and its sequences know of themselves."""

import pytest

from engine import EngineRequest, Prompt, SamplingParams
from tests.support import sequences


@pytest.mark.parametrize(("num_prompt_tokens", "max_new_tokens"), [(1, 5), (5, 5), (6, 4), (9, 1)])
def test_fitted_cuts_to_what_the_context_holds(num_prompt_tokens: int, max_new_tokens: int) -> None:
    params = SamplingParams(max_new_tokens=5, top_k=3)
    fitted = params.fitted(num_prompt_tokens, max_model_len=10)
    assert fitted == SamplingParams(max_new_tokens=max_new_tokens, top_k=3)


@pytest.mark.parametrize("num_prompt_tokens", [0, 10, 11])
def test_fitted_refuses_a_prompt_without_room(num_prompt_tokens: int) -> None:
    with pytest.raises(ValueError, match="a prompt has 1 to 9 tokens"):
        SamplingParams().fitted(num_prompt_tokens, max_model_len=10)


def test_prompt_alone_may_fill_the_context() -> None:
    params = SamplingParams(max_new_tokens=0)
    assert params.fitted(10, max_model_len=10) == params


def new_request(seed: int | None, num_sequences: int = 2) -> EngineRequest:
    params = SamplingParams(seed=seed)
    return EngineRequest(Prompt([1], None), params, False, loop=None, num_sequences=num_sequences)


def test_sequences_have_random_streams_of_their_own() -> None:
    """The same for the same seed, however many there are; another one without a seed."""
    draws = [
        [seq.rng.random() for seq in new_request(seed, num_sequences).new_sequences()]
        for seed, num_sequences in ((1, 2), (1, 3), (2, 2), (None, 2), (None, 2))
    ]
    assert draws[0] == draws[1][:2]
    assert len({draw for drawn in draws[1:] for draw in drawn}) == 9


def test_sequence_finds_tokens_by_where_their_text_is() -> None:
    """Of "ab", "", "c": the second token has no text of its own."""
    (seq,) = sequences(output=(7, 8, 9))
    seq.text, seq.text_ends = "abc", [2, 2, 3]
    assert [seq.token_start(index) for index in (-1, 0, 1, 2)] == [0, 0, 0, 2]
    assert [seq.num_tokens_within(length) for length in range(4)] == [0, 0, 2, 3]
    seq.num_released_tokens = 1
    assert seq.num_tokens_within(0) == 1


def test_sequence_counts_prompt_and_output() -> None:
    (seq,) = sequences(prompt=[4, 5])
    assert (seq.num_tokens, seq.last_token_id) == (2, 5)
    seq.output_token_ids.append(6)
    assert (seq.num_tokens, seq.last_token_id) == (3, 6)
