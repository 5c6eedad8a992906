"""The engine with real models: parity, seeds, log probabilities, life and death of a request.

Parity: greedy float32 gives what `model.generate` gives, token for token, whoever joins and
leaves meanwhile. Seeds: a request gives the same bits alone and in a full mixed batch.
"""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import pytest
import torch

import engine.engine as engine_module
from engine import (
    Delta,
    Engine,
    EngineStoppedError,
    InferenceError,
    QueueFullError,
    SamplingParams,
    instruction_set,
)
from engine.batch import ForwardBatch
from engine.kernels import INT8_IS_FASTEST
from engine.request import Sequence
from serving.content_filter import ContentFilter
from serving.reading import Reading
from tests.support import (
    LONG_PROMPT,
    PROMPT,
    answer,
    complete,
    greedy,
    ids,
    load,
    one,
    run,
    saying,
    tiny_llama,
    token,
    tokenizer,
    until,
)

# --- Parity with model.generate -------------------------------------------------------------------

PARITY = [  # prompt, new tokens: some join while others run, and leave while others run
    ("The", 40),
    ("Once upon a time there was a king who", 7),
    (LONG_PROMPT[:200], 25),
    ("A fox", 60),
    (LONG_PROMPT, 30),
    ("In the wood there lived", 1),
    (LONG_PROMPT[40:190], 50),
    ("She said to him:", 33),
    ("He", 12),
]


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
            answer(engine, LONG_PROMPT, max_new_tokens=20, temperature=0),
            answer(engine, "A fox", max_new_tokens=9, temperature=0),
        )
        async for delta in first:
            got = got + delta.token_ids
        return [got, *(a.token_ids for (a,) in await joined)]

    expected = [greedy(reference, p, n) for p, n in (("The", 60), (LONG_PROMPT, 20), ("A fox", 9))]
    assert run(join()) == [expected]


def test_parity_up_to_the_end_of_the_context(llama_engine: Engine) -> None:
    prompt = tokenizer.decode(ids(LONG_PROMPT * 9)[:250])
    num_prompt_tokens = len(ids(prompt))
    (got,) = run(answer(llama_engine, prompt, max_new_tokens=50, temperature=0))[0]
    assert got.finish_reason == "length"
    assert got.token_ids == greedy(tiny_llama(), prompt, 256 - num_prompt_tokens)


# --- Seeds ----------------------------------------------------------------------------------------

SEEDED: list[dict[str, Any]] = [
    {"prompt": "The", "seed": 1},
    {"prompt": PROMPT, "seed": 2, "temperature": 0.7, "top_k": 50, "top_p": 0.9},
    {"prompt": LONG_PROMPT[:150], "seed": 3, "top_p": 0.95, "streams": True},
    {"prompt": "A fox", "seed": 4, "n": 3, "temperature": 1.4, "top_k": 100},
    {"prompt": LONG_PROMPT, "seed": 5, "min_p": 0.05, "repetition_penalty": 1.2, "streams": True},
    {"prompt": "He", "seed": 6, "temperature": 2.0, "presence_penalty": 0.5},
]


def fillers(engine: Engine, count: int) -> list[Coroutine[Any, Any, Any]]:
    """Requests of all kinds that keep joining and leaving."""
    return [
        answer(
            engine,
            LONG_PROMPT[: 10 + 97 * i % 400],
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
    wanted = [{"max_new_tokens": 40, "num_logprobs": 2, "ignore_eos": True, **r} for r in SEEDED]
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
    prompts = [tokenizer.decode(ids(LONG_PROMPT * 9)[:n]) for n in (200, 240, 600)]
    wanted = {"seed": 1, "max_new_tokens": 12, "num_logprobs": 1, "ignore_eos": True}
    try:
        alone = [run(answer(llama, prompt, **wanted))[0] for prompt in prompts]
        assert run(*(answer(llama, prompt, **wanted) for prompt in prompts)) == alone
    finally:
        llama.stop()


def test_seed_holds_with_fewer_places_than_sequences(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = {"prompt": PROMPT, "seed": 7, "n": 5, "num_logprobs": 1, "ignore_eos": True}
    alone = run(answer(engine, **request))
    monkeypatch.setattr(engine.scheduler, "max_num_seqs", 3)
    assert run(answer(engine, **request), *fillers(engine, 5))[:1] == alone


def test_seed_sequences_of_one_request_differ(engine: Engine) -> None:
    drawn = run(answer(engine, PROMPT, seed=1, n=8), answer(engine, PROMPT, seed=1, n=8))
    assert drawn[0] == drawn[1]
    assert len({delta.text for delta in drawn[0]}) == 8


def test_seed_first_sequence_is_the_same_whatever_n(engine: Engine) -> None:
    several, (alone,) = run(answer(engine, PROMPT, seed=1, n=3), answer(engine, PROMPT, seed=1))
    assert several[0] == alone


def test_seed_different_ones_differ(engine: Engine) -> None:
    seeds = [0, 1, 2, 2**32, 2**32 + 1, 2**63 - 1]
    drawn = run(*(answer(engine, PROMPT, seed=seed) for seed in seeds))
    assert len({delta.text for (delta,) in drawn}) == len(seeds)


def test_no_seed_draws_anew(engine: Engine) -> None:
    drawn = run(*(answer(engine, PROMPT) for _ in range(4)))
    assert len({delta.text for (delta,) in drawn}) == 4


def test_seed_gives_the_same_bits_in_a_full_batch_int8() -> None:
    """One scale for the whole batch gave other texts in other company. Prompts join meanwhile,
    clients leave, and the model comes back after it has left memory; then two threads compute."""
    int8 = Engine(load(), tokenizer, quantization="int8", num_threads=1)
    two_threads = Engine(load(), tokenizer, quantization="int8", num_threads=2)
    try:
        assert int8.kernel.is_exact == (instruction_set() in INT8_IS_FASTEST)
        check_seeds(int8)
        first = one(int8, PROMPT, seed=1, num_logprobs=1)
        int8.unload()
        int8.load(load())
        assert first == one(int8, PROMPT, seed=1, num_logprobs=1)
        if int8.kernel.is_exact:  # floats may be summed in another order
            assert first == one(two_threads, PROMPT, seed=1, num_logprobs=1)
    finally:
        int8.stop()
        two_threads.stop()


# --- Log probabilities ----------------------------------------------------------------------------


def test_logprobs_are_those_of_the_model(engine: Engine, reference: Any) -> None:
    """Before temperature, penalties and bias, whatever the company."""
    params = {"seed": 1, "num_logprobs": 4, "temperature": 0.5, "logit_bias": {5: 3.0}}
    (got,), *_ = run(answer(engine, PROMPT, **params), *fillers(engine, 8))
    prompt = ids(PROMPT)
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
    got = one(engine, PROMPT, temperature=0, num_logprobs=1, streams=streams)
    assert [logprobs.top[0][0] for logprobs in got.logprobs] == got.token_ids


def test_logprobs_without_alternatives(engine: Engine) -> None:
    got = one(engine, PROMPT, num_logprobs=0)
    assert [logprobs.top for logprobs in got.logprobs] == [[]] * len(got.token_ids)
    assert one(engine, PROMPT).logprobs == []


# --- Loading and unloading ------------------------------------------------------------------------

ENDLESS = SamplingParams(max_new_tokens=100, ignore_eos=True)
BRIEF = SamplingParams(max_new_tokens=3, ignore_eos=True)


def is_idle(engine: Engine) -> bool:
    return engine.num_running == engine.num_waiting == 0


def failing(forward: Callable[..., Any], times: float) -> Callable[..., Any]:
    """A forward pass that raises so many times, then works again."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal times
        times -= 1
        if times >= 0:
            raise RuntimeError("injected")
        return forward(*args, **kwargs)

    return fail


def test_unload_and_load_give_the_same_text(small_engine: Engine) -> None:
    before = one(small_engine, PROMPT, seed=1, max_new_tokens=9, ignore_eos=True)
    small_engine.unload()
    with pytest.raises(ValueError, match="not loaded"):
        _ = small_engine.model
    small_engine.load(load())
    assert one(small_engine, PROMPT, seed=1, max_new_tokens=9, ignore_eos=True) == before


def test_unload_of_a_failing_model_fails_what_waits_for_it(
    small_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody loaded it again for those who waited, until their deadline."""
    monkeypatch.setattr(engine_module, "PROBE_SECONDS", 0.2)
    monkeypatch.setattr(small_engine.model, "forward", failing(print, 1e9))
    for _ in range(3):
        run(answer(small_engine, PROMPT))

    async def leave() -> list[Any]:
        waiting = complete(small_engine, small_engine.submit(ids(PROMPT), ENDLESS))
        results = asyncio.gather(waiting, return_exceptions=True)
        await asyncio.to_thread(small_engine.unload)
        async with asyncio.timeout(5):
            return await results

    ((error,),) = run(leave())
    assert isinstance(error, InferenceError)
    assert not small_engine.is_loaded
    assert small_engine.is_healthy


# --- Life and death of a request ------------------------------------------------------------------


def test_prompt_without_room_is_refused(llama_engine: Engine) -> None:
    async def submit(num_tokens: int) -> None:
        llama_engine.submit([1] * num_tokens, SamplingParams())

    for num_tokens in (0, 256, 1000):
        (error,) = run(submit(num_tokens))
        assert isinstance(error, ValueError)


def test_full_queue_refuses_at_once(small_engine: Engine) -> None:
    async def overload() -> list[list[Delta]]:
        params = SamplingParams(max_new_tokens=40, ignore_eos=True)
        running = small_engine.submit(ids(PROMPT), params, num_sequences=2)
        await until(lambda: small_engine.num_running == 2)
        waiting = [small_engine.submit([1], BRIEF, num_sequences=2)]
        with pytest.raises(QueueFullError):
            small_engine.submit(ids(PROMPT), ENDLESS)
        assert not small_engine.is_full  # for another client
        waiting.append(small_engine.submit([1], BRIEF, client="another"))
        assert small_engine.is_full
        assert small_engine.num_waiting == 3
        return [await complete(small_engine, r) for r in (running, *waiting)]

    (got,) = run(overload())
    assert [len(deltas) for deltas in got] == [2, 2, 1]
    assert not small_engine.is_full


def test_leaving_a_stream_aborts_its_request(small_engine: Engine) -> None:
    async def leave() -> None:
        stream = small_engine.stream(small_engine.submit(ids(PROMPT), ENDLESS, streams=True))
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


def test_abort_frees_the_place_of_a_running_request(small_engine: Engine) -> None:
    async def abort() -> None:
        request = small_engine.submit(ids(PROMPT), ENDLESS, num_sequences=2, streams=True)
        await anext(small_engine.stream(request))
        assert small_engine.num_running == 2
        small_engine.abort(request)
        await until(lambda: is_idle(small_engine))

    assert run(abort()) == [None]


def test_abort_of_a_waiting_request(small_engine: Engine) -> None:
    async def abort() -> int:
        params = SamplingParams(max_new_tokens=40, ignore_eos=True)
        running = [small_engine.submit(ids(PROMPT), params) for _ in range(2)]
        await until(lambda: small_engine.num_running == 2)
        waiting = [small_engine.submit([1], BRIEF) for _ in range(2)]
        small_engine.abort(waiting[0])
        await until(lambda: small_engine.num_waiting == 1)
        assert small_engine.num_running == 2
        return sum([len(await complete(small_engine, r)) for r in (*running, waiting[1])])

    assert run(abort()) == [3]


def test_abort_of_a_finished_request_does_nothing(small_engine: Engine) -> None:
    async def abort() -> None:
        request = small_engine.submit(ids(PROMPT), SamplingParams(max_new_tokens=2))
        await complete(small_engine, request)
        for _ in range(3):
            small_engine.abort(request)

    assert run(abort()) == [None]
    assert len(one(small_engine, PROMPT, max_new_tokens=3, ignore_eos=True).token_ids) == 3


def test_abort_changes_no_other_text(engine: Engine) -> None:
    async def leave(index: int) -> None:
        request = engine.submit(
            ids(LONG_PROMPT[: 50 * index]), ENDLESS, num_sequences=2, streams=True
        )
        async for delta in engine.stream(request):
            if len(request.prompt_token_ids) and delta.index and index % 2:
                break

    def stays() -> list[Coroutine[Any, Any, Any]]:
        return [answer(engine, PROMPT, seed=i, max_new_tokens=40) for i in range(4)]

    assert run(*stays(), *(leave(i + 1) for i in range(6)))[:4] == run(*stays())


def test_stop_ends_everything_it_held(small_engine: Engine) -> None:
    async def stop() -> list[Any]:
        requests = [small_engine.submit(ids(PROMPT), ENDLESS) for _ in range(2)]
        await until(lambda: small_engine.num_running == 2)
        requests += [small_engine.submit(ids(PROMPT), ENDLESS, streams=True) for _ in range(2)]
        results = asyncio.gather(
            *map(partial(complete, small_engine), requests), return_exceptions=True
        )
        await asyncio.sleep(0)
        await asyncio.to_thread(small_engine.stop)
        with pytest.raises(EngineStoppedError):
            small_engine.submit(ids(PROMPT), ENDLESS)
        return await results

    (results,) = run(stop())
    assert [type(result) for result in results] == [EngineStoppedError] * 4
    assert not small_engine.is_healthy
    small_engine.stop()


def test_closed_event_loop_does_no_harm(small_engine: Engine) -> None:
    async def leave() -> None:
        small_engine.submit(ids(PROMPT), SamplingParams(max_new_tokens=20), streams=True)
        small_engine.submit(ids(PROMPT), SamplingParams(max_new_tokens=20))

    asyncio.run(leave())
    run(until(lambda: small_engine.num_running == 2))
    assert len(one(small_engine, PROMPT, max_new_tokens=9, ignore_eos=True).token_ids) == 9
    run(until(lambda: is_idle(small_engine)))
    assert small_engine.is_healthy


def test_event_loops_in_two_threads(engine: Engine) -> None:
    got: dict[int, list[Any]] = {}

    def client(seed: int) -> None:
        requests = (answer(engine, PROMPT, seed=seed, streams=i % 2 == 0) for i in range(6))
        got[seed] = run(*requests)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        assert got[seed] == [[one(engine, PROMPT, seed=seed)]] * 6


# --- Steps that fail ------------------------------------------------------------------------------


def test_failed_step_ends_what_it_held_and_no_more(
    small_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail() -> list[Any]:
        held = [answer(small_engine, PROMPT, max_new_tokens=100, ignore_eos=True) for _ in "12"]
        held = [asyncio.ensure_future(request) for request in held]
        await until(lambda: small_engine.num_running == 2)
        waiting = asyncio.ensure_future(answer(small_engine, PROMPT, max_new_tokens=3))
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
        request = small_engine.submit(ids(PROMPT), ENDLESS, num_sequences=2, streams=True)
        stream = small_engine.stream(request)
        first = await anext(stream)
        monkeypatch.setattr(small_engine.model, "forward", failing(print, 1e9))
        with pytest.raises(InferenceError):
            _ = [delta async for delta in stream]
        monkeypatch.undo()
        return first

    (first,) = run(fail())
    assert first.text
    assert len(one(small_engine, PROMPT, max_new_tokens=3, ignore_eos=True).token_ids) == 3


class FailingReading(Reading):
    """Raises for texts that hold an x; everything else may pass."""

    def append(self, text: str) -> None:
        if "x" in text:
            raise RuntimeError("injected")


class FailingFilter(ContentFilter):
    def read(self, text: str) -> Reading:
        return FailingReading(self.automaton, self.candidate)


@pytest.mark.parametrize("streams", [False, True])
def test_failed_text_ends_its_own_sequence_alone(small_engine: Engine, streams: bool) -> None:
    """It ended all sequences of the step; one of them has its last token in it."""
    small_engine.output.text_filter = FailingFilter("")
    lasts = saying(token("a"), token("b"), token("c"))
    fails = saying(token("a"), token("b"), token("x"))

    async def together() -> list[Any]:
        first = small_engine.submit(ids(PROMPT), ENDLESS, num_sequences=2)
        await until(lambda: small_engine.num_running == 2)
        requests = [
            answer(small_engine, PROMPT, max_new_tokens=3, streams=streams, **params)
            for params in (lasts, fails)
        ]
        results = asyncio.gather(*requests, return_exceptions=True)
        await until(lambda: small_engine.num_waiting == 2)
        small_engine.abort(first)  # both get its places, in the same step
        async with asyncio.timeout(5):
            return await results

    ((finished, failed),) = run(together())
    assert isinstance(failed, InferenceError)
    assert isinstance(failed.__cause__, RuntimeError)
    assert finished[0].text == "abc"
    run(until(lambda: is_idle(small_engine)))
    assert small_engine.num_failed_steps == 0


def test_logits_of_nan_end_their_own_sequence_alone(
    small_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They ended all sequences of the step, or, greedy, gave any token."""
    forward = small_engine.runner.forward

    def broken(running: list[Sequence], num_admitted: int, drafts: Any) -> torch.Tensor:
        logits = forward(running, num_admitted, drafts)
        for row, seq in enumerate(running):
            if seq.params.seed == 13 and len(seq.output_token_ids) == 3:
                logits[row, 5] = torch.nan
        return logits

    good = {"seed": 1, "max_new_tokens": 30, "ignore_eos": True}
    alone = one(small_engine, PROMPT, **good)
    monkeypatch.setattr(small_engine.runner, "forward", broken)
    for params in ({}, {"temperature": 0}, {"n": 2}, {"top_k": 5, "streams": True}):
        bad, (other,) = run(
            answer(small_engine, "The", **{**good, "seed": 13}, **params),
            answer(small_engine, PROMPT, **good),
        )
        assert isinstance(bad, InferenceError)
        assert "NaN" in str(bad)
        assert other == alone
    run(until(lambda: is_idle(small_engine)))


def test_prompt_of_nan_leaves_nothing_to_who_has_its_place_next(small_engine: Engine) -> None:
    """Shorter texts failed there ever after: what a query does not see was NaN times zero."""
    good = {"seed": 1, "max_new_tokens": 3, "ignore_eos": True}
    before = one(small_engine, "A fox", **good)
    small_engine.model.transformer.wpe.weight.data[20:] = math.nan
    (bad,) = run(answer(small_engine, PROMPT * 9, **good))
    after = one(small_engine, "A fox", **good)
    assert isinstance(bad, InferenceError)
    assert after == before


@pytest.mark.parametrize("max_new_tokens", [0, 3])
def test_prompt_that_cannot_be_scored_ends_its_own_request_alone(
    small_engine: Engine, monkeypatch: pytest.MonkeyPatch, max_new_tokens: int
) -> None:
    """The log probabilities of its tokens were NaN, for which JSON has no number."""
    hidden_states = small_engine.runner._hidden_states

    def broken(batch: ForwardBatch) -> Any:
        hidden, head = hidden_states(batch)
        of_prompt = torch.full_like(hidden, math.nan)
        of_prompt[batch.logit_rows] = hidden[batch.logit_rows]
        return of_prompt, head

    good = {"seed": 1, "max_new_tokens": 3, "ignore_eos": True}
    alone = one(small_engine, PROMPT, **good)
    monkeypatch.setattr(small_engine.runner, "_hidden_states", broken)
    bad, (other,) = run(
        answer(small_engine, "A fox", num_prompt_logprobs=1, max_new_tokens=max_new_tokens),
        answer(small_engine, PROMPT, **good),
    )
    assert isinstance(bad, InferenceError)
    assert "NaN" in str(bad)
    assert other == alone
    assert small_engine.num_failed_steps == 0


def test_end_of_text_beyond_the_vocabulary_is_left_out() -> None:
    """With `min_tokens` it ended all sequences; -1 banned the last token."""
    model = tiny_llama()
    model.generation_config.eos_token_id = [0, 8192, -1]
    made = Engine(model, tokenizer, num_threads=1)
    try:
        assert made.eos_token_ids == {0}
        assert len(one(made, PROMPT, min_tokens=3, max_new_tokens=3).token_ids) == 3
    finally:
        made.stop()


def test_repeated_failure_is_unhealthy_until_the_model_answers(
    small_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "PROBE_SECONDS", 0.01)
    monkeypatch.setattr(small_engine.model, "forward", failing(print, 1e9))
    errors = [run(answer(small_engine, PROMPT))[0] for _ in range(5)]
    assert all(isinstance(error, InferenceError) for error in errors)
    assert not small_engine.is_healthy
    monkeypatch.undo()
    monkeypatch.setattr(engine_module, "PROBE_SECONDS", 0.01)
    run(until(lambda: small_engine.is_healthy))
    assert len(one(small_engine, PROMPT, max_new_tokens=3, ignore_eos=True).token_ids) == 3


def test_model_that_computes_nan_is_unhealthy_and_one_that_is_asked_for_nothing_is_not(
    small_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences failed one by one, so steps did not count as failed, however many there were."""
    nothing = {"logit_bias": dict.fromkeys(range(small_engine.vocab_size), -math.inf)}
    errors = [run(answer(small_engine, PROMPT, **nothing))[0] for _ in range(4)]
    assert all("no token can be drawn" in str(error) for error in errors)
    assert small_engine.is_healthy
    monkeypatch.setattr(engine_module, "PROBE_SECONDS", 0.01)
    head = small_engine.model.lm_head.forward
    monkeypatch.setattr(
        small_engine.model.lm_head, "forward", lambda hidden: head(hidden) * math.nan
    )
    errors = [run(answer(small_engine, PROMPT))[0] for _ in range(4)]
    assert all(isinstance(error, InferenceError) for error in errors)
    assert not small_engine.is_healthy
    time.sleep(0.05)  # some probes, which find NaN too
    assert not small_engine.is_healthy
    monkeypatch.setattr(small_engine.model.lm_head, "forward", head)
    run(until(lambda: small_engine.is_healthy))
