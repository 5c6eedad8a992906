"""From logits to token ids."""

import math
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.request import PositionLogprobs, Sequence

# How many candidates a row needs; these two stand for none and for all.
GREEDY, ALL = 0, -1
# Drawing from the whole vocabulary draws a block of so many tokens first, then one of the block.
BLOCK_TOKENS = 256


def sample_tokens(
    logits: Tensor, seqs: SequenceOf[Sequence], eos_token_ids: Iterable[int]
) -> list[int]:
    """The next token id of each sequence, from logits (B, vocab) float32, which it changes.

    Sequences that want log probabilities get those of their token too.
    """
    wanting = [row for row, seq in enumerate(seqs) if seq.params.num_logprobs is not None]
    raw = logits[wanting] if wanting else logits[:0]  # a copy, since the edits change logits
    edit_logits(logits, seqs, eos_token_ids)
    token_ids = sample(logits, seqs)
    for row, row_logits in zip(wanting, raw, strict=True):
        seq = seqs[row]
        num_top = seq.params.num_logprobs or 0
        seq.logprobs += collect_logprobs(row_logits[None], [token_ids[row]], num_top)
    return token_ids


def edit_logits(logits: Tensor, seqs: SequenceOf[Sequence], eos_token_ids: Iterable[int]) -> None:
    """Applies penalties, biases and bans to logits (B, vocab) float32, in place."""
    for row, seq in enumerate(seqs):
        params, output = seq.params, seq.output_token_ids
        if banned := seq.banned.get(len(output)):
            logits[row, banned] = -math.inf
        if not params.edits_logits:
            continue
        prompt = seq.request.prompt_token_ids
        if params.rules:
            params.rules.add_biases(logits[row], prompt, output)
        if params.repetition_penalty != 1.0:
            ids = torch.tensor(sorted({*prompt, *output}))
            seen = logits[row, ids]
            penalty = params.repetition_penalty
            logits[row, ids] = torch.where(seen > 0, seen / penalty, seen * penalty)
        if output and (params.presence_penalty or params.frequency_penalty):
            ids, counts = torch.tensor(output).unique(return_counts=True)
            # Name the dtype: while another thread loads a model, torch's default one changes.
            penalties = params.presence_penalty + params.frequency_penalty * counts.to(logits)
            logits[row, ids] -= penalties
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias))
            biases = torch.tensor(list(params.logit_bias.values()), dtype=logits.dtype)
            logits[row, ids] += biases.to(logits.device)
        if len(output) < params.min_tokens:
            logits[row, list(eos_token_ids)] = -math.inf
        if params.rules:
            params.rules.restrict(
                logits[row],
                prompt,
                output,
                max_new_tokens=params.max_new_tokens,
                eos_token_ids=None if params.ignore_eos else list(eos_token_ids),
            )


def sample(logits: Tensor, seqs: SequenceOf[Sequence]) -> list[int]:
    """One token id a row of logits (B, vocab) float32; row i draws from seqs[i].rng.

    What a row gives depends on that row alone, to the last bit: rows are computed in
    classes of fixed width, and a sum over a row never sees how many others there are.
    """
    token_ids = [0] * len(seqs)
    vocab_size = logits.shape[1]
    classes: dict[int, list[int]] = {}
    for row, seq in enumerate(seqs):
        params = seq.params
        if params.temperature == 0:
            width = GREEDY
        elif 0 < params.top_k <= 64:
            width = 64
        elif params.top_k > 1024 or (params.top_k == 0 and params.top_p == 1):
            width = ALL
        else:
            width = 1024
        classes.setdefault(min(width, vocab_size), []).append(row)
    for width, rows in classes.items():
        part = logits if len(rows) == len(seqs) else logits[rows]
        chosen = [seqs[row] for row in rows]
        draws = [seq.rng.random() for seq in chosen]
        if width == GREEDY:
            picked = part.argmax(dim=-1).tolist()
        elif width == ALL:
            picked = []
            # Eight rows at a time: larger tensors would get new memory in every step.
            for at in range(0, len(rows), 8):
                few = slice(at, at + 8)
                picked += _draw_of_all(part[few], chosen[few], draws[few])
        else:
            picked = _draw_of_likeliest(part, chosen, draws, width)
        for row, token_id in zip(rows, picked, strict=True):
            token_ids[row] = token_id
    return token_ids


def _column(values: Iterable[float], device: torch.device) -> Tensor:
    """(B, 1) float64."""
    return torch.tensor(list(values), dtype=torch.float64, device=device)[:, None]


def _weights(logits: Tensor, seqs: SequenceOf[Sequence]) -> Tensor:
    """What each token weighs, (B, vocab) float32; the likeliest 1."""
    temperatures = _column((seq.params.temperature for seq in seqs), logits.device).float()
    # A temperature that float32 rounds to 0 must not divide 0 by 0.
    temperatures.clamp_(min=torch.finfo(torch.float32).tiny)
    return (logits - logits.amax(dim=-1, keepdim=True)).div_(temperatures).exp_()


def _keep_likeliest(weights: Tensor, amounts: Tensor, limit: float) -> None:
    """Leaves of weights (vocab,) float32 the likeliest until their amounts reach the limit.

    In place. Floats that are not negative are ordered as their bits are: the upper half of
    the bits sorts tokens into buckets, and only the bucket in which the limit is reached has
    to be sorted further. That takes a tenth of the time of sorting everything.
    """
    buckets = weights.view(torch.int32) >> 16
    sums = buckets.bincount(amounts.double()).flip(0).cumsum(0)  # the likeliest bucket first
    at = min(int(torch.searchsorted(sums, limit)), len(sums) - 1)
    bucket = len(sums) - 1 - at
    last = (buckets == bucket).nonzero()[:, 0]
    last = last[weights[last].argsort(descending=True, stable=True)]
    ends = amounts[last].double().cumsum(0) + (sums[at - 1] if at else 0)
    weights.masked_fill_(buckets < bucket, 0)
    weights[last[1:][ends[:-1] >= limit]] = 0


def _draw_of_all(logits: Tensor, seqs: SequenceOf[Sequence], draws: SequenceOf[float]) -> list[int]:
    """One token id a row of logits (B, vocab); draws: in [0, 1). First a block of tokens is drawn,
    then one of the block: sums in double precision over everything would take most of the time."""
    weights = _weights(logits, seqs)
    for each, seq in zip(weights, seqs, strict=True):
        if seq.params.top_k:
            _keep_likeliest(each, torch.ones_like(each), seq.params.top_k)
        if seq.params.top_p < 1:
            everything = each.sum(dtype=torch.float64).item()
            _keep_likeliest(each, each.clone(), seq.params.top_p * everything)
    if any(seq.params.min_p for seq in seqs):
        weights[weights < _column((seq.params.min_p for seq in seqs), weights.device).float()] = 0
    blocks = F.pad(weights, (0, -weights.shape[1] % BLOCK_TOKENS)).view(len(seqs), -1, BLOCK_TOKENS)
    ends = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    targets = _column(draws, weights.device) * ends[:, -1:]
    drawn = torch.searchsorted(ends, targets, right=True)
    targets -= F.pad(ends, (1, 0)).gather(1, drawn)
    inside = blocks[torch.arange(len(seqs), device=drawn.device), drawn[:, 0]]
    inside = inside.cumsum(dim=-1, dtype=torch.float64)
    # The last token of the block that weighs something: rounding must not draw one beyond it.
    last = torch.searchsorted(inside, inside.amax(dim=-1, keepdim=True))
    token = torch.searchsorted(inside, targets, right=True).minimum(last)
    return (drawn * BLOCK_TOKENS + token)[:, 0].tolist()


def _draw_of_likeliest(
    logits: Tensor, seqs: SequenceOf[Sequence], draws: list[float], width: int
) -> list[int]:
    """The same from the `width` likeliest tokens, and from all where these are not enough."""
    device, vocab_size = logits.device, logits.shape[1]
    temperatures = _column((seq.params.temperature for seq in seqs), device)
    top_k = _column((seq.params.top_k or vocab_size for seq in seqs), device)
    top_p = _column((seq.params.top_p for seq in seqs), device)
    values, ids = torch.topk(logits, width, dim=-1)
    weights = torch.exp((values.double() - values[:, :1].double()) / temperatures)
    weights[torch.arange(width, device=device)[None, :] >= top_k] = 0
    cumulative = weights.cumsum(dim=-1)
    total, is_cut = cumulative[:, -1:], []
    if 64 < width < vocab_size:
        # top_p is a share of the top_k tokens, or of all: that may be more than were looked at.
        everything = _weights(logits, seqs).sum(dim=-1, dtype=torch.float64, keepdim=True)
        total = torch.where(top_k > width, everything, total)
        is_cut = (cumulative[:, -1:] < top_p * total).nonzero()[:, 0].tolist()
    weights[cumulative - weights >= top_p * total] = 0
    weights[weights < _column((seq.params.min_p for seq in seqs), device)] = 0
    cumulative = weights.cumsum(dim=-1)
    targets = _column(draws, device) * cumulative[:, -1:]
    picked = ids.gather(1, torch.searchsorted(cumulative, targets, right=True))[:, 0].tolist()
    for row in is_cut:  # its distribution is flat
        (picked[row],) = _draw_of_all(logits[row : row + 1], [seqs[row]], [draws[row]])
    return picked


def collect_logprobs(
    logits: Tensor, token_ids: SequenceOf[int], num_top: int
) -> list[PositionLogprobs]:
    """Of token_ids[i] and the `num_top` likeliest tokens, at each row of logits (B, vocab)."""
    collected = []
    for row, token_id in zip(logits, token_ids, strict=True):  # in turn: B may be large
        logprobs = torch.log_softmax(row.float(), dim=-1)
        values, ids = logprobs.topk(num_top)
        top = list(zip(ids.tolist(), values.tolist(), strict=True))
        collected.append(PositionLogprobs(token_id, logprobs[token_id].item(), top))
    return collected
