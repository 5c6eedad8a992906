"""The engine: scheduler with integers, sampler against its definitions, then real models.

Parity: greedy float32 gives what `model.generate` gives, token for token, whoever joins and
leaves meanwhile. Seeds: a request gives the same bits alone and in a full mixed batch.
Filter: a forbidden word leaks at no token border, streamed or not. Nothing here depends
on what the bundled model says; where a test needs a certain text, `saying` makes it come.
"""

import asyncio
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

import engine.engine as engine_module
from engine import (
    Delta,
    Engine,
    EngineRequest,
    EngineStoppedError,
    InferenceError,
    QueueFullError,
    SamplingParams,
)
from engine.cache import KVCache
from engine.kernels import ONEDNN, PackedLinear, what_is_wrong_with
from engine.request import Sequence, Status
from engine.sampler import _keep_likeliest, edit_logits, sample
from engine.scheduler import SHORT_PROMPT_TOKENS, Scheduler
from engine.weights import move_to_huge_pages
from main import ContentFilter

FOLDER = Path(__file__).parent / "gpt2-tales"

transformers_logging.disable_progress_bar()
tokenizer = AutoTokenizer.from_pretrained(FOLDER)

SHORT = "Once upon a time"
LONG = "The old king had three sons, and the youngest of them was called a fool by all. " * 5


def ids(text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


def token(text: str) -> int:
    """The id of the one token that text is."""
    (token_id,) = ids(text)
    return token_id


def load(dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype)


def tiny_llama(head_dim: int = 8, max_position_embeddings: int = 256) -> Any:
    """Random weights, the same at every call; four query heads for each of the two of keys."""
    config = LlamaConfig(
        vocab_size=8192, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=2, head_dim=head_dim,
        max_position_embeddings=max_position_embeddings, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def sequences(
    params: SamplingParams = SamplingParams(),  # noqa: B008
    *,
    prompt: list[int] | None = None,
    output: tuple[int, ...] = (),
    count: int = 1,
    seed: int = 0,
) -> list[Sequence]:
    """The sequences of one request, as the engine makes them."""
    request = EngineRequest(prompt or [1], params, "", 0, False, loop=None)
    seqs = [Sequence(request, index, seed) for index in range(count)]
    for seq in seqs:
        seq.output_token_ids += output
    return seqs


async def complete(engine: Engine, request: EngineRequest) -> list[Delta]:
    """Every delta of a request, of one that does not stream one a sequence."""
    return [delta async for delta in engine.stream(request)]


async def deltas(
    engine: Engine, prompt: str, *, n: int = 1, streams: bool = True, **params: Any
) -> list[Delta]:
    """Every delta of one request, as they come."""
    request = engine.submit(ids(prompt), SamplingParams(**params), num_sequences=n, streams=streams)
    return await complete(engine, request)


async def answer(engine: Engine, prompt: str, **params: Any) -> list[Delta]:
    """Every sequence of one request as one delta; what was streamed is put together."""
    answers: dict[int, Delta] = {}
    for delta in await deltas(engine, prompt, **{"streams": False, **params}):
        old = answers.get(delta.index, Delta(delta.index, "", [], [], None))
        answers[delta.index] = Delta(
            delta.index,
            old.text + delta.text,
            old.token_ids + delta.token_ids,
            old.logprobs + delta.logprobs,
            delta.finish_reason,
        )
    return [answers[index] for index in sorted(answers)]


def run(*requests: Coroutine[Any, Any, Any]) -> list[Any]:
    """What the requests give that run at the same time; an error in an error's place."""

    async def together() -> list[Any]:
        async with asyncio.timeout(60):
            return await asyncio.gather(*requests, return_exceptions=True)

    return asyncio.run(together())


def one(engine: Engine, prompt: str, **params: Any) -> Delta:
    """The only sequence of a request that runs alone."""
    ((delta,),) = run(answer(engine, prompt, **params))
    return delta


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


def saying(*token_ids: int) -> dict[str, Any]:
    """Parameters under which the model says these tokens, all different, in turn, for ever.

    Each time one is said, it falls behind the others.
    """
    count = len(token_ids)
    bias = {token_id: 1e5 + 200.0 * (count - i) for i, token_id in enumerate(token_ids)}
    return {"temperature": 0, "logit_bias": bias, "frequency_penalty": 200.0 * (count + 1)}


def among(*texts: str) -> dict[int, float]:
    """A bias under which the model says nothing but these tokens, in whatever order."""
    return {token(text): 100.0 for text in texts}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """One thread is as fast with so small a model, and in nobody's way."""
    made = Engine(load(), tokenizer, num_threads=1)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def parallel_engine() -> Iterator[Engine]:
    """As many threads as there are cores, which is the default."""
    made = Engine(load(), tokenizer)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def bfloat16_engine() -> Iterator[Engine]:
    if problem := what_is_wrong_with(ONEDNN, torch.bfloat16):
        pytest.skip(f"bfloat16 is left out: {problem}")
    made = Engine(load(torch.bfloat16), tokenizer)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def llama_engine() -> Iterator[Engine]:
    made = Engine(tiny_llama(), tokenizer, max_num_seqs=4, num_threads=1)
    yield made
    made.stop()


@pytest.fixture
def small_engine() -> Iterator[Engine]:
    """Two places, two requests may wait; its own model, so that a test may break it."""
    sizes = {"max_num_seqs": 2, "max_queue_size": 2, "max_model_len": 128}
    made = Engine(load(), tokenizer, **sizes, num_threads=1)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def reference() -> Any:
    return load().eval()


@pytest.fixture
def filtered(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Engine]:
    """The engine under a filter for the given words, until the end of the test."""

    def set_filter(words: str) -> Engine:
        monkeypatch.setattr(engine.output, "text_filter", ContentFilter(words))
        return engine

    return set_filter


# --- Scheduler ----------------------------------------------------------------------------------


def prompts(*lengths: int) -> list[Sequence]:
    return [seq for n in lengths for seq in sequences(prompt=[1] * n)]


def test_scheduler_first_come_first_served() -> None:
    scheduler = Scheduler(max_num_seqs=2, max_queue_size=9)
    seqs = prompts(1, 1, 1)
    for seq in seqs:
        scheduler.add([seq])
    assert scheduler.schedule() == seqs[:2] == scheduler.running
    assert [seq.status for seq in seqs] == [Status.RUNNING, Status.RUNNING, Status.WAITING]


def test_scheduler_full_queue_refuses_at_once_and_queues_nothing() -> None:
    scheduler = Scheduler(max_num_seqs=2, max_queue_size=2)
    scheduler.add(sequences(count=3))
    scheduler.add(sequences(count=3))
    with pytest.raises(QueueFullError):
        scheduler.add(sequences(count=2))
    assert len(scheduler.waiting) == 6
    assert scheduler.num_waiting_requests() == 2


def test_scheduler_accepts_again_after_admission() -> None:
    scheduler = Scheduler(max_num_seqs=1, max_queue_size=1)
    scheduler.add(sequences())
    scheduler.schedule()
    scheduler.add(sequences())
    assert scheduler.num_waiting_requests() == 1


def test_scheduler_free_places_are_no_queue() -> None:
    """A burst was refused although there were places for it."""
    scheduler = Scheduler(max_num_seqs=3, max_queue_size=1)
    for _ in range(4):
        scheduler.add(sequences())
    with pytest.raises(QueueFullError):
        scheduler.add(sequences())
    assert len(scheduler.waiting) == 4


def test_scheduler_short_prompts_join_together() -> None:
    scheduler = Scheduler(max_num_seqs=9, max_queue_size=9)
    half = SHORT_PROMPT_TOKENS // 2
    for seq in prompts(half, half, half):
        scheduler.add([seq])
    assert [len(scheduler.schedule()) for _ in range(3)] == [2, 1, 0]


@pytest.mark.parametrize("lengths", [(99, 99, 1), (1, 99, 99), (99, 1, 99)])
def test_scheduler_long_prompt_joins_alone(lengths: tuple[int, ...]) -> None:
    scheduler = Scheduler(max_num_seqs=9, max_queue_size=9)
    seqs = prompts(*lengths)
    for seq in seqs:
        scheduler.add([seq])
    assert [scheduler.schedule() for _ in seqs] == [[seq] for seq in seqs]


def test_scheduler_sequences_of_one_request_count_once() -> None:
    scheduler = Scheduler(max_num_seqs=9, max_queue_size=9)
    scheduler.add(sequences(prompt=[1] * 99, count=4))
    scheduler.add(sequences())
    assert [len(scheduler.schedule()) for _ in range(2)] == [4, 1]


def test_scheduler_sequences_of_one_request_wait_for_places_apart() -> None:
    scheduler = Scheduler(max_num_seqs=3, max_queue_size=9)
    seqs = sequences(count=4)
    scheduler.add(seqs)
    assert scheduler.schedule() == seqs[:3]
    assert scheduler.schedule() == []
    scheduler.finish(seqs[0])
    assert scheduler.schedule() == seqs[3:]


def test_scheduler_finish_moves_last_row_into_the_hole() -> None:
    scheduler = Scheduler(max_num_seqs=4, max_queue_size=9)
    a, b, c, d = seqs = sequences(count=4)
    scheduler.add(seqs)
    scheduler.schedule()
    assert scheduler.finish(b) == (3, 1)
    assert scheduler.running == [a, d, c]
    assert scheduler.finish(c) is None
    assert scheduler.running == [a, d]
    assert b.status is c.status is Status.FINISHED


def test_scheduler_is_finished() -> None:
    scheduler = Scheduler(max_num_seqs=1, max_queue_size=9)
    assert scheduler.is_finished
    (seq,) = sequences()
    scheduler.add([seq])
    assert not scheduler.is_finished
    scheduler.schedule()
    assert not scheduler.is_finished
    scheduler.finish(seq)
    assert scheduler.is_finished


# --- The cache ----------------------------------------------------------------------------------


def test_cache_keeps_rows_when_its_capacity_changes_and_takes_no_new_memory() -> None:
    """Values that began elsewhere with each capacity would fill memory anew with each."""
    cache = KVCache(tiny_llama(), 3, 256)
    kept = torch.randn(cache.layers[0][:, :2, :, :64].shape)
    cache.layers[0][:, :2, :, :64] = kept
    addresses = []
    for num_tokens in (65, 256, 64):
        cache.resize(num_tokens, 2)
        assert torch.equal(cache.layers[0][:, :2, :, :64], kept)
        addresses.append([half.data_ptr() for half in cache.layers[0]])
    assert addresses == [addresses[0]] * 3


# --- Weights ------------------------------------------------------------------------------------


def gives_huge_pages() -> bool:
    """Whether this system gives huge pages to those who ask, and only to them, at once."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    release = tuple(map(int, re.findall("[0-9]+", os.uname().release)[:2]))
    return setting.exists() and "[madvise]" in setting.read_text() and release >= (6, 1)


def huge_kib() -> int:
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return int(re.findall("AnonHugePages: *([0-9]+)", rollup)[0])


@pytest.mark.skipif(not gives_huge_pages(), reason="needs Linux 6.1 with huge pages on request")
def test_weights_move_to_huge_pages() -> None:
    if problem := what_is_wrong_with(ONEDNN, torch.float32):
        pytest.skip(f"packed weights are left out: {problem}")
    layer, x = PackedLinear(torch.randn(2048, 4096), None), torch.randn(2, 4096)  # 32 MiB
    before, before_kib = layer(x), huge_kib()
    move_to_huge_pages([layer.weight])
    assert huge_kib() >= before_kib + (16 << 10)
    assert torch.equal(layer(x), before)


# --- Sampling -----------------------------------------------------------------------------------


def random_logits(rows: int, vocab: int, seed: int = 0) -> Tensor:
    """(rows, vocab) float32 with the ties that bfloat16 logits have."""
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, vocab, generator=generator)).bfloat16().float()


def draws(logits: Tensor, params: SamplingParams, count: int) -> Tensor:
    """How often each token is drawn from one row of logits (vocab,): (vocab,) counts."""
    counts = torch.zeros(len(logits), dtype=torch.int64)
    for start in range(0, count, 500):
        seqs = [sequences(params, seed=start + i)[0] for i in range(500)]
        drawn = sample(logits.repeat(500, 1), seqs)
        counts += torch.bincount(torch.tensor(drawn), minlength=len(logits))
    return counts


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """What `draws` should follow, by the definitions: (vocab,) float64."""
    weights = torch.softmax(logits.double() / params.temperature, dim=-1)
    order = weights.argsort(descending=True, stable=True)
    if params.top_k:
        weights[order[params.top_k :]] = 0
    weights /= weights.sum()
    before = weights[order].cumsum(-1) - weights[order]
    weights[order[before >= params.top_p]] = 0
    weights[weights < params.min_p * weights.max()] = 0
    return weights / weights.sum()


def edited(logits: Tensor, seq: Sequence, eos: tuple[int, ...] = ()) -> Tensor:
    """One row of logits (vocab,) after `edit_logits`."""
    rows = logits[None].clone()
    edit_logits(rows, [seq], set(eos))
    return rows[0]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, top_k=50, top_p=0.1),
        SamplingParams(top_k=1),
        SamplingParams(temperature=2, top_k=1),
        SamplingParams(top_p=1e-9),
        SamplingParams(top_k=50, top_p=1e-9),
        SamplingParams(top_k=2000, top_p=1e-9),
        SamplingParams(min_p=1),
        SamplingParams(temperature=1e-6),
        SamplingParams(temperature=1e-300),
    ],
)
def test_sample_only_the_likeliest(params: SamplingParams) -> None:
    logits = torch.randn(8, 5000, generator=torch.Generator().manual_seed(0))
    seqs = [sequences(params, seed=seed)[0] for seed in range(8)]
    assert sample(logits, seqs) == logits.argmax(-1).tolist()


def test_sample_min_p_drops_the_unlikely() -> None:
    logits = torch.log(torch.tensor([0.5, 0.26, 0.24] + [1e-9] * 97))
    counts = draws(logits, SamplingParams(min_p=0.5), 500)
    assert counts[:2].min() > 0
    assert counts[2:].sum() == 0


@pytest.mark.parametrize("top_k", [0, 3, 100])
def test_sample_never_draws_what_is_banned(top_k: int) -> None:
    logits = random_logits(1, 2000)[0]
    likeliest = int(logits.argmax())
    params = SamplingParams(top_k=top_k, logit_bias={likeliest: -float("inf")})
    counts = draws(edited(logits, sequences(params)[0]), params, 500)
    assert counts[likeliest] == 0


def test_sample_large_logits_do_not_overflow() -> None:
    logits = torch.full((1, 100), -1e30)
    logits[0, 7] = 1e30
    assert sample(logits, sequences(SamplingParams(temperature=0.01))) == [7]


FLAT = torch.linspace(0, 0.5, 5000)  # the nucleus of 0.9 has some 4,400 tokens
PEAKED = random_logits(1, 5000, seed=5)[0]


@pytest.mark.parametrize(
    ("logits", "params"),
    [
        (PEAKED, SamplingParams()),
        (PEAKED, SamplingParams(temperature=0.7)),
        (PEAKED, SamplingParams(top_k=40)),
        (PEAKED, SamplingParams(top_k=64, top_p=0.8)),
        (PEAKED, SamplingParams(top_k=200)),
        (PEAKED, SamplingParams(top_p=0.7, temperature=0.8)),
        (PEAKED, SamplingParams(top_p=0.9, min_p=0.1)),
        (FLAT, SamplingParams(top_p=0.9)),
        (FLAT, SamplingParams(top_k=3000, top_p=0.9)),
        (FLAT, SamplingParams()),
    ],
)
def test_sample_follows_the_distribution(logits: Tensor, params: SamplingParams) -> None:
    """Pearson's test over ten groups of tokens of about equal probability."""
    expected = probabilities(logits, params)
    counts = draws(logits, params, 1000)
    assert counts[expected == 0].sum() == 0
    order = expected.argsort(descending=True)
    group = (expected[order].cumsum(-1) * 10 - 1e-9).long().clamp(max=9)
    wanted = torch.zeros(10, dtype=torch.float64).index_add(0, group, expected[order] * 1000)
    got = torch.zeros(10, dtype=torch.float64).index_add(0, group, counts[order].double())
    kept = wanted > 0
    statistic = ((got - wanted)[kept] ** 2 / wanted[kept]).sum()
    assert statistic < 30, f"{got.tolist()} instead of {wanted.tolist()}"


@pytest.mark.parametrize("limit", [0, 1e-9, 0.5, 1.0, 2.75, 100, 1e9])
@pytest.mark.parametrize(
    "weights", [PEAKED.exp(), FLAT.exp(), torch.ones(300), torch.eye(1, 300)[0]]
)
def test_keep_likeliest_keeps_what_sorting_would(weights: Tensor, limit: float) -> None:
    """Of equal ones the first; the last one kept may reach beyond the limit."""
    order = weights.argsort(descending=True, stable=True)
    before = weights[order].double().cumsum(0) - weights[order]
    expected = torch.zeros_like(weights)
    num_kept = max(1, int((before < limit).sum()))
    expected[order[:num_kept]] = weights[order[:num_kept]]
    kept = weights.clone()
    _keep_likeliest(kept, weights, limit)
    assert kept.tolist() == expected.tolist()


MIXED = [
    SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature in (0, 0.5, 1.3)
    for top_k in (0, 50, 100, 1500)
    for top_p in (1, 0.9, 0.999)
    for min_p in (0, 0.02)
]


@pytest.mark.parametrize("vocab", [50, 500, 5000])
def test_sample_row_does_not_depend_on_the_others(vocab: int) -> None:
    logits = random_logits(len(MIXED), vocab)
    seeded = list(enumerate(MIXED))
    together = sample(logits.clone(), [sequences(params, seed=i)[0] for i, params in seeded])
    alone = [sample(logits[i : i + 1], sequences(params, seed=i))[0] for i, params in seeded]
    differ = [
        (MIXED[i], a, b) for i, (a, b) in enumerate(zip(alone, together, strict=True)) if a != b
    ]
    assert not differ


def test_edit_logits_repetition_penalty() -> None:
    """CTRL's formula: of what is in prompt or output, once, positive logits shrink."""
    params = SamplingParams(repetition_penalty=2.0)
    (seq,) = sequences(params, prompt=[0, 1, 1], output=(2, 2))
    got = edited(torch.tensor([4.0, -4.0, 3.0, 5.0]), seq)
    assert got.tolist() == [2.0, -8.0, 1.5, 5.0]


def test_edit_logits_presence_and_frequency_penalty() -> None:
    """OpenAI's formula: of the output alone."""
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    (seq,) = sequences(params, prompt=[0], output=(1, 2, 2, 2))
    got = edited(torch.tensor([1.0, 1.0, 1.0, 1.0]), seq)
    assert got.tolist() == [1.0, 0.25, -0.25, 1.0]


def test_edit_logits_bias_is_added() -> None:
    (seq,) = sequences(SamplingParams(logit_bias={1: 5.0, 2: -float("inf")}))
    assert edited(torch.ones(3), seq).tolist() == [1.0, 6.0, -float("inf")]


@pytest.mark.parametrize(("num_output", "is_blocked"), [(0, True), (2, True), (3, False)])
def test_edit_logits_min_tokens_blocks_end_of_text(num_output: int, is_blocked: bool) -> None:
    (seq,) = sequences(SamplingParams(min_tokens=3), output=(1,) * num_output)
    got = edited(torch.ones(5), seq, eos=(0, 4))
    assert [value == -float("inf") for value in got[[0, 4]]] == [is_blocked] * 2
    assert got[1:4].tolist() == [1, 1, 1]


def test_edit_logits_min_tokens_without_end_of_text() -> None:
    (seq,) = sequences(SamplingParams(min_tokens=3))
    assert edited(torch.ones(5), seq).tolist() == [1] * 5


def test_edit_logits_leaves_the_other_rows_alone() -> None:
    params = SamplingParams(repetition_penalty=2.0, logit_bias={1: 1.0}, presence_penalty=1.0)
    seqs = [*sequences(), *sequences(params, output=(2,)), *sequences()]
    logits = torch.ones(3, 4)
    edit_logits(logits, seqs, {0})
    assert logits[[0, 2]].tolist() == [[1] * 4] * 2


# --- Parity with model.generate -----------------------------------------------------------------

PARITY = [  # prompt, new tokens: some join while others run, and leave while others run
    ("The", 40),
    ("Once upon a time there was a king who", 7),
    (LONG[:200], 25),
    ("A fox", 60),
    (LONG, 30),
    ("In the wood there lived", 1),
    (LONG[40:190], 50),
    ("She said to him:", 33),
    ("He", 12),
]


def greedy(model: Any, prompt: str, num_tokens: int) -> list[int]:
    """What transformers generates, end-of-text included."""
    prompt_ids = torch.tensor([ids(prompt)])
    generated = model.generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        do_sample=False,
        max_new_tokens=num_tokens,
        pad_token_id=0,
    )
    return generated[0, prompt_ids.shape[1] :].tolist()


def check_parity(engine: Engine, generated: list[list[int]]) -> None:
    requests = (answer(engine, p, max_new_tokens=n, temperature=0) for p, n in PARITY)
    for (prompt, _), (got,), expected in zip(PARITY, run(*requests), generated, strict=True):
        assert got.token_ids == expected, (
            f"\nprompt:   {prompt!r}\nengine:   {tokenizer.decode(got.token_ids)!r}"
            f"\ngenerate: {tokenizer.decode(expected)!r}"
        )


@pytest.fixture(scope="module")
def generated(reference: Any) -> list[list[int]]:
    return [greedy(reference, prompt, num_tokens) for prompt, num_tokens in PARITY]


@pytest.mark.parametrize("max_num_seqs", [64, 3, 1])
def test_parity_gpt2(
    parallel_engine: Engine,
    generated: list[list[int]],
    max_num_seqs: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parallel_engine.scheduler, "max_num_seqs", max_num_seqs)
    check_parity(parallel_engine, generated)


def test_parity_llama_with_grouped_queries(llama_engine: Engine) -> None:
    model = tiny_llama()
    check_parity(llama_engine, [greedy(model, *request) for request in PARITY])


def test_parity_joining_in_the_middle(engine: Engine, reference: Any) -> None:
    """The second and third request come when the first has already got tokens."""

    async def join() -> list[list[int]]:
        params = SamplingParams(max_new_tokens=60, temperature=0)
        first = engine.stream(engine.submit(ids("The"), params, streams=True))
        got = (await anext(first)).token_ids
        joined = asyncio.gather(
            answer(engine, LONG, max_new_tokens=20, temperature=0),
            answer(engine, "A fox", max_new_tokens=9, temperature=0),
        )
        async for delta in first:
            got = got + delta.token_ids
        return [got, *(a.token_ids for (a,) in await joined)]

    expected = [greedy(reference, p, n) for p, n in (("The", 60), (LONG, 20), ("A fox", 9))]
    assert run(join()) == [expected]


def test_parity_up_to_the_end_of_the_context(llama_engine: Engine) -> None:
    prompt = tokenizer.decode(ids(LONG * 9)[:250])
    num_prompt_tokens = len(ids(prompt))
    (got,) = run(answer(llama_engine, prompt, max_new_tokens=50, temperature=0))[0]
    assert got.finish_reason == "length"
    assert got.token_ids == greedy(tiny_llama(), prompt, 256 - num_prompt_tokens)


def test_prompt_without_room_is_refused(llama_engine: Engine) -> None:
    async def submit(num_tokens: int) -> None:
        llama_engine.submit([1] * num_tokens, SamplingParams())

    for num_tokens in (0, 256, 1000):
        (error,) = run(submit(num_tokens))
        assert isinstance(error, ValueError)


# --- Seeds --------------------------------------------------------------------------------------

SEEDED: list[dict[str, Any]] = [
    {"prompt": "The", "seed": 1},
    {"prompt": SHORT, "seed": 2, "temperature": 0.7, "top_k": 50, "top_p": 0.9},
    {"prompt": LONG[:150], "seed": 3, "top_p": 0.95, "streams": True},
    {"prompt": "A fox", "seed": 4, "n": 3, "temperature": 1.4, "top_k": 100},
    {"prompt": LONG, "seed": 5, "min_p": 0.05, "repetition_penalty": 1.2, "streams": True},
    {"prompt": "He", "seed": 6, "temperature": 2.0, "presence_penalty": 0.5},
]


def fillers(engine: Engine, count: int) -> list[Coroutine[Any, Any, Any]]:
    """Requests of all kinds that keep joining and leaving."""
    return [
        answer(
            engine,
            LONG[: 10 + 97 * i % 400],
            max_new_tokens=5 + 17 * i % 50,
            n=1 + i % 3,
            temperature=(0, 0.5, 1, 1.5)[i % 4],
            top_k=(0, 20, 500)[i % 3],
            streams=i % 2 == 0,
        )
        for i in range(count)
    ]


def check_seeds(engine: Engine) -> None:
    """Not only the texts, the logits themselves have to be the same to the last bit."""
    wanted = [{"max_new_tokens": 60, "num_logprobs": 2, "ignore_eos": True, **r} for r in SEEDED]
    alone = [run(answer(engine, **request))[0] for request in wanted]
    others = fillers(engine, 30)
    requests = [answer(engine, **request) for request in wanted]
    together = run(*others[:12], *requests[:3], *others[12:], *requests[3:])
    got = together[12:15] + together[33:]
    assert [[a.text for a in r] for r in got] == [[a.text for a in r] for r in alone]
    assert got == alone


def test_seed_gives_the_same_bits_in_a_full_batch_float32(parallel_engine: Engine) -> None:
    check_seeds(parallel_engine)


def test_seed_gives_the_same_bits_in_a_full_batch_bfloat16(bfloat16_engine: Engine) -> None:
    check_seeds(bfloat16_engine)


def test_seed_gives_the_same_bits_in_a_full_batch_llama(llama_engine: Engine) -> None:
    check_seeds(llama_engine)


def test_seed_gives_the_same_bits_beside_a_longer_text() -> None:
    """In float32, where several queries share a key, how far the longest text went decided in
    which order more than 200 keys were summed."""
    llama = Engine(tiny_llama(head_dim=64, max_position_embeddings=1024), tokenizer)
    prompts = [tokenizer.decode(ids(LONG * 9)[:n]) for n in (200, 240, 600)]
    wanted = {"seed": 1, "max_new_tokens": 12, "num_logprobs": 1, "ignore_eos": True}
    try:
        alone = [run(answer(llama, prompt, **wanted))[0] for prompt in prompts]
        assert run(*(answer(llama, prompt, **wanted) for prompt in prompts)) == alone
    finally:
        llama.stop()


def test_seed_every_layer_gets_the_rows_that_it_needs(
    small_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output layer got one row for a request alone, whatever had been measured; oneDNN sums
    a single row in another order where it has no more than AVX."""
    forward, num_rows = small_engine.model.forward, []

    def count(**inputs: Any) -> Any:
        num_rows.extend([inputs["input_ids"].numel(), len(inputs["logits_to_keep"])])
        return forward(**inputs)

    alone = one(small_engine, SHORT, seed=1, max_new_tokens=9)
    monkeypatch.setattr(small_engine.model, "forward", count)
    monkeypatch.setattr(small_engine.runner, "min_rows", 5)
    assert one(small_engine, SHORT, seed=1, max_new_tokens=9).text == alone.text
    assert len(num_rows) == 2 * 9
    assert min(num_rows) >= 5


def test_seed_holds_with_fewer_places_than_sequences(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = {"prompt": SHORT, "seed": 7, "n": 5, "num_logprobs": 1, "ignore_eos": True}
    alone = run(answer(engine, **request))
    monkeypatch.setattr(engine.scheduler, "max_num_seqs", 3)
    assert run(answer(engine, **request), *fillers(engine, 5))[:1] == alone


def test_seed_sequences_of_one_request_differ(engine: Engine) -> None:
    drawn = run(answer(engine, SHORT, seed=1, n=8), answer(engine, SHORT, seed=1, n=8))
    assert drawn[0] == drawn[1]
    assert len({delta.text for delta in drawn[0]}) == 8


def test_seed_first_sequence_is_the_same_whatever_n(engine: Engine) -> None:
    several, (alone,) = run(answer(engine, SHORT, seed=1, n=3), answer(engine, SHORT, seed=1))
    assert several[0] == alone


def test_seed_different_ones_differ(engine: Engine) -> None:
    seeds = [0, 1, 2, 2**32, 2**32 + 1, 2**63 - 1]
    drawn = run(*(answer(engine, SHORT, seed=seed) for seed in seeds))
    assert len({delta.text for (delta,) in drawn}) == len(seeds)


def test_no_seed_draws_anew(engine: Engine) -> None:
    drawn = run(*(answer(engine, SHORT) for _ in range(4)))
    assert len({delta.text for (delta,) in drawn}) == 4


def test_int8_answers() -> None:
    int8 = Engine(load(), tokenizer, quantization="int8")
    try:
        drawn = run(*(answer(int8, p, max_new_tokens=n, ignore_eos=True) for p, n in PARITY))
        assert [len(delta.token_ids) for (delta,) in drawn] == [n for _, n in PARITY]
        first = one(int8, SHORT, seed=1)
        assert first == one(int8, SHORT, seed=1)
    finally:
        int8.stop()


# --- How a text ends ----------------------------------------------------------------------------


def test_length_is_exact(engine: Engine) -> None:
    drawn = run(*(answer(engine, SHORT, max_new_tokens=n, ignore_eos=True) for n in (1, 2, 50)))
    assert [(len(d.token_ids), d.finish_reason) for (d,) in drawn] == [
        (1, "length"),
        (2, "length"),
        (50, "length"),
    ]


@pytest.mark.parametrize("streams", [False, True])
def test_end_of_text_stops_and_leaves_no_trace(engine: Engine, streams: bool) -> None:
    script = saying(token(" one"), token(" two"), 0)
    got = one(engine, SHORT, streams=streams, **script)
    assert (got.text, got.finish_reason) == (" one two", "stop")
    assert got.token_ids == [token(" one"), token(" two"), 0]


def test_ignore_eos_goes_on(engine: Engine) -> None:
    script = saying(token(" one"), 0, token(" two"))
    got = one(engine, SHORT, max_new_tokens=6, ignore_eos=True, **script)
    assert (got.text, got.finish_reason) == (" one two one two", "length")


def test_min_tokens_delays_end_of_text(engine: Engine) -> None:
    params = {"temperature": 0, "logit_bias": {0: 1e5}}
    assert one(engine, SHORT, **params).token_ids == [0]
    got = one(engine, SHORT, min_tokens=5, **params)
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
    got = one(engine, SHORT, stop=stop, streams=streams, max_new_tokens=6, **ONE_TWO_THREE)
    assert got.text == text
    assert got.finish_reason == ("length" if stop == ("zero",) else "stop")


def test_stop_string_never_leaks_into_a_stream(engine: Engine) -> None:
    """Letters come one at a time; each that may begin a stop string waits for the next."""
    script = saying(*map(token, "abcdef"))
    (got,) = run(deltas(engine, SHORT, stop=("cdx", "efabce", "fabcdef"), **script))
    assert "".join(delta.text for delta in got) == "abcde"
    assert got[-1].finish_reason == "stop"
    texts = [delta.text for delta in got[:3]]
    assert texts == ["a", "b", "cd"]


def test_stop_string_streamed_and_not_streamed_agree(engine: Engine) -> None:
    """Texts of three letters at random, so that beginnings of stop strings abound."""
    params = {"logit_bias": among("a", "b", "c"), "stop": ("abca", "bb", "cab"), "temperature": 2}
    whole = run(*(answer(engine, SHORT, seed=i, **params) for i in range(30)))
    parts = run(*(answer(engine, SHORT, seed=i, streams=True, **params) for i in range(30)))
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
    got = one(filtered("hate*"), SHORT, stop=("bcde",), streams=streams, **script)
    assert (got.text, got.finish_reason) == ("a", "stop")


@pytest.mark.parametrize("streams", [False, True])
def test_stop_string_before_min_tokens_does_not_count(engine: Engine, streams: bool) -> None:
    got = one(engine, SHORT, stop=(" one",), min_tokens=2, streams=streams, **ONE_TWO_THREE)
    assert got.text == " one two three"


@pytest.mark.parametrize("streams", [False, True])
def test_stop_string_before_min_tokens_stays_uncounted(engine: Engine, streams: bool) -> None:
    """A longer stop string made the search for the short one reach back too far."""
    stop = (" two", "something much longer that never comes")
    got = one(engine, SHORT, stop=stop, min_tokens=2, streams=streams, **ONE_TWO_THREE)
    assert got.text == " one two three one"


# --- UTF-8 --------------------------------------------------------------------------------------


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


def byte_tokens(text: str) -> list[int]:
    """The tokens of the single bytes of text."""
    alphabet = tokenizer.backend_tokenizer.get_vocab()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [alphabet[characters[byte]] for byte in text.encode()]


@pytest.mark.parametrize("character", ["é", "漢", "🦊"])
def test_stream_holds_back_part_of_a_character(engine: Engine, character: str) -> None:
    script = saying(*byte_tokens(character))
    num_bytes = len(character.encode())
    (got,) = run(deltas(engine, SHORT, max_new_tokens=4 * num_bytes, **script))
    assert [delta.text for delta in got] == [character] * 4
    assert [len(delta.token_ids) for delta in got] == [num_bytes] * 4


def test_part_of_a_character_at_the_end_is_left_out(engine: Engine) -> None:
    script = saying(*byte_tokens("🦊"))
    (got,) = run(deltas(engine, SHORT, max_new_tokens=7, **script))
    assert "".join(delta.text for delta in got) == "🦊"
    assert sum(len(delta.token_ids) for delta in got) == 7


@pytest.mark.parametrize("prompt", [SHORT, "🦊" * 9, "x🦊漢é" * 9])
def test_stream_of_random_bytes_is_what_they_decode_to(engine: Engine, prompt: str) -> None:
    """Bytes in random order are no characters for the most part: U+FFFD is right there."""
    bias = dict.fromkeys([*byte_tokens("é漢🦊"), token("a")], 100.0)
    params = {"logit_bias": bias, "temperature": 2, "max_new_tokens": 60, "streams": True}
    for (got,) in run(*(answer(engine, prompt, seed=i, **params) for i in range(20))):
        spoken = tokenizer.decode(got.token_ids)
        assert spoken.startswith(got.text)
        assert set(spoken[len(got.text) :]) <= {"\ufffd"}


# --- Logprobs -----------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_model(engine: Engine, reference: Any) -> None:
    """Before temperature, penalties and bias, whatever the company."""
    params = {"seed": 1, "num_logprobs": 4, "temperature": 0.5, "logit_bias": {5: 3.0}}
    (got,), *_ = run(answer(engine, SHORT, **params), *fillers(engine, 8))
    prompt = ids(SHORT)
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt + got.token_ids])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits, dim=-1)
    assert [logprobs.token_id for logprobs in got.logprobs] == got.token_ids
    for logprobs, row in zip(got.logprobs, expected, strict=True):
        assert logprobs.logprob == pytest.approx(row[logprobs.token_id].item(), abs=1e-3)
        values = [value for _, value in logprobs.top]
        assert values == pytest.approx(row.topk(4).values.tolist(), abs=1e-3)
        assert values == pytest.approx([row[i].item() for i, _ in logprobs.top], abs=1e-3)


@pytest.mark.parametrize("streams", [False, True])
def test_logprobs_greedy_token_is_the_likeliest(engine: Engine, streams: bool) -> None:
    got = one(engine, SHORT, temperature=0, num_logprobs=1, streams=streams)
    assert [logprobs.top[0][0] for logprobs in got.logprobs] == got.token_ids


def test_logprobs_without_alternatives(engine: Engine) -> None:
    got = one(engine, SHORT, num_logprobs=0)
    assert [logprobs.top for logprobs in got.logprobs] == [[]] * len(got.token_ids)
    assert one(engine, SHORT).logprobs == []


# --- Output filter ------------------------------------------------------------------------------


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
    drawn = run(*(answer(engine, SHORT, seed=i, max_new_tokens=60) for i in range(30)))
    words = Counter(w for (d,) in drawn for w in re.findall(r"[a-z]{3,}", d.text.lower()))
    return [word for word, _ in words.most_common(60) if word not in SHORT.lower()]


@pytest.mark.parametrize("chosen", [slice(0, 1), slice(3, 6), slice(20, 24)])
def test_filter_words_the_model_likes(
    filtered: Callable[[str], Engine], favourites: list[str], chosen: slice
) -> None:
    words = ",".join(favourites[chosen]) + "," + favourites[10][:3] + "*"
    engine = filtered(words)
    before = engine.output.num_rollbacks
    whole = check_filter(engine, words, SHORT, seeds=15, ignore_eos=True)
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
            answer(filtered(words), SHORT, seed=i, max_new_tokens=200, ignore_eos=True)
            for i in range(10)
        )
    )
    assert [(len(d.token_ids), d.finish_reason) for (d,) in drawn] == [(200, "length")] * 10


def test_filter_every_sequence_of_a_request(
    filtered: Callable[[str], Engine], favourites: list[str]
) -> None:
    words = favourites[0]
    got = run(
        answer(filtered(words), SHORT, n=4, seed=1, ignore_eos=True),
        answer(filtered(words), SHORT, n=4, seed=1, streams=True, ignore_eos=True),
    )
    assert got[0] == got[1]
    check_clean(words, SHORT, [delta.text for delta in got[0]])
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


# --- Life and death of a request ----------------------------------------------------------------

ENDLESS = SamplingParams(max_new_tokens=100, ignore_eos=True)
BRIEF = SamplingParams(max_new_tokens=3, ignore_eos=True)


def is_idle(engine: Engine) -> bool:
    return engine.num_running == engine.num_waiting == 0


def test_abort_frees_the_place_of_a_running_request(small_engine: Engine) -> None:
    async def abort() -> None:
        request = small_engine.submit(ids(SHORT), ENDLESS, num_sequences=2, streams=True)
        await anext(small_engine.stream(request))
        assert small_engine.num_running == 2
        small_engine.abort(request)
        await until(lambda: is_idle(small_engine))

    assert run(abort()) == [None]


def test_abort_of_a_waiting_request(small_engine: Engine) -> None:
    async def abort() -> int:
        params = SamplingParams(max_new_tokens=40, ignore_eos=True)
        running = [small_engine.submit(ids(SHORT), params) for _ in range(2)]
        await until(lambda: small_engine.num_running == 2)
        waiting = [small_engine.submit([1], BRIEF) for _ in range(2)]
        small_engine.abort(waiting[0])
        await until(lambda: small_engine.num_waiting == 1)
        assert small_engine.num_running == 2
        return sum([len(await complete(small_engine, r)) for r in (*running, waiting[1])])

    assert run(abort()) == [3]


def test_abort_of_a_finished_request_does_nothing(small_engine: Engine) -> None:
    async def abort() -> None:
        request = small_engine.submit(ids(SHORT), SamplingParams(max_new_tokens=2))
        await complete(small_engine, request)
        for _ in range(3):
            small_engine.abort(request)

    assert run(abort()) == [None]
    assert len(one(small_engine, SHORT, max_new_tokens=3, ignore_eos=True).token_ids) == 3


def test_abort_changes_no_other_text(engine: Engine) -> None:
    async def leave(index: int) -> None:
        request = engine.submit(ids(LONG[: 50 * index]), ENDLESS, num_sequences=2, streams=True)
        async for delta in engine.stream(request):
            if len(request.prompt_token_ids) and delta.index and index % 2:
                break

    def stays() -> list[Coroutine[Any, Any, Any]]:
        return [answer(engine, SHORT, seed=i, max_new_tokens=40) for i in range(4)]

    assert run(*stays(), *(leave(i + 1) for i in range(6)))[:4] == run(*stays())


def test_leaving_a_stream_aborts_its_request(small_engine: Engine) -> None:
    async def leave() -> None:
        stream = small_engine.stream(small_engine.submit(ids(SHORT), ENDLESS, streams=True))
        await anext(stream)
        await stream.aclose()
        await until(lambda: is_idle(small_engine))

    assert run(leave()) == [None]


def test_cancelled_task_aborts_its_request(small_engine: Engine) -> None:
    async def cancel() -> None:
        task = asyncio.ensure_future(complete(small_engine, small_engine.submit([1], ENDLESS)))
        await until(lambda: small_engine.num_running)
        task.cancel()
        await until(lambda: is_idle(small_engine))

    assert run(cancel()) == [None]


def test_full_queue_refuses_at_once(small_engine: Engine) -> None:
    async def overload() -> list[list[Delta]]:
        params = SamplingParams(max_new_tokens=40, ignore_eos=True)
        running = small_engine.submit(ids(SHORT), params, num_sequences=2)
        await until(lambda: small_engine.num_running == 2)
        waiting = [small_engine.submit([1], BRIEF, num_sequences=4) for _ in range(2)]
        assert small_engine.is_full
        with pytest.raises(QueueFullError):
            small_engine.submit(ids(SHORT), ENDLESS)
        assert small_engine.num_waiting == 8
        return [await complete(small_engine, r) for r in (running, *waiting)]

    (got,) = run(overload())
    assert [len(deltas) for deltas in got] == [2, 4, 4]
    assert not small_engine.is_full


def failing(forward: Callable[..., Any], times: float) -> Callable[..., Any]:
    """A forward pass that raises so many times, then works again."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal times
        times -= 1
        if times >= 0:
            raise RuntimeError("injected")
        return forward(*args, **kwargs)

    return fail


def test_failed_step_ends_what_it_held_and_no_more(
    small_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail() -> list[Any]:
        held = [answer(small_engine, SHORT, max_new_tokens=100, ignore_eos=True) for _ in "12"]
        held = [asyncio.ensure_future(request) for request in held]
        await until(lambda: small_engine.num_running == 2)
        waiting = asyncio.ensure_future(answer(small_engine, SHORT, max_new_tokens=3))
        await until(lambda: small_engine.num_waiting == 1)
        broken = failing(small_engine.model.forward, 1)
        monkeypatch.setattr(small_engine.model, "forward", broken)
        return await asyncio.gather(*held, waiting, return_exceptions=True)

    ((first, second, (third,)),) = run(fail())
    for error in (first, second):
        assert isinstance(error, InferenceError)
        assert isinstance(error.__cause__, RuntimeError)
    assert len(third.token_ids) <= 3
    assert small_engine.is_healthy
    assert is_idle(small_engine)


def test_failed_step_in_a_stream_raises_after_the_deltas(
    small_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail() -> Delta:
        request = small_engine.submit(ids(SHORT), ENDLESS, num_sequences=2, streams=True)
        stream = small_engine.stream(request)
        first = await anext(stream)
        monkeypatch.setattr(small_engine.model, "forward", failing(print, 1e9))
        with pytest.raises(InferenceError):
            _ = [delta async for delta in stream]
        monkeypatch.undo()
        return first

    (first,) = run(fail())
    assert first.text
    assert len(one(small_engine, SHORT, max_new_tokens=3, ignore_eos=True).token_ids) == 3


class FailingFilter:
    """Raises for texts that hold an x; everything else may pass."""

    def scan(self, text: str, start: int = 0, final: bool = True) -> tuple[None, int]:
        if "x" in text:
            raise RuntimeError("injected")
        return None, len(text)


@pytest.mark.parametrize("streams", [False, True])
def test_failed_step_hangs_nobody_who_finished_in_it(small_engine: Engine, streams: bool) -> None:
    """One sequence has its last token when the step fails at the next sequence."""
    small_engine.output.text_filter = FailingFilter()
    lasts = saying(token("a"), token("b"), token("c"))
    fails = saying(token("a"), token("b"), token("x"))

    async def together() -> list[Any]:
        first = small_engine.submit(ids(SHORT), ENDLESS, num_sequences=2)
        await until(lambda: small_engine.num_running == 2)
        requests = [
            answer(small_engine, SHORT, max_new_tokens=3, streams=streams, **params)
            for params in (lasts, fails)
        ]
        results = asyncio.gather(*requests, return_exceptions=True)
        await until(lambda: small_engine.num_waiting == 2)
        small_engine.abort(first)  # both get its places, in the same step
        async with asyncio.timeout(5):
            return await results

    ((finished, failed),) = run(together())
    assert isinstance(failed, InferenceError)
    assert isinstance(finished, InferenceError) or finished[0].text == "abc"


def test_repeated_failure_is_unhealthy_until_the_model_answers(
    small_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "PROBE_SECONDS", 0.01)
    monkeypatch.setattr(small_engine.model, "forward", failing(print, 1e9))
    errors = [run(answer(small_engine, SHORT))[0] for _ in range(5)]
    assert all(isinstance(error, InferenceError) for error in errors)
    assert not small_engine.is_healthy
    monkeypatch.undo()
    monkeypatch.setattr(engine_module, "PROBE_SECONDS", 0.01)
    run(until(lambda: small_engine.is_healthy))
    assert len(one(small_engine, SHORT, max_new_tokens=3, ignore_eos=True).token_ids) == 3


def test_unload_of_a_failing_model_fails_what_waits_for_it(
    small_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody loaded it again for those who waited, until their deadline."""
    monkeypatch.setattr(engine_module, "PROBE_SECONDS", 0.2)
    monkeypatch.setattr(small_engine.model, "forward", failing(print, 1e9))
    for _ in range(3):
        run(answer(small_engine, SHORT))

    async def leave() -> list[Any]:
        waiting = complete(small_engine, small_engine.submit(ids(SHORT), ENDLESS))
        results = asyncio.gather(waiting, return_exceptions=True)
        await asyncio.to_thread(small_engine.unload)
        async with asyncio.timeout(5):
            return await results

    ((error,),) = run(leave())
    assert isinstance(error, InferenceError)
    assert not small_engine.is_loaded
    assert small_engine.is_healthy


def test_unload_and_load_give_the_same_text(small_engine: Engine) -> None:
    before = one(small_engine, SHORT, seed=1, max_new_tokens=9, ignore_eos=True)
    small_engine.unload()
    with pytest.raises(ValueError, match="not loaded"):
        _ = small_engine.model
    small_engine.load(load())
    assert one(small_engine, SHORT, seed=1, max_new_tokens=9, ignore_eos=True) == before


def test_stop_ends_everything_it_held(small_engine: Engine) -> None:
    async def stop() -> list[Any]:
        requests = [small_engine.submit(ids(SHORT), ENDLESS) for _ in range(2)]
        await until(lambda: small_engine.num_running == 2)
        requests += [small_engine.submit(ids(SHORT), ENDLESS, streams=True) for _ in range(2)]
        results = asyncio.gather(
            *map(partial(complete, small_engine), requests), return_exceptions=True
        )
        await asyncio.sleep(0)
        await asyncio.to_thread(small_engine.stop)
        with pytest.raises(EngineStoppedError):
            small_engine.submit(ids(SHORT), ENDLESS)
        return await results

    (results,) = run(stop())
    assert [type(result) for result in results] == [EngineStoppedError] * 4
    assert not small_engine.is_healthy
    small_engine.stop()


def test_closed_event_loop_does_no_harm(small_engine: Engine) -> None:
    async def leave() -> None:
        small_engine.submit(ids(SHORT), SamplingParams(max_new_tokens=20), streams=True)
        small_engine.submit(ids(SHORT), SamplingParams(max_new_tokens=20))

    asyncio.run(leave())
    run(until(lambda: small_engine.num_running == 2))
    assert len(one(small_engine, SHORT, max_new_tokens=9, ignore_eos=True).token_ids) == 9
    run(until(lambda: is_idle(small_engine)))
    assert small_engine.is_healthy


def test_event_loops_in_two_threads(engine: Engine) -> None:
    got: dict[int, list[Any]] = {}

    def client(seed: int) -> None:
        requests = (answer(engine, SHORT, seed=seed, streams=i % 2 == 0) for i in range(6))
        got[seed] = run(*requests)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        assert got[seed] == [[one(engine, SHORT, seed=seed)]] * 6
