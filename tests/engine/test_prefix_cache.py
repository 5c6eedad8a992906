"""Prompts that begin as others did: the same bits, in less time, within bounded memory."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import Delta, Engine, SamplingParams
from engine.cache import PREFIX_BLOCK_TOKENS, KVCache
from engine.kernels import choose_kernel
from engine.model_runner import ModelRunner
from engine.prefix_cache import PrefixCache
from engine.request import Sequence
from tests.support import complete, load, run, sequences, tiny_llama, tokenizer, until

BLOCK = PREFIX_BLOCK_TOKENS
MANY_BYTES = 64 << 20
TOKEN_IDS = torch.randint(8192, (512,), generator=torch.Generator().manual_seed(0)).tolist()
# Around the borders of blocks, and the longest that leaves room for a token.
LENGTHS = [BLOCK + 1, 2 * BLOCK, 3 * BLOCK - 1, 3 * BLOCK + 1, 4 * BLOCK + 3, 9 * BLOCK + 19, 511]


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    made = ModelRunner(
        load(),
        max_num_seqs=8,
        max_model_len=512,
        kernel=choose_kernel(torch.float32, "cpu", "int8"),
    )
    if not made.is_exact:
        pytest.skip("no int8 kernel on this processor")
    return made


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = Engine(
        load(), tokenizer, quantization="int8", prefix_cache_bytes=MANY_BYTES, num_threads=1
    )
    if not made.runner.is_exact:
        pytest.skip("no int8 kernel on this processor")
    yield made
    made.stop()


def begin(runner: ModelRunner, token_ids: list[int], company: list[Sequence]) -> tuple[Tensor, int]:
    """The logits of a prompt's first two tokens, (2, vocab), beside sequences that run; and how
    many of its tokens were not computed."""
    (seq,) = sequences(prompt=token_ids)
    seq.num_cached_tokens = runner.num_cached_tokens(seq.request)
    running = [*company, seq]
    with torch.inference_mode():
        if company:
            runner.forward(company, len(company))
            for each in company:
                each.output_token_ids.append(7)
        first = runner.forward(running, 1)[-1]
        for each in running:
            each.output_token_ids.append(9)
        second = runner.forward(running, 0)[-1]
    return torch.stack((first, second)), seq.num_cached_tokens


@pytest.mark.parametrize(("num_threads", "lengths"), [(1, LENGTHS), (2, LENGTHS[3::3])])
def test_hit_gives_the_bits_of_a_miss(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, num_threads: int, lengths: list[int]
) -> None:
    """Whatever part of a prompt was known, in another row, alone and beside others. The fused
    kernel for attention gave other bits where it got fewer queries."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for length in lengths:
            token_ids = TOKEN_IDS[:length]
            monkeypatch.setattr(runner, "prefixes", None)
            missed, num_cached = begin(runner, token_ids, [])
            assert num_cached == 0
            for num_blocks in {1, (length - 1) // BLOCK}:
                monkeypatch.setattr(runner, "prefixes", PrefixCache(runner.cache, MANY_BYTES))
                begin(runner, [*TOKEN_IDS[: num_blocks * BLOCK], 1, 2, 3], sequences(prompt=[5]))
                hit, num_cached = begin(runner, token_ids, sequences(prompt=[5] * 9, count=3))
                assert num_cached == num_blocks * BLOCK
                assert torch.equal(hit, missed), length
    finally:
        torch.set_num_threads(before)


# --- The blocks themselves, on a cache that no model has filled -----------------------------------


@pytest.fixture
def cache() -> KVCache:
    made = KVCache(tiny_llama(), 3, 256)
    made.resize(256, 0)
    for layer in made.layers:
        layer.copy_(torch.randn(layer.shape))
    return made


def new_prefixes(cache: KVCache, num_blocks: int) -> PrefixCache:
    one_block = 4 * 2 * 2 * 2 * BLOCK * 8  # of 2 layers, keys and values, heads, numbers
    return PrefixCache(cache, num_blocks * one_block + 100)


def num_known(prefixes: PrefixCache, *firsts: int, length: int = 256) -> list[int]:
    """The known blocks of prompts that begin with these tokens."""
    prompts = ([first, *TOKEN_IDS[1:length]] for first in firsts)
    return [prefixes.num_cached_tokens(prompt, ("",)) // BLOCK for prompt in prompts]


def test_prefix_cache_gives_a_row_what_another_had(cache: KVCache) -> None:
    prefixes = new_prefixes(cache, 9)
    wanted = [layer[:, 0].clone() for layer in cache.layers]
    prefixes.store(TOKEN_IDS[: 3 * BLOCK + 8], ("",), 0)
    prefixes.load(TOKEN_IDS[: 2 * BLOCK + 9], ("",), 2 * BLOCK, 2)
    for layer, before in zip(cache.layers, wanted, strict=True):
        assert torch.equal(layer[:, 2, :, : 2 * BLOCK], before[:, :, : 2 * BLOCK])
        assert not torch.equal(layer[:, 2, :, 2 * BLOCK :], before[:, :, 2 * BLOCK :])


def test_prefix_cache_leaves_a_token_to_compute(cache: KVCache) -> None:
    prefixes = new_prefixes(cache, 9)
    prefixes.store(TOKEN_IDS[: 2 * BLOCK], ("",), 0)
    lengths = [1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1, 256]
    known = [prefixes.num_cached_tokens(TOKEN_IDS[:length], ("",)) for length in lengths]
    assert known == [0, 0, BLOCK, BLOCK, 2 * BLOCK, 2 * BLOCK]


def test_prefix_cache_finds_a_block_only_behind_the_same_tokens_and_salt(cache: KVCache) -> None:
    """The second block is the same in both prompts, and what comes before it is not."""
    prefixes = new_prefixes(cache, 9)
    prefixes.store(TOKEN_IDS[: 3 * BLOCK + 8], ("",), 0)
    assert num_known(prefixes, TOKEN_IDS[0], 1) == [3, 0]
    assert prefixes.num_cached_tokens(TOKEN_IDS[: 3 * BLOCK + 8], ("another",)) == 0
    prefixes.store([1, *TOKEN_IDS[1 : 3 * BLOCK + 8]], ("",), 1)
    assert num_known(prefixes, 1) == [3]


def test_prefix_cache_compares_names_and_not_their_hashes_alone(cache: KVCache) -> None:
    """-1 and -2 have the same hash."""
    prefixes = new_prefixes(cache, 9)
    prefixes.store([-1] * (BLOCK + 1), ("",), 0)
    assert hash((-1,) * BLOCK) == hash((-2,) * BLOCK)
    assert prefixes.num_cached_tokens([-2] * (BLOCK + 1), ("",)) == 0


def test_prefix_cache_drops_the_least_recently_used_and_takes_no_more_memory(
    cache: KVCache,
) -> None:
    prefixes = new_prefixes(cache, 5)
    for first in (1, 2):
        prefixes.store([first, *TOKEN_IDS[1 : 2 * BLOCK + 2]], ("",), 0)
    prefixes.store([1, *TOKEN_IDS[1 : 2 * BLOCK + 2]], ("",), 0)  # now 2 is the older one
    prefixes.store([3, *TOKEN_IDS[1 : 2 * BLOCK + 2]], ("",), 1)
    assert num_known(prefixes, 1, 2, 3) == [2, 1, 2]
    prefixes.store([4, *TOKEN_IDS[1 : 4 * BLOCK]], ("",), 1)
    assert num_known(prefixes, 1, 2, 3, 4) == [0, 0, 1, 4]
    assert len(prefixes.blocks) + len(prefixes.free_places) == prefixes.num_blocks == 5
    assert len({block.place for block in prefixes.blocks.values()}) == 5


def test_prefix_cache_keeps_the_beginning_of_a_prompt_that_has_no_room(cache: KVCache) -> None:
    prefixes = new_prefixes(cache, 2)
    prefixes.store(TOKEN_IDS[:256], ("",), 0)
    assert num_known(prefixes, TOKEN_IDS[0]) == [2]


def test_prefix_cache_without_room_for_a_block_is_refused(cache: KVCache) -> None:
    with pytest.raises(ValueError, match="32 tokens take 8192 bytes"):
        new_prefixes(cache, 0)


# --- In the engine --------------------------------------------------------------------------------

PARAMS = SamplingParams(seed=1, max_new_tokens=5, num_logprobs=1, ignore_eos=True)


async def ask(
    engine: Engine, token_ids: list[int], params: SamplingParams = PARAMS, **options: Any
) -> tuple[int, list[Delta]]:
    """How many tokens of a prompt were found, and what came of it."""
    request = engine.submit(token_ids, params, **options)
    deltas = await complete(engine, request)
    return request.num_cached_tokens, deltas


def prompt(first: int, length: int = 3 * BLOCK + 8) -> list[int]:
    return [first, *TOKEN_IDS[1:length]]


def test_engine_finds_how_a_prompt_before_began(engine: Engine) -> None:
    """Also of several sequences, and of prompts that come together."""
    ((_, first),) = run(ask(engine, prompt(1)))
    found = run(
        ask(engine, prompt(1), num_sequences=2),
        ask(engine, prompt(2)),
        ask(engine, [*prompt(2, 3 * BLOCK - 1), 3, 4]),
        ask(engine, prompt(1)),
    )
    assert [num_cached for num_cached, _ in found] == [3 * BLOCK, 0, 2 * BLOCK, 3 * BLOCK]
    assert found[0][1][0] == found[3][1][0] == first[0]


def test_engine_keeps_what_an_aborted_request_has_computed(engine: Engine) -> None:
    endless = SamplingParams(max_new_tokens=300, ignore_eos=True)

    async def leave() -> None:
        stream = engine.stream(engine.submit(prompt(5), endless, streams=True))
        await anext(stream)
        await stream.aclose()
        await until(lambda: engine.num_running == 0)

    _, (num_cached, left) = run(leave())[0], run(ask(engine, prompt(5)))[0]
    assert num_cached == 3 * BLOCK
    engine.runner.prefixes = PrefixCache(engine.runner.cache, MANY_BYTES)
    assert run(ask(engine, prompt(5))) == [(0, left)]


def test_engine_forgets_when_its_model_leaves_memory(engine: Engine) -> None:
    (before,) = run(ask(engine, prompt(6)))
    engine.unload()
    engine.load(load())
    assert run(ask(engine, prompt(6))) == [before]
    assert run(ask(engine, prompt(6)))[0][0] == 3 * BLOCK


def test_engine_scores_a_prompt_whose_beginning_it_has_scored(engine: Engine) -> None:
    """As of the answers to one question; what was not scored, or in another way, does not
    do."""

    def score(token_ids: list[int], num_top: int | None, ranks: bool = False) -> tuple[int, Any]:
        params = SamplingParams(
            max_new_tokens=1, seed=1, num_prompt_logprobs=num_top, ranks_prompt=ranks
        )

        async def ask() -> tuple[int, Any]:
            request = engine.submit(token_ids, params)
            await complete(engine, request)
            return request.num_cached_tokens, request.prompt_logprobs

        return run(ask())[0]

    question, answers = prompt(8), ([3, 4], [5], [9] * 2 * BLOCK)
    missed = [score([*question, *answer], 2)[1] for answer in answers]
    engine.runner.prefixes = PrefixCache(engine.runner.cache, MANY_BYTES)
    ways = ((None,), (2,), (1,), (2, True), (2,))
    assert [score(question, *way)[0] for way in ways] == [0] * len(ways)
    for answer, logprobs in zip(answers, missed, strict=True):
        assert score([*question, *answer], 2) == (3 * BLOCK, logprobs)
    assert score([*question, *answers[2]], 2) == (5 * BLOCK, missed[2])
    assert score(question, None)[0] == 3 * BLOCK


def test_engine_shares_nothing_where_bits_would_change(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "engine")
    made = Engine(tiny_llama(), tokenizer, prefix_cache_bytes=MANY_BYTES, num_threads=1)
    try:
        assert [run(ask(made, prompt(1)))[0][0] for _ in range(2)] == [0, 0]
    finally:
        made.stop()
    (line,) = [line for line in caplog.messages if "prefixes are not cached" in line]
    assert line.startswith("LlamaForCausalLM, ")
