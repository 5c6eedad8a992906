"""Whether a runner computes what its model computes by itself: looked at once, at load.

A model's attention, positions or state may differ in many ways from what the engine expects, and
each of them gives fluent wrong text. So no model is believed to be like others: it is compared.
"""

import asyncio
import inspect
import logging
import math
import statistics
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.kernels import PLAIN, Kernel
from engine.model_runner import ModelRunner
from engine.request import EngineRequest, Prompt, SamplingParams, Sequence

logger = logging.getLogger("engine")

# The first runs alone, then all together. The longest has a pass of its own, as prompts above
# SHORT_PROMPT_TOKENS have; the others share one.
PROMPT_TOKENS = (11, 1, 5, 40)
NUM_NEW_TOKENS = 4
# Tokens times parameters that may go through the model: at 1e9 parameters about ten seconds of
# two cores, with what the runner computes of them.
MAX_WORK = 5e11
# Where a configuration says how far back something sees, or from where on something changes. A
# longer text is compared too, where MAX_WORK allows it.
LIMITS = (
    "sliding_window",
    "sliding_window_size",
    "attention_window_size",
    "attention_chunk_size",
    "local_attention",
    "window_size",
    "keep_window_size",
    "index_topk",
    "original_max_position_embeddings",
)
# By how much of their spread logits may be off: in float32, and where much is rounded. What float32
# explains is far below what is looked for, so other models are compared in float32 first;
# docs/models.md has the figures.
FLOAT32_BOUND = 1e-3
ROUNDED_BOUND = 0.75
MAX_CONVERTED_PARAMETERS = 2e9  # to float32, which takes twice the memory of bfloat16 meanwhile
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
BANNED_LOGIT = -1e30  # what models give tokens that they never say is below


def checked_runner(
    model: PreTrainedModel,
    kernel: Kernel,
    max_model_len: int,
    new_runner: Callable[..., ModelRunner],
    new_served_runner: Callable[[], ModelRunner],
) -> ModelRunner:
    """A runner that computes what the model does.

    kernel: what is to be served. new_runner: makes a runner for a `kernel`. new_served_runner:
    makes the one to be served, which may be of another kernel after all.

    Raises ValueError for a model that fails by itself, that looks at tokens to come, or of which
    the runner would make another text.
    """
    is_float32 = model.dtype == torch.float32 and not kernel.is_exact
    can_be_float32 = (
        model.dtype == torch.float32 or num_parameters(model) <= MAX_CONVERTED_PARAMETERS
    )
    is_converted = not is_float32 and can_be_float32
    with in_float32(model) if is_converted else nullcontext():
        check = ModelCheck(model, max_model_len)
        if is_converted:
            with check.explaining():
                plain = new_runner(kernel=PLAIN, max_num_seqs=len(check.references))
            check.compare(plain, FLOAT32_BOUND)
            del plain  # and its cache
    with check.explaining():
        runner = new_served_runner()
    if is_converted:
        check.compare_alone(runner, ROUNDED_BOUND)
    else:
        check.compare(runner, FLOAT32_BOUND if is_float32 else ROUNDED_BOUND)
    return runner


@contextmanager
def in_float32(model: PreTrainedModel) -> Generator[None]:
    """Until the end of the block, the model's numbers are float32; then they are as before."""
    dtype = model.dtype
    tensors = [*model.parameters(), *model.buffers()]
    converted = [each for each in tensors if each.dtype == dtype]
    for each in converted:
        each.data = each.data.float()
    try:
        yield
    finally:
        for each in converted:
            each.data = each.data.to(dtype)  # to the last bit: float32 holds all that it does


def num_parameters(model: PreTrainedModel) -> int:
    return sum(weight.numel() for weight in model.parameters())


@dataclass(frozen=True, slots=True)
class Reference:
    """A text, and what the model by itself computes for it.

    logits: (1 + NUM_NEW_TOKENS, vocab) float32, after the prompt and after each new token.
    """

    prompt_token_ids: list[int]
    new_token_ids: list[int]
    logits: Tensor

    def new_sequence(self) -> Sequence:
        prompt = Prompt(self.prompt_token_ids, None)
        loop = cast(asyncio.AbstractEventLoop, None)  # nobody waits for what it gives
        return Sequence(EngineRequest(prompt, SamplingParams(), False, loop), 0, 0)


def own_logits(model: PreTrainedModel, token_ids: list[int], num_rows: int) -> Tensor:
    """(num_rows, vocab) float32 of the last tokens, as the model computes them by itself.

    Raises ValueError if it fails.
    """
    options = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = num_rows
    input_ids = torch.tensor([token_ids], device=model.device)
    try:
        output = model(input_ids=input_ids, use_cache=False, **options)
        logits: Tensor = output.logits[0, -num_rows:].float()
    except Exception as error:  # whatever a model's own code raises
        reason = in_a_line(error)
        raise ValueError(f"{type(model).__name__} does not run by itself: {reason}") from error
    if logits.isnan().any():
        raise ValueError(f"{type(model).__name__} computes NaN by itself")
    return logits


class ModelCheck:
    """Texts of random tokens, and what a model by itself computes for them.

    model: as it was loaded; nothing of it may have been changed yet.
    max_model_len: tokens that a text may have.
    Raises ValueError for a model that fails by itself, or that looks at tokens to come.
    """

    @torch.no_grad()  # models keep some tensors, which inference mode would make unchangeable
    def __init__(self, model: PreTrainedModel, max_model_len: int):
        model.eval()
        self.model_name = type(model).__name__
        self.suspicion = suspicion(model)
        vocab_size = model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        self.references = []
        for length in choose_lengths(model, max_model_len):
            size = (length + NUM_NEW_TOKENS,)
            token_ids = torch.randint(vocab_size, size, generator=generator).tolist()
            logits = own_logits(model, token_ids, 1 + NUM_NEW_TOKENS)
            self.references.append(Reference(token_ids[:length], token_ids[length:], logits))
        first = self.references[0]
        unaware = own_logits(model, first.prompt_token_ids, 1)
        bound = FLOAT32_BOUND if model.dtype == torch.float32 else ROUNDED_BOUND
        if difference(unaware[0], first.logits[0]) > bound:
            raise ValueError(
                f"{self.model_name} is no causal language model{self.suspicion}: what it computes "
                "for a token depends on those that come after it, as in an encoder"
            )

    def compare(self, runner: ModelRunner, bound: float) -> None:
        """Raises ValueError where logits are further away from the model's own than the bound."""
        self.compare_alone(runner, bound)
        first, *others = self.references
        if room := runner.max_num_seqs - 1:
            together = others[:room]
            self._run(runner, [first, *together[:2]], together[2:], bound, "beside others")

    def compare_alone(self, runner: ModelRunner, bound: float) -> None:
        """The same with the first text by itself."""
        self._run(runner, self.references[:1], [], bound, "alone")

    @torch.no_grad()
    def _run(
        self,
        runner: ModelRunner,
        begin: list[Reference],
        join: list[Reference],
        bound: float,
        where: str,
    ) -> None:
        """Runs some texts, which others join in the next step, then compares each."""
        running: list[tuple[Reference, Sequence, list[float]]] = []
        for new in (begin, join, *([] for _ in range(NUM_NEW_TOKENS - 1))):
            running += [(reference, reference.new_sequence(), []) for reference in new]
            with self.explaining():
                logits = runner.forward([seq for _, seq, _ in running], len(new))
            for (reference, seq, differences), row in zip(running, logits, strict=True):
                num_new_tokens = len(seq.output_token_ids)
                differences.append(difference(row, reference.logits[num_new_tokens]))
                seq.output_token_ids += reference.new_token_ids[num_new_tokens:][:1]
        for reference, _, differences in running:
            # One row may be far away: where two experts are nearly as good, rounding decides.
            typical = statistics.median(differences)
            logger.debug("%d tokens, %s: %s", len(reference.prompt_token_ids), where, differences)
            if typical > bound:
                raise ValueError(self._problem(len(reference.prompt_token_ids), where, typical))

    @contextmanager
    def explaining(self) -> Generator[None]:
        """Raises ValueError for whatever a model's code raises in the engine."""
        try:
            yield
        except Exception as error:
            raise ValueError(
                f"{self.model_name} does not run in this engine{self.suspicion}: {in_a_line(error)}"
            ) from error

    def _problem(self, num_prompt_tokens: int, where: str, difference: float) -> str:
        return (
            f"{self.model_name} would give wrong text here{self.suspicion}: after a prompt of "
            f"{num_prompt_tokens} tokens, {where}, its logits are {difference:.2g} of their spread "
            "away from the model's own, more than rounding explains; docs/models.md lists what "
            "can be served"
        )


def in_a_line(error: Exception) -> str:
    reason = " ".join(str(error).split())
    return reason if isinstance(error, ValueError) else f"{type(error).__name__}: {reason}"


def difference(got: Tensor, wanted: Tensor) -> float:
    """By how much logits (vocab,) differ, as a part of the spread of those wanted.

    A root of mean squares, infinite where one is NaN. What all have in common does not count: it
    changes no probability.
    """
    is_wanted = wanted > BANNED_LOGIT
    got, wanted = got[is_wanted].double(), wanted[is_wanted].double()
    spread = wanted.std(correction=0).clamp(min=torch.finfo(torch.float32).tiny)
    error = float((got - wanted).std(correction=0) / spread)
    return math.inf if math.isnan(error) else error


def choose_lengths(model: PreTrainedModel, max_model_len: int) -> list[int]:
    """The tokens of each prompt: one is beyond each of the model's limits, where that can be.

    The longest are left out until MAX_WORK suffices; the first stays in any case.
    """
    most_tokens = max(1, max_model_len - NUM_NEW_TOKENS)
    budget_tokens = MAX_WORK / num_parameters(model)
    first, *lengths = [min(length, most_tokens) for length in PROMPT_TOKENS]
    while lengths and first + sum(lengths) > budget_tokens:
        lengths.remove(max(lengths))
    # The longest of these is beyond all limits.
    limits = sorted(limit for limit in limits_of(model) if limit < most_tokens)
    for limit in reversed(limits):
        # Half as long again: what a few tokens change that should not be seen is little.
        length = min(limit * 3 // 2, most_tokens)
        if first + sum(lengths) + length <= budget_tokens:
            return [first, *lengths, length]
        logger.info(
            "%s is compared with the engine only in texts of less than %d tokens: it is large",
            type(model).__name__,
            limit,
        )
    return [first, *lengths]


def limits_of(model: PreTrainedModel) -> set[int]:
    """The numbers of tokens that the configuration has under the names of LIMITS."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    places = [config.to_dict(), rope, *(each for each in rope.values() if isinstance(each, dict))]
    found = (place.get(name) for place in places for name in LIMITS)
    return {limit for limit in found if isinstance(limit, int) and limit > 0}


def suspicion(model: PreTrainedModel) -> str:
    """What about a model is unusual, as an apposition; for whoever is told that it is refused."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or []) - ATTENTION_LAYERS
    if kinds:
        return f" (it has layers of the kind {', '.join(sorted(kinds))})"
    if model._is_stateful:
        return " (it has recurrent layers)"
    return ""
