"""What a model's author says of its tokens: which must not come, which must, and when."""

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

# A logit that grows exponentially stays a float32 that can be divided by a small temperature.
MOST_GROWTH = math.log(1e30)


class TokenRules:
    """Changes to logits that hold for every text of one model.

    Each means what it does in transformers' `generate`, under the same name
    (https://huggingface.co/docs/transformers/main_classes/text_generation), for a prompt alone in
    its batch. All token ids are within the vocabulary.

    sequence_bias: by token ids, what is added to the logit of the last one where the others have
        come just before; -inf bans it.
    begin_suppress_tokens: banned as the first token.
    no_repeat_ngram_size: so many tokens come in the same order only once; 0 for no such rule.
    forced_bos_token_ids: one of these follows a prompt of one token.
    forced_eos_token_ids: one of these is the last token of a text that reaches its length.
    min_length, min_new_tokens: no end-of-text before, with the prompt and without it.
    exponential_decay_length_penalty: (after how many tokens the logits of end-of-text grow, by
        what factor for each token more).
    """

    def __init__(
        self,
        *,
        sequence_bias: Mapping[tuple[int, ...], float] | None = None,
        begin_suppress_tokens: Iterable[int] = (),
        no_repeat_ngram_size: int = 0,
        forced_bos_token_ids: Iterable[int] = (),
        forced_eos_token_ids: Iterable[int] = (),
        min_length: int = 0,
        min_new_tokens: int = 0,
        exponential_decay_length_penalty: tuple[int, float] | None = None,
    ):
        by_prefix: dict[tuple[int, ...], list[tuple[int, float]]] = {}
        for token_ids, bias in (sequence_bias or {}).items():
            by_prefix.setdefault(token_ids[:-1], []).append((token_ids[-1], bias))
        # By the tokens before, the ids of those that have a bias then, and their biases.
        self.biases = {prefix: _tensors(biased) for prefix, biased in by_prefix.items()}
        self.prefix_lengths = sorted({len(prefix) for prefix in by_prefix})
        self.begin_suppress_tokens = list(begin_suppress_tokens)
        self.no_repeat_ngram_size = no_repeat_ngram_size
        self.forced_bos_token_ids = list(forced_bos_token_ids)
        self.forced_eos_token_ids = list(forced_eos_token_ids)
        self.min_length = min_length
        self.min_new_tokens = min_new_tokens
        self.exponential_decay_length_penalty = exponential_decay_length_penalty

    def add_biases(self, logits: Tensor, prompt: list[int], output: list[int]) -> None:
        """Changes the logits (vocab,) of the token after prompt and output: comes before what a
        request asks for."""
        for length in self.prefix_lengths:
            if found := self.biases.get(tuple(_last(length, prompt, output))):
                token_ids, biases = found
                logits.index_add_(0, token_ids.to(logits.device), biases.to(logits))

    def restrict(
        self,
        logits: Tensor,
        prompt: list[int],
        output: list[int],
        *,
        max_new_tokens: int,
        eos_token_ids: list[int] | None,
    ) -> None:
        """The same, after what a request asks for. eos_token_ids: None where end-of-text is a
        token like any other, so that no rule for it holds."""
        forces_first = len(prompt) == 1 and bool(self.forced_bos_token_ids)
        forced = self.forced_bos_token_ids if forces_first and not output else []
        if eos_token_ids is not None and len(output) == max_new_tokens - 1:
            forced = self.forced_eos_token_ids or forced
        if forced:
            logits.fill_(-math.inf)
            logits[forced] = 0
            return
        if self.no_repeat_ngram_size:
            logits[_repeating(prompt + output, self.no_repeat_ngram_size)] = -math.inf
        if len(output) == int(forces_first):  # a text begins with the first token that is drawn
            logits[self.begin_suppress_tokens] = -math.inf
        if eos_token_ids is not None:
            self._edit_ends(logits, len(prompt), len(output), eos_token_ids)

    def _edit_ends(
        self, logits: Tensor, num_prompt: int, num_output: int, eos_token_ids: list[int]
    ) -> None:
        """Makes an early end-of-text impossible, and a late one likelier."""
        if num_output < max(self.min_new_tokens, self.min_length - num_prompt):
            logits[eos_token_ids] = -math.inf
        if self.exponential_decay_length_penalty:
            after, factor = self.exponential_decay_length_penalty
            if num_output > after:
                growth = math.exp(min((num_output - after) * math.log(factor), MOST_GROWTH))
                ends = logits[eos_token_ids]
                grown = ends + ends.abs() * (growth - 1)
                logits[eos_token_ids] = torch.where(ends.isfinite(), grown, ends)


def _tensors(biased: list[tuple[int, float]]) -> tuple[Tensor, Tensor]:
    """Token ids (n,) int64 and their biases (n,) float32."""
    token_ids, biases = zip(*biased, strict=True)
    return torch.tensor(token_ids), torch.tensor(biases, dtype=torch.float32)


def _last(count: int, prompt: list[int], output: list[int]) -> list[int]:
    """So many of the last tokens; fewer where there are fewer."""
    if count <= len(output):
        return output[len(output) - count :]
    return prompt[-(count - len(output)) :] + output


def _repeating(token_ids: list[int], size: int) -> list[int]:
    """The tokens that would complete a sequence of so many which is there already."""
    last_start = len(token_ids) - size
    if last_start < 0:
        return []
    tokens = np.array(token_ids)
    is_begun = np.ones(last_start + 1, dtype=bool)  # by the last size - 1 tokens
    for at in range(size - 1):
        is_begun &= tokens[at : at + last_start + 1] == tokens[last_start + 1 + at]
    repeating: list[int] = np.unique(tokens[size - 1 :][is_begun]).tolist()
    return repeating
