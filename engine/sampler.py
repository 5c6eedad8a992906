"""From logits to token ids."""

import math
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.constraint import TokenMask
from engine.masks import Masks
from engine.request import (
    LOWEST_LOGPROB,
    FinishReason,
    InferenceError,
    PositionLogprobs,
    Sequence,
)

# How many candidates a row needs; these two stand for none and for all.
GREEDY, ALL = 0, -1
# Drawing from the whole vocabulary draws a block of so many tokens first, then one of the block.
BLOCK_TOKENS = 256
# The likeliest tokens are sought run by run of so many.
RUN_TOKENS = 64
ROWS_TOGETHER = 32  # get log probabilities: each takes as much memory as the vocabulary has tokens
NO_LOGPROBS = "no log probabilities: logits are NaN or infinite"


def sample_tokens(
    logits: Tensor,
    seqs: SequenceOf[Sequence],
    eos_token_ids: Iterable[int],
    masks: Masks | None = None,
) -> list[int | FinishReason | InferenceError]:
    """The next token id of each sequence, from logits (B, vocab) float32, which it changes; or
    what ends that sequence alone: a finish reason where its mask leaves nothing that may be drawn,
    an error where its edits failed or left nothing that can be.

    masks: of each sequence; None where no sequence has a constraint.
    Sequences that want log probabilities get those of their token too.
    """
    masks = masks or [None] * len(seqs)
    wanting = [row for row, seq in enumerate(seqs) if seq.params.num_logprobs is not None]
    raw = logits[wanting] if wanting else logits[:0]  # a copy, since the edits change logits
    failures: dict[int, InferenceError] = {}
    for row, (seq, mask) in enumerate(zip(seqs, masks, strict=True)):
        if isinstance(mask, InferenceError):
            failures[row] = mask
            continue
        try:
            if seq.params.edits_logits or seq.banned:
                edit_logits(logits[row : row + 1], [seq], eos_token_ids)
            if mask:
                restrict(logits[row], seq, mask, eos_token_ids)
        except Exception as error:
            failures[row] = InferenceError("the logits of a sequence could not be edited")
            failures[row].__cause__ = error
    token_ids: list[int | FinishReason | InferenceError] = [
        _why_none(logits[row], seqs[row], masks[row]) if token_id is None else token_id
        for row, token_id in enumerate(sample(logits, seqs))
    ]
    for row, failure in failures.items():
        token_ids[row] = failure
    if wanting:
        _add_logprobs(raw, wanting, seqs, token_ids)
    return token_ids


def _add_logprobs(
    raw: Tensor,
    rows: list[int],
    seqs: SequenceOf[Sequence],
    token_ids: list[int | FinishReason | InferenceError],
) -> None:
    """Gives the sequences of these rows log probabilities of their token, from logits (len(rows),
    vocab); an error in place of the token where there are none."""
    drawn = [(at, row, token_ids[row]) for at, row in enumerate(rows)]
    # Those that want as many likeliest tokens together: of equal ones, others may be among more.
    for num_top in {seqs[row].params.num_logprobs for row in rows}:
        same = [
            (at, row, token_id)
            for at, row, token_id in drawn
            if seqs[row].params.num_logprobs == num_top and isinstance(token_id, int)
        ]
        logits = raw[[at for at, _, _ in same]]
        collected = collect_logprobs(logits, [token_id for _, _, token_id in same], num_top or 0)
        for (_, row, _), logprobs in zip(same, collected, strict=True):
            if logprobs is None:  # of a token that cannot be drawn, a logit may be NaN
                token_ids[row] = InferenceError(NO_LOGPROBS)
            else:
                seqs[row].logprobs.append(replace(logprobs, text_offset=len(seqs[row].text)))


def restrict(logits: Tensor, seq: Sequence, mask: TokenMask, eos_token_ids: Iterable[int]) -> None:
    """Leaves in logits (vocab,) float32 only tokens that the mask allows, and those that end the
    text where it may end. In place."""
    bias = mask.bias
    if mask.can_end:
        ends = [*seq.params.stop_token_ids, *(() if seq.params.ignore_eos else eos_token_ids)]
        bias = bias.clone()
        bias[ends] = 0
    logits += bias.to(logits.device)


def _why_none(
    logits: Tensor, seq: Sequence, mask: TokenMask | InferenceError | None
) -> FinishReason | InferenceError:
    """Why no token can be drawn from logits (vocab,)."""
    if isinstance(mask, TokenMask) and logits.amax() == -math.inf:
        if mask.can_end:
            return "stop"  # no token that may come can be drawn, and none has to
        if seq.banned.get(len(seq.output_token_ids)):
            return "content_filter"  # all that may come begins a forbidden word
    return InferenceError("no token can be drawn: logits are NaN, infinite, or all banned")


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
            tokens = [*prompt, *output][-params.repetition_penalty_range :]
            ids = torch.tensor(sorted({*tokens}))
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
            ends = [] if params.ignore_eos else list(eos_token_ids)
            logits[row, [*ends, *params.stop_token_ids]] = -math.inf
        if params.rules:
            params.rules.restrict(
                logits[row],
                prompt,
                output,
                max_new_tokens=params.max_new_tokens,
                eos_token_ids=None if params.ignore_eos else list(eos_token_ids),
            )


def sample(logits: Tensor, seqs: SequenceOf[Sequence]) -> list[int | None]:
    """One token id a row of logits (B, vocab) float32; row i draws from seqs[i].rng. None where
    the largest logit is not finite.

    What a row gives depends on that row alone, to the last bit: rows are computed in
    classes of fixed width, and a sum over a row never sees how many others there are.
    """
    token_ids: list[int | None] = [None] * len(seqs)
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
            likeliest = part.argmax(dim=-1, keepdim=True)
            picked = _where_finite(part.gather(1, likeliest), likeliest)
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


def _where_finite(largest: Tensor, picked: Tensor) -> list[int | None]:
    """The tokens picked (B, 1), without those of rows whose largest logit (B, 1) is none to
    reckon with: it is NaN if one logit is, and minus infinity if all are."""
    finite = largest.isfinite()[:, 0].tolist()
    token_ids = picked[:, 0].tolist()
    return [token_id if ok else None for token_id, ok in zip(token_ids, finite, strict=True)]


def _column(values: Iterable[float], device: torch.device) -> Tensor:
    """(B, 1) float64."""
    return torch.tensor(list(values), dtype=torch.float64, device=device)[:, None]


def _temperatures(seqs: SequenceOf[Sequence], device: torch.device) -> Tensor:
    """At which the tokens are chosen that one is drawn of, (B, 1) float64."""
    params = (seq.params for seq in seqs)
    return _column((1.0 if p.temperature_last else p.temperature for p in params), device)


def _apply_last_temperatures(weights: Tensor, seqs: SequenceOf[Sequence]) -> None:
    """To the rows of weights (B, any) that were chosen from without a temperature, in place."""
    for row, seq in enumerate(seqs):
        if seq.params.temperature_last:
            weights[row].pow_(1 / seq.params.temperature)


def _weights(logits: Tensor, largest: Tensor, seqs: SequenceOf[Sequence]) -> Tensor:
    """What each token weighs, (B, vocab) float32; the likeliest 1. largest: logit, (B, 1)."""
    temperatures = _temperatures(seqs, logits.device).float()
    # A temperature that float32 rounds to 0 must not divide 0 by 0.
    temperatures.clamp_(min=torch.finfo(torch.float32).tiny)
    return (logits - largest).div_(temperatures).exp_()


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


def _draw_of_all(
    logits: Tensor, seqs: SequenceOf[Sequence], draws: SequenceOf[float]
) -> list[int | None]:
    """One token id a row of logits (B, vocab); draws: in [0, 1). First a block of tokens is drawn,
    then one of the block: sums in double precision over everything would take most of the time."""
    largest = logits.amax(dim=-1, keepdim=True)
    weights = _weights(logits, largest, seqs)
    is_finite = largest.isfinite()[:, 0].tolist()
    for each, seq, ok in zip(weights, seqs, is_finite, strict=True):
        if not ok:
            continue
        if seq.params.top_k:
            _keep_likeliest(each, torch.ones_like(each), seq.params.top_k)
        if seq.params.top_p < 1:
            everything = each.sum(dtype=torch.float64).item()
            _keep_likeliest(each, each.clone(), seq.params.top_p * everything)
    if any(seq.params.min_p for seq in seqs):
        weights[weights < _column((seq.params.min_p for seq in seqs), weights.device).float()] = 0
    _apply_last_temperatures(weights, seqs)
    blocks = F.pad(weights, (0, -weights.shape[1] % BLOCK_TOKENS)).view(len(seqs), -1, BLOCK_TOKENS)
    ends = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    targets = _column(draws, weights.device) * ends[:, -1:]
    drawn = torch.searchsorted(ends, targets, right=True)
    drawn.clamp_(max=ends.shape[1] - 1)  # NaN is found behind the end
    targets -= F.pad(ends, (1, 0)).gather(1, drawn)
    inside = blocks[torch.arange(len(seqs), device=drawn.device), drawn[:, 0]]
    inside = inside.cumsum(dim=-1, dtype=torch.float64)
    # The last token of the block that weighs something: rounding must not draw one beyond it.
    last = torch.searchsorted(inside, inside.amax(dim=-1, keepdim=True))
    token = torch.searchsorted(inside, targets, right=True).minimum(last)
    return _where_finite(largest, drawn * BLOCK_TOKENS + token)


def _likeliest(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` largest logits of each row (B, vocab) and their token ids, the largest first.

    They lie in the `width` runs of RUN_TOKENS tokens whose largest logits are the largest, so only
    those are sorted, which takes half the time of `topk` over everything.
    """
    num_rows, vocab_size = logits.shape
    num_runs = vocab_size // RUN_TOKENS
    if num_runs <= 2 * width:
        return torch.topk(logits, width, dim=-1)
    end = num_runs * RUN_TOKENS
    runs = logits[:, :end].unflatten(1, (num_runs, RUN_TOKENS))
    best = runs.amax(dim=-1).topk(width, dim=-1).indices
    few = runs[torch.arange(num_rows, device=logits.device)[:, None], best].flatten(1)
    # Behind the last whole run there are a few tokens more.
    values, places = torch.topk(torch.cat((few, logits[:, end:]), dim=1), width, dim=-1)
    run = best.gather(1, (places // RUN_TOKENS).clamp_(max=width - 1))
    ids = run * RUN_TOKENS + places % RUN_TOKENS
    return values, torch.where(places < few.shape[1], ids, places - few.shape[1] + end)


def _draw_of_likeliest(
    logits: Tensor, seqs: SequenceOf[Sequence], draws: list[float], width: int
) -> list[int | None]:
    """The same from the `width` likeliest tokens, and from all where these are not enough."""
    device, vocab_size = logits.device, logits.shape[1]
    temperatures = _temperatures(seqs, device)
    top_k = _column((seq.params.top_k or vocab_size for seq in seqs), device)
    top_p = _column((seq.params.top_p for seq in seqs), device)
    values, ids = _likeliest(logits, width)
    largest = values[:, :1]
    weights = torch.exp((values.double() - largest.double()) / temperatures)
    weights[torch.arange(width, device=device)[None, :] >= top_k] = 0
    cumulative = weights.cumsum(dim=-1)
    total, is_cut = cumulative[:, -1:], []
    if 64 < width < vocab_size:
        # top_p is a share of the top_k tokens, or of all: that may be more than were looked at.
        everything = _weights(logits, largest, seqs).sum(dim=-1, dtype=torch.float64, keepdim=True)
        total = torch.where(top_k > width, everything, total)
        is_cut = (cumulative[:, -1:] < top_p * total).nonzero()[:, 0].tolist()
    weights[cumulative - weights >= top_p * total] = 0
    weights[weights < _column((seq.params.min_p for seq in seqs), device)] = 0
    _apply_last_temperatures(weights, seqs)
    cumulative = weights.cumsum(dim=-1)
    targets = _column(draws, device) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, targets, right=True)
    drawn.clamp_(max=width - 1)  # NaN is found behind the end
    picked = _where_finite(largest, ids.gather(1, drawn))
    for row in is_cut:  # its distribution is flat
        (picked[row],) = _draw_of_all(logits[row : row + 1], [seqs[row]], [draws[row]])
    return picked


def collect_logprobs(
    logits: Tensor, token_ids: SequenceOf[int], num_top: int, ranks: bool = False
) -> list[PositionLogprobs | None]:
    """Of token_ids[i] and the `num_top` likeliest tokens, at each row of logits (B, vocab); None
    where logits are NaN or infinite. ranks: whether with a rank.
    """
    collected: list[PositionLogprobs | None] = []
    for start in range(0, len(token_ids), ROWS_TOGETHER):
        some_ids = list(token_ids[start : start + ROWS_TOGETHER])
        logprobs = logits[start : start + ROWS_TOGETHER].float().log_softmax(dim=-1)
        logprobs.clamp_(min=LOWEST_LOGPROB)
        own = logprobs.gather(1, torch.tensor(some_ids, device=logits.device)[:, None])
        values, ids = logprobs.topk(num_top)
        num_likelier = torch.count_nonzero(logprobs > own, dim=-1).tolist() if ranks else None
        rows = zip(some_ids, own[:, 0].tolist(), ids.tolist(), values.tolist(), strict=True)
        for row, (token_id, logprob, top_ids, top_values) in enumerate(rows):
            if math.isnan(logprob):  # if one of a row is, all are
                collected.append(None)
                continue
            rank = 1 + num_likelier[row] if num_likelier else None
            top = list(zip(top_ids, top_values, strict=True))
            collected.append(PositionLogprobs(token_id, logprob, top, rank=rank))
    return collected
