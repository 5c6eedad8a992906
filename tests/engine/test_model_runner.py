"""How running sequences go through the model: which rows, in which passes, with whose logits.

The model is a small one with random weights.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from engine import SamplingParams
from engine.batch import ForwardBatch
from engine.kernels import choose_kernel
from engine.model_runner import ModelRunner
from engine.request import Sequence
from engine.scheduler import SHORT_PROMPT_TOKENS
from tests.support import fail, sequences, tiny_llama

LONG = list(range(1, SHORT_PROMPT_TOKENS + 2))


@pytest.fixture(scope="module")
def reference() -> Any:
    return tiny_llama()


@pytest.fixture
def runner() -> ModelRunner:
    kernel = choose_kernel(torch.float32, "cpu", None)
    return ModelRunner(tiny_llama(), max_num_seqs=8, max_model_len=256, kernel=kernel)


@pytest.fixture
def batches(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> list[ForwardBatch]:
    """The passes that the runner has made."""
    made: list[ForwardBatch] = []
    run = runner.run

    def note(batch: ForwardBatch) -> Tensor:
        made.append(batch)
        return run(batch)

    monkeypatch.setattr(runner, "run", note)
    return made


@torch.inference_mode()
def forward(runner: ModelRunner, running: list[Sequence], num_admitted: int) -> Tensor:
    return runner.forward(running, num_admitted)


@torch.inference_mode()
def next_logits(model: Any, seq: Sequence) -> Tensor:
    """What transformers computes from all tokens of the sequence."""
    token_ids = [*seq.request.prompt_token_ids, *seq.output_token_ids]
    return model(torch.tensor([token_ids])).logits[0, -1]


def prompts(*lengths: int) -> list[Sequence]:
    return [seq for n in lengths for seq in sequences(prompt=LONG[:n])]


def test_forward_gives_what_the_model_gives(runner: ModelRunner, reference: Any) -> None:
    """A long prompt and a short one join while two sequences run."""
    running = prompts(3, 7)
    forward(runner, running, 2)
    for seq in running:
        seq.output_token_ids.append(5)
    running += prompts(4, len(LONG))
    got = forward(runner, running, 2)
    wanted = torch.stack([next_logits(reference, seq) for seq in running])
    assert torch.allclose(got, wanted, atol=1e-4)


def test_short_prompts_ride_along_and_a_long_one_goes_alone(
    runner: ModelRunner, batches: list[ForwardBatch]
) -> None:
    running = prompts(3, 4, len(LONG))
    forward(runner, running, 3)
    assert [batch.prompts for batch in batches] == [[(0, 3), (3, 4)], [(0, len(LONG))]]


def test_pass_has_no_more_rows_than_may_be(
    runner: ModelRunner, batches: list[ForwardBatch]
) -> None:
    runner.max_rows = 4
    running = prompts(1, 1, 1, 1, 1, 1)
    forward(runner, running, 6)
    running += prompts(3)
    forward(runner, running, 1)
    assert [len(batch.token_ids) for batch in batches] == [4, 2, 4, 2, 3]


def test_pass_of_few_rows_is_filled_up(runner: ModelRunner, batches: list[ForwardBatch]) -> None:
    running = prompts(3)
    alone = forward(runner, running, 1)
    runner.min_rows = 16
    assert torch.allclose(forward(runner, running, 1), alone, atol=1e-4)
    assert batches[1].cache_rows == [0] * 3 + [runner.cache.padding_row] * 13


def test_prompt_of_several_sequences_runs_once(
    runner: ModelRunner, batches: list[ForwardBatch], reference: Any
) -> None:
    running = sequences(prompt=[1, 2, 3], count=3)
    logits = forward(runner, running, 3)
    assert [batch.token_ids for batch in batches] == [[1, 2, 3]]
    assert torch.equal(logits, logits[:1].expand(3, -1))
    for seq, token_id in zip(running, (7, 8, 9), strict=True):
        seq.output_token_ids.append(token_id)
    got = forward(runner, running, 0)
    wanted = torch.stack([next_logits(reference, seq) for seq in running])
    assert torch.allclose(got, wanted, atol=1e-4)


def test_prompt_logprobs_are_those_of_the_model(runner: ModelRunner, reference: Any) -> None:
    """Of a request between others, each of its sequences asking."""
    scored = sequences(SamplingParams(num_prompt_logprobs=2), prompt=[1, 2, 3], count=2)
    running = [*prompts(5), *scored, *prompts(4)]
    logits = forward(runner, running, 4)
    assert torch.allclose(logits[3], next_logits(reference, running[3]), atol=1e-4)
    with torch.inference_mode():
        rows = torch.log_softmax(reference(torch.tensor([[1, 2, 3]])).logits[0], dim=-1)
    got = scored[0].request.prompt_logprobs or []
    assert [logprobs.token_id for logprobs in got] == [2, 3]
    assert [logprobs.logprob for logprobs in got] == pytest.approx(
        [rows[0, 2].item(), rows[1, 3].item()], abs=1e-4
    )
    assert [len(logprobs.top) for logprobs in got] == [2, 2]


def test_prompt_logprobs_are_computed_in_pieces(
    runner: ModelRunner, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits of a whole prompt were there at once: 20 GB for a long one of a large model."""
    head, num_rows = runner.model.get_output_embeddings(), []
    monkeypatch.setattr("engine.model_runner.SCORED_TOKENS", 4)
    compute = head.forward
    monkeypatch.setattr(
        head, "forward", lambda hidden: [num_rows.append(len(hidden)), compute(hidden)][1]
    )
    running = sequences(SamplingParams(num_prompt_logprobs=0), prompt=LONG)
    logits = forward(runner, running, 1)
    assert torch.allclose(logits[0], next_logits(reference, running[0]), atol=1e-4)
    assert num_rows == [4] * (len(LONG) // 4) + [1]
    rows = torch.log_softmax(reference(torch.tensor([LONG])).logits[0], dim=-1)
    expected = [rows[at, token_id].item() for at, token_id in enumerate(LONG[1:])]
    got = [each.logprob for each in running[0].request.prompt_logprobs or []]
    assert got == pytest.approx(expected, abs=1e-4)


def test_probe_raises_what_the_model_raises(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.inference_mode():
        runner.probe()
        monkeypatch.setattr(runner.model, "forward", fail)
        with pytest.raises(RuntimeError, match="injected"):
            runner.probe()


@pytest.mark.parametrize(
    ("is_exact", "row_range"),
    [
        (lambda num_rows: True, (1, 40)),
        (lambda num_rows: num_rows > 1, (2, 40)),
        (lambda num_rows: num_rows <= 24, (1, 24)),
        (lambda num_rows: 3 < num_rows <= 32, (4, 32)),
        (lambda num_rows: num_rows <= 12, (16, 16)),
        (lambda num_rows: num_rows > 4, (16, 16)),
    ],
)
def test_measured_rows_are_those_with_the_same_bits(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, is_exact: Any, row_range: tuple[int, int]
) -> None:
    """A model whose numbers have a last bit more when a pass has so many rows."""

    def logits(batch: ForwardBatch) -> Tensor:
        num_rows = len(batch.logit_rows)
        return torch.ones(num_rows, 2) + (0 if is_exact(num_rows) else 2**-20)

    monkeypatch.setattr(runner, "run", logits)
    assert runner.measure_batch_invariance() == row_range
    assert runner.is_invariant


def test_mixture_of_experts_is_told_to_keep_seeds_only_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Other requests changed the text of a seed, and nobody said so. Passes of 16 rows, which are
    slow, did not help."""
    config = MixtralConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, sliding_window=None,
        max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    kernel = choose_kernel(torch.float32, "cpu", None)
    model = MixtralForCausalLM(config)
    runner = ModelRunner(model, max_num_seqs=8, max_model_len=256, kernel=kernel)
    assert runner.measure_batch_invariance() == (1, 40)
    assert not runner.is_invariant
    assert (
        "MixtralForCausalLM: the same seed gives the same text only for requests that run alone"
        in caplog.text
    )
