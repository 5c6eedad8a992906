"""The sampler against its definitions, on logits made up here; no model."""

import pytest
import torch
from torch import Tensor

from engine import InferenceError, SamplingParams
from engine.request import Sequence
from engine.sampler import _keep_likeliest, collect_logprobs, edit_logits, sample, sample_tokens
from tests.support import sequences


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
    is_last = params.temperature_last
    weights = torch.softmax(logits.double() / (1 if is_last else params.temperature), dim=-1)
    order = weights.argsort(descending=True, stable=True)
    if params.top_k:
        weights[order[params.top_k :]] = 0
    weights /= weights.sum()
    before = weights[order].cumsum(-1) - weights[order]
    weights[order[before >= params.top_p]] = 0
    weights[weights < params.min_p * weights.max()] = 0
    if is_last:
        weights **= 1 / params.temperature
    return weights / weights.sum()


def edited(logits: Tensor, seq: Sequence, eos: tuple[int, ...] = ()) -> Tensor:
    """One row of logits (vocab,) after `edit_logits`."""
    rows = logits[None].clone()
    edit_logits(rows, [seq], set(eos))
    return rows[0]


def test_sample_tokens_adds_log_probabilities_of_before_the_edits() -> None:
    params = SamplingParams(temperature=0, logit_bias={2: 9.0}, num_logprobs=1)
    asking, other = *sequences(params), *sequences(SamplingParams(temperature=0))
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    expected = torch.log_softmax(logits[0], dim=-1)
    assert sample_tokens(logits, [asking, other], {0}) == [2, 1]
    (logprobs,) = asking.logprobs
    assert (logprobs.token_id, logprobs.logprob) == (2, expected[2].item())
    assert logprobs.top == [(1, expected[1].item())]
    assert other.logprobs == []


def test_sample_tokens_gives_an_error_in_place_of_one_token() -> None:
    """One sequence's edits failed, and all sequences ended."""
    fails = SamplingParams(temperature=0, logit_bias={9: 1.0}, num_logprobs=1)
    seqs = [*sequences(fails), *sequences(SamplingParams(temperature=0, num_logprobs=1))]
    failure, token_id = sample_tokens(torch.tensor([[1.0, 3.0, 2.0]] * 2), seqs, {0})
    assert isinstance(failure, InferenceError)
    assert isinstance(failure.__cause__, IndexError)
    assert (token_id, seqs[0].logprobs) == (1, [])
    assert [each.token_id for each in seqs[1].logprobs] == [1]


def test_sample_tokens_tells_where_in_the_text_a_token_begins() -> None:
    (seq,) = sequences(SamplingParams(temperature=0, num_logprobs=0))
    seq.text = "Once"
    sample_tokens(torch.eye(1, 3), [seq], {0})
    assert seq.logprobs[0].text_offset == 4


def test_edit_logits_bans_what_was_rolled_back_there_and_nowhere_else() -> None:
    (seq,) = sequences(output=(3,))
    seq.banned = {0: [0], 1: [1, 2], 2: [3]}
    assert edited(torch.ones(4), seq).tolist() == [1, -float("inf"), -float("inf"), 1]


def test_edit_logits_repetition_penalty() -> None:
    """CTRL's formula: of what is in prompt or output, once, positive logits shrink."""
    params = SamplingParams(repetition_penalty=2.0)
    (seq,) = sequences(params, prompt=[0, 1, 1], output=(2, 2))
    got = edited(torch.tensor([4.0, -4.0, 3.0, 5.0]), seq)
    assert got.tolist() == [2.0, -8.0, 1.5, 5.0]


def test_edit_logits_repetition_penalty_of_the_last_tokens() -> None:
    params = SamplingParams(repetition_penalty=2.0, repetition_penalty_range=3)
    (seq,) = sequences(params, prompt=[0, 1, 1], output=(2, 2))
    got = edited(torch.tensor([4.0, -4.0, 3.0, 5.0]), seq)
    assert got.tolist() == [4.0, -8.0, 1.5, 5.0]


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


def test_edit_logits_min_tokens_bans_nothing_where_end_of_text_is_ignored() -> None:
    """End-of-text, which would end nothing, could not be said before min_tokens."""
    params = SamplingParams(min_tokens=3, ignore_eos=True)
    assert edited(torch.ones(5), sequences(params)[0], eos=(0, 4)).tolist() == [1] * 5


def test_edit_logits_min_tokens_blocks_stop_tokens_where_end_of_text_is_ignored() -> None:
    """A stop token ended such a text before min_tokens."""
    params = SamplingParams(min_tokens=3, ignore_eos=True, stop_token_ids={2: 2})
    got = edited(torch.ones(5), sequences(params)[0], eos=(0, 4))
    assert got.tolist() == [1, 1, -float("inf"), 1, 1]


def test_edit_logits_min_tokens_without_end_of_text() -> None:
    (seq,) = sequences(SamplingParams(min_tokens=3))
    assert edited(torch.ones(5), seq).tolist() == [1] * 5


def test_edit_logits_leaves_the_other_rows_alone() -> None:
    params = SamplingParams(repetition_penalty=2.0, logit_bias={1: 1.0}, presence_penalty=1.0)
    seqs = [*sequences(), *sequences(params, output=(2,)), *sequences()]
    logits = torch.ones(3, 4)
    edit_logits(logits, seqs, {0})
    assert logits[[0, 2]].tolist() == [[1] * 4] * 2


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


@pytest.mark.parametrize("bad", ["nan", "-inf", "inf"])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0),
        SamplingParams(top_k=40, top_p=0.9),
        SamplingParams(top_p=0.9),
        SamplingParams(),
        SamplingParams(top_k=2000, top_p=0.9, min_p=0.1),
    ],
)
def test_sample_none_from_a_row_without_numbers(params: SamplingParams, bad: str) -> None:
    """Greedy text was made of NaN; where one was to be drawn, all sequences ended."""
    logits = random_logits(3, 5000)
    seqs = [sequences(params, seed=seed)[0] for seed in range(3)]
    expected = sample(logits.clone(), seqs)
    if bad == "-inf":
        logits[1] = -float("inf")
    else:
        logits[1, 7] = float(bad)
    seqs = [sequences(params, seed=seed)[0] for seed in range(3)]
    assert sample(logits, seqs) == [expected[0], None, expected[2]]


def test_sample_tokens_fails_a_row_whose_log_probabilities_are_nan() -> None:
    """Of a token that was banned; the answer had NaN in it."""
    params = SamplingParams(temperature=0, min_tokens=1, num_logprobs=1)
    good, bad = sequences(params, count=2)
    logits = random_logits(2, 50)
    logits[1, 7] = torch.nan
    token_id, failure = sample_tokens(logits, [good, bad], [7])
    assert isinstance(token_id, int)
    assert isinstance(failure, InferenceError)
    assert (len(good.logprobs), len(bad.logprobs)) == (1, 0)


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
        (PEAKED, SamplingParams(temperature=1.5, temperature_last=True)),
        (PEAKED, SamplingParams(temperature=0.5, temperature_last=True, top_k=40, top_p=0.8)),
        (PEAKED, SamplingParams(temperature=2, temperature_last=True, top_p=0.9, min_p=0.1)),
        (FLAT, SamplingParams(temperature=0.1, temperature_last=True, top_p=0.9)),
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
] + [
    SamplingParams(temperature=0.5, temperature_last=True, top_k=top_k, top_p=0.9)
    for top_k in (0, 50, 1500)
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


@pytest.mark.parametrize("vocab", [8192, 8200])
def test_sample_seeks_the_likeliest_run_by_run(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all were sorted: with the likeliest far apart, in one run, and behind the last one."""
    logits = random_logits(30, vocab)
    logits[10:20, 70:130] += 9
    logits[20:, -30:] += 9
    seqs = [sequences(SamplingParams(top_k=50), seed=i)[0] for i in range(30)]
    in_runs = sample(logits.clone(), seqs)
    monkeypatch.setattr("engine.sampler.RUN_TOKENS", vocab)
    seqs = [sequences(SamplingParams(top_k=50), seed=i)[0] for i in range(30)]
    assert sample(logits, seqs) == in_runs
    assert max(token_id or 0 for token_id in in_runs[20:]) >= vocab - 8


def test_collect_logprobs_of_the_token_and_the_likeliest() -> None:
    logits = random_logits(2, 50)
    expected = torch.log_softmax(logits, dim=-1)
    for row, got in enumerate(collect_logprobs(logits, [7, 8], num_top=3)):
        assert got
        assert (got.token_id, got.logprob) == (7 + row, expected[row, 7 + row].item())
        values, token_ids = expected[row].topk(3)
        assert got.top == list(zip(token_ids.tolist(), values.tolist(), strict=True))


def test_collect_logprobs_of_a_row_do_not_depend_on_others() -> None:
    """Equal logits among them, of which either could be told as the likelier."""
    logits = random_logits(70, 1003).mul(4).round()
    token_ids = list(range(70))
    alone = [
        collect_logprobs(logits[row : row + 1], [row], num_top=5, ranks=True)[0]
        for row in range(70)
    ]
    assert collect_logprobs(logits, token_ids, num_top=5, ranks=True) == alone
