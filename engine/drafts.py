"""Guesses at what comes next, for texts that repeat themselves or their prompt.

A pass over a few rows takes hardly longer than over one, since most of it is reading weights. So
where few sequences run, what may come next is computed along with them, and the sampler says how
much of it was right: each token is drawn from the model's own logits with the draw that it would
have had anyway, and the next one is looked at if the drawn token is the guessed one. Texts are the
same to the bit, whatever is guessed (speculative decoding: Leviathan et al. 2023; by looking it up
in what is there already: Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding).
"""

from array import array
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from itertools import cycle, islice

from engine.request import Sequence

MOST_ROWS = 16  # of a pass with drafts; so many may always be (measure_batch_invariance)
PASS_ROWS = 12  # a pass over no rows would take as long as so many rows add: 9 to 19 as measured
NGRAM_TOKENS = (3, 2, 1)  # so many of the last tokens are looked for, the longest first
LOOK_BACK_TOKENS = 1024  # in so many: a look-up belongs to every step, and a text may be long
MOST_TRIES = 16  # at places that turn out to lie across two tokens; a prompt can be full of them
LEARNING_RATE = 0.1  # what one guess counts in a sequence's hit rate
LOWEST_HIT_RATE, HIGHEST_HIT_RATE = 0.01, 0.99


class Drafter:
    """Decides what is drafted for which sequence.

    max_tokens: of a draft; 0 for none at all.
    """

    def __init__(self, max_tokens: int):
        self.max_tokens = max_tokens

    def draft(
        self, seqs: SequenceOf[Sequence], num_tokens_until_renewal: Callable[[Sequence], float]
    ) -> list[list[int]]:
        """A draft for each sequence, most of them empty; no list at all if all are.

        A row of the pass goes to the guess that is likeliest to be right, as long as that makes
        more tokens a second of all. Guesses that get no row are compared with what comes too, so a
        text that begins to repeat itself is found out for nothing.
        """
        if not self.max_tokens or len(seqs) >= MOST_ROWS:
            return []
        chances = []
        for row, seq in enumerate(seqs):
            learn(seq)
            seq.num_tokens_before_guess = seq.num_tokens
            prompt, output = seq.request.prompt_token_ids, seq.output_token_ids
            last = (prompt[-LOOK_BACK_TOKENS:] + output[-LOOK_BACK_TOKENS:])[-LOOK_BACK_TOKENS:]
            seq.guess = look_up(last, self.max_tokens)
            # Behind the last one a token is drawn, which has to be within the text's length too.
            room_tokens = seq.params.max_new_tokens - len(seq.output_token_ids) - 1
            most_tokens = min(len(seq.guess), room_tokens, num_tokens_until_renewal(seq))
            chances += [(seq.hit_rate ** (at + 1), row) for at in range(int(most_tokens))]
        lengths, num_rows, expected_tokens = [0] * len(seqs), len(seqs), float(len(seqs))
        for chance, row in sorted(chances, reverse=True)[: MOST_ROWS - len(seqs)]:
            if chance * (PASS_ROWS + num_rows) <= expected_tokens:
                break
            lengths[row] += 1
            num_rows += 1
            expected_tokens += chance
        if not any(lengths):
            return []
        return [seq.guess[:length] for seq, length in zip(seqs, lengths, strict=True)]


def learn(seq: Sequence) -> None:
    """Compares a sequence's guess with the tokens that came, as far as it was right."""
    start = seq.num_tokens_before_guess - seq.request.num_prompt_tokens
    for guessed, token_id in zip(seq.guess, seq.output_token_ids[start:], strict=False):
        is_hit = guessed == token_id
        rate = seq.hit_rate + LEARNING_RATE * (is_hit - seq.hit_rate)
        seq.hit_rate = min(max(rate, LOWEST_HIT_RATE), HIGHEST_HIT_RATE)
        if not is_hit:
            break


def look_up(token_ids: list[int], num_tokens: int) -> list[int]:
    """What followed the last tokens when they came before, the last time that they did; [] if they
    never did. If that reaches up to the end, it begins again, as a text does that repeats itself.
    """
    packed = array("i", token_ids)
    text, width = packed.tobytes(), packed.itemsize  # bytes are searched much faster than a list
    for size in NGRAM_TOKENS:
        ngram = text[-size * width :]
        end = len(text) - width
        for _ in range(MOST_TRIES):
            at = text.rfind(ngram, 0, end)
            if at < 0 or at % width == 0:
                break
            end = at + len(ngram) - 1  # it lies across two tokens
        if at >= 0 and at % width == 0:
            following = token_ids[at // width + size :]
            return list(islice(cycle(following), num_tokens))
    return []
