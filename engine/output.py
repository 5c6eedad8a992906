"""From token ids to the text that a client gets."""

import itertools
import re
from bisect import bisect_left, bisect_right
from functools import cached_property

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from engine.request import Delta, FinishReason, Prompt, Sequence, TextFilter, TextReading

CONTEXT_TOKENS = 32  # so many of the last tokens tell a decoder how to go on
MAX_PART_TOKENS = 3  # that a part of a character has, whose four bytes are a token each
BYTE_NAME = re.compile("<0x[0-9A-F]{2}>")  # of a token that stands for a byte, as SentencePiece has
MAX_ROLLBACKS = 8  # that a sequence may have, and one more for each of its tokens


class OutputProcessor:
    """The text side of every sequence: decoding, stop strings, the filter and its roll-backs.

    text_filter: None lets everything pass. eos_token_ids: end the text.
    Raises ValueError for a tokenizer without a fast backend.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_filter: TextFilter | None,
        eos_token_ids: set[int],
    ):
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} has no fast backend: a tokenizer.json is needed"
            )
        self.tokenizer = tokenizer
        self.backend: Tokenizer = tokenizer.backend_tokenizer
        self.text_filter = text_filter
        self.eos_token_ids = eos_token_ids
        self.num_rollbacks = 0

    def read_prompt(self, prompt_token_ids: list[int]) -> Prompt:
        """The prompt, and what the filter has read before the first token."""
        if not self.text_filter:
            return Prompt(prompt_token_ids, None)
        text: str = self.tokenizer.decode(prompt_token_ids, skip_special_tokens=True)
        return Prompt(prompt_token_ids, self.text_filter.read(text))

    def append(self, seq: Sequence, token_id: int) -> Delta | None:
        """What the client gains by this token: text that nothing to come can take back."""
        params, request = seq.params, seq.request
        if params.max_new_tokens == 0:  # the prompt was all there was to do
            return self._release(seq, 0, "length")
        seq.output_token_ids.append(token_id)
        request.num_generated_tokens += 1
        old_length = len(seq.text)
        finish_reason = self._finish_reason(seq, token_id)
        piece = self._decode(seq, token_id) if seq.stop_reason is None else self._stop_text(seq)
        seq.text += piece
        seq.text_ends.append(len(seq.text))
        if len(seq.output_token_ids) > params.min_tokens:
            begins = ((seq.text.find(s, max(0, old_length - len(s) + 1)), s) for s in params.stop)
            if found := [(at, len(s), s) for at, s in begins if at >= 0]:
                at, length, seq.stop_reason = min(found)
                finish_reason = "stop"
                seq.text = seq.text[: at + length if params.includes_stop else at]

        # Text that was sent cannot be taken back, so hold back whatever a stop string or a
        # roll-back may still remove.
        settled = len(seq.text)
        if not finish_reason:
            settled = self._before_stop(seq, settled)
        safe = settled
        if seq.reading:
            seq.reading.append(piece)
            hit_start, settled, safe = self._filter(seq, seq.reading, settled, finish_reason)
            if hit_start is not None:
                return self._roll_back(seq, hit_start)
        if finish_reason:
            return self._release(seq, self._num_clean_tokens(seq), finish_reason)
        if not request.streams:
            return None
        return self._release(seq, seq.num_tokens_within(min(safe, settled)), None)

    def finish(self, seq: Sequence, finish_reason: FinishReason) -> Delta | None:
        """What the client gains of a text behind which no token can come: its end, unless there
        is a forbidden word in it that more text might have made another one."""
        if seq.reading:
            hit, _ = seq.reading.scan(None, final=True)
            if hit:
                num_before = seq.request.reading.length if seq.request.reading else 0
                return self._roll_back(seq, hit[0] - num_before)
        return self._release(seq, len(seq.output_token_ids), finish_reason)

    def _finish_reason(self, seq: Sequence, token_id: int) -> FinishReason | None:
        """Why the sequence ends with this token, if stop strings are left aside."""
        seq.stop_reason = seq.params.stop_token_ids.get(token_id)
        if seq.stop_reason is not None:
            return "stop"
        if token_id in self.eos_token_ids and not seq.params.ignore_eos:
            return "stop"
        if seq.matcher and seq.matcher.is_complete(seq.output_token_ids):
            return "stop"
        if len(seq.output_token_ids) >= seq.params.max_new_tokens:
            return "length"
        return None

    def _stop_text(self, seq: Sequence) -> str:
        """What the text gains by the stop token at its end."""
        if not seq.params.includes_stop:
            return ""
        # A stop string that is a special token would be left out of the decoded text.
        if isinstance(seq.stop_reason, str):
            return seq.stop_reason
        return self._decode(seq, seq.last_token_id)

    def _filter(
        self,
        seq: Sequence,
        reading: TextReading,
        settled: int,
        finish_reason: FinishReason | None,
    ) -> tuple[int | None, int, int]:
        """(where a forbidden word begins in the text, else None; how much of the text is settled;
        in how much of it no forbidden word can begin)."""
        num_before = seq.request.reading.length if seq.request.reading else 0  # of the prompt
        hit, safe = reading.scan(num_before + settled, final=finish_reason is not None)
        if hit:
            return hit[0] - num_before, settled, safe
        if safe < num_before + settled:
            # A forbidden word may have begun; then its first token will be drawn anew.
            settled = self._before_stop(seq, seq.token_start(safe - num_before))
            _, safe = reading.scan(num_before + settled, final=False)
        reading.forget(safe)
        return None, settled, safe - num_before

    def _before_stop(self, seq: Sequence, end: int) -> int:
        """Where in text[:end] a stop string may have begun at its end; else `end`."""
        begun = (
            n
            for stop in seq.params.stop
            for n in range(1, min(len(stop) - 1, end) + 1)
            if seq.text.endswith(stop[:n], 0, end)
        )
        return end - max(begun, default=0)

    def _release(
        self, seq: Sequence, num_tokens: int, finish_reason: FinishReason | None
    ) -> Delta | None:
        """The output tokens up to `num_tokens` that the client has not got yet."""
        released = seq.num_released_tokens
        start = seq.text_ends[released - 1] if released else 0
        if finish_reason:
            end = len(seq.text)
        elif num_tokens == 0 or (end := seq.text_ends[num_tokens - 1]) == start:
            return None  # tokens without text go out with the next text
        seq.num_released_tokens = num_tokens
        return Delta(
            index=seq.request.first_index + seq.index,
            text=seq.text[start:end],
            token_ids=seq.output_token_ids[released:num_tokens],
            logprobs=seq.logprobs[released:num_tokens],
            finish_reason=finish_reason,
            stop_reason=seq.stop_reason if finish_reason == "stop" else None,
        )

    def _roll_back(self, seq: Sequence, hit_start: int) -> Delta | None:
        """Takes the tokens from `hit_start` of the text on back, and bans the first of them
        there; after too many of these the sequence ends with `content_filter`."""
        kept = bisect_right(seq.text_ends, hit_start)
        seq.banned = {at: ids for at, ids in seq.banned.items() if at <= kept}
        seq.banned.setdefault(kept, []).append(seq.output_token_ids[kept])
        seq.num_rollbacks += 1
        self.num_rollbacks += 1
        seq.request.num_generated_tokens -= len(seq.output_token_ids) - kept
        del seq.output_token_ids[kept:], seq.text_ends[kept:], seq.logprobs[kept:]
        seq.text = seq.text[: seq.text_ends[-1] if kept else 0]
        if seq.num_rollbacks > MAX_ROLLBACKS + kept:
            return self._release(seq, kept, "content_filter")
        if seq.request.reading:
            seq.reading = seq.request.reading.copy()
            seq.reading.append(seq.text)
        seq.decode_stream = None
        return None

    def _num_clean_tokens(self, seq: Sequence) -> int:
        """How many output tokens a client may see of a sequence that has ended: those of a stop
        string too, behind which the text is cut, but none from a forbidden word there on."""
        is_cut = len(seq.text) < seq.text_ends[-1]
        if is_cut and seq.reading and seq.request.reading:
            hit, _ = seq.reading.scan(None, final=True)
            if hit:
                return bisect_right(seq.text_ends, hit[0] - seq.request.reading.length)
        return len(seq.output_token_ids)

    def _decode(self, seq: Sequence, token_id: int) -> str:
        """The text that the next token, which is in the output, completes: whole characters, so
        often none."""
        try:
            if seq.decode_stream:
                return seq.decode_stream.step(self.backend, token_id) or ""
            return self._begin_decoding(seq, self._context(seq))
        except Exception:  # the library has no narrower one
            # Behind a character spelled byte by byte comes a byte that does not go on as UTF-8.
            # Such bytes, up to the next token of another kind, are decoded together, so the
            # decoder takes the character back, and fails. What came before is not shown to the
            # next one.
            return self._begin_decoding(seq, self._word)

    def _begin_decoding(self, seq: Sequence, context: list[int]) -> str:
        """Gives the sequence a decoder that goes on behind `context`; the text of those output
        tokens that are not in its text yet."""
        stream = DecodeStream(ids=context, skip_special_tokens=True)
        pending = seq.output_token_ids[self._num_decoded(seq) :]
        text = "".join(stream.step(self.backend, token_id) or "" for token_id in pending)
        seq.decode_stream = stream
        return text

    def _num_decoded(self, seq: Sequence) -> int:
        """How many output tokens it took to spell the text."""
        return bisect_left(seq.text_ends, len(seq.text)) + 1 if seq.text else 0

    def _context(self, seq: Sequence) -> list[int]:
        """The last tokens of the text until now. They begin and end with whole characters: behind
        part of one, a decoder would give all of its context out again."""
        prompt, output = seq.request.prompt_token_ids, seq.output_token_ids
        ids = prompt[-CONTEXT_TOKENS:] + output[: self._num_decoded(seq)]
        ids = ids[-CONTEXT_TOKENS:]
        part = range(MAX_PART_TOKENS + 1)
        for num_left_out, num_cut in itertools.product(part, part):
            context = ids[num_left_out : len(ids) - num_cut]
            if context and not self._decoded(context).endswith("\ufffd"):
                return context
        return self._word  # there is nothing but broken characters

    def _decoded(self, token_ids: list[int]) -> str:
        text: str = self.backend.decode(token_ids, skip_special_tokens=True)
        return text

    @cached_property
    def _word(self) -> list[int]:
        """A token of letters that is no single byte: text for a decoder to go on behind, where the
        real one would lead it astray."""
        for token_id in range(self.backend.get_vocab_size()):
            name = self.backend.id_to_token(token_id)
            if name and not BYTE_NAME.fullmatch(name) and self._decoded([token_id]).isalpha():
                return [token_id]
        return []
