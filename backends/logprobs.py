"""Log probabilities of a local model's tokens in OpenAI's form."""

import codecs
import copy
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from engine import Delta, EngineRequest, PositionLogprobs, TextFilter

BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
NUM_CACHED_TOKENS = 1 << 16


class TokenSpelling:
    """How OpenAI's protocol writes one model's tokens.

    text_filter: alternatives that hold one of its words are left out; None lets all pass.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text_filter: TextFilter | None):
        self.tokenizer = tokenizer
        self.text_filter = text_filter
        self.special_ids = set(tokenizer.all_special_ids)
        # Whether a token's name spells its bytes, as GPT-2's do.
        self.is_byte_level = tokenizer.convert_tokens_to_ids("Ġ") not in (
            None,
            tokenizer.unk_token_id,
        )
        self.raw_bytes = lru_cache(NUM_CACHED_TOKENS)(self._raw_bytes)
        self.is_forbidden = lru_cache(NUM_CACHED_TOKENS)(self._is_forbidden)

    def _raw_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; of a special token, its name."""
        piece = self.tokenizer.convert_ids_to_tokens(token_id) or ""
        if token_id in self.special_ids:
            return bytes(piece, "utf-8")
        if self.is_byte_level:
            return bytes(BYTE_OF[character] for character in piece if character in BYTE_OF)
        if match := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(match[1])
        return bytes(piece.replace("▁", " "), "utf-8")

    def _is_forbidden(self, token_id: int) -> bool:
        """Whether a token alone holds a forbidden word."""
        text = self.raw_bytes(token_id).decode(errors="replace")
        return self.text_filter is not None and bool(self.text_filter.find(text))

    def text(self, token_id: int) -> str:
        """A token as OpenAI writes it: no two tokens the same."""
        raw = self.raw_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def alternatives(self, token: PositionLogprobs) -> list[tuple[int, float]]:
        """The likeliest tokens without those that are forbidden words."""
        return [(id_, lp) for id_, lp in token.top if not self.is_forbidden(id_)]


class ChoiceLogprobs:
    """The tokens of one choice in OpenAI's form, delta by delta.

    Tokens that reach beyond the text, into a stop string, are left out, as what they say is
    unfiltered; the end-of-text token is not.
    """

    def __init__(self, spelling: TokenSpelling):
        self.spelling = spelling
        self.num_characters = 0  # of text so far
        self.offset = 0  # where in the text the next token begins
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def completion(self, delta: Delta, prompt: tuple[str, EngineRequest] | None) -> dict[str, Any]:
        """models.CompletionLogprobs. prompt: one to be echoed, whose first token has none."""
        tokens: list[PositionLogprobs] = []
        offsets = []
        first_token_id = None
        if prompt:
            text, request = prompt
            self.num_characters += len(text)
            tokens += request.prompt_logprobs or []
            first_token_id = request.prompt_token_ids[0]
            offsets = [self._text_offset(id_, is_prompt=True) for id_ in request.prompt_token_ids]
        generated = self._within_text(delta)
        offsets += [self._text_offset(token.token_id) for token in generated]
        tokens += generated
        token_ids = [token.token_id for token in tokens]
        token_logprobs: list[float | None] = [token.logprob for token in tokens]
        top: list[dict[str, float] | None] = [self._top(token) for token in tokens]
        if first_token_id is not None:
            token_ids.insert(0, first_token_id)
            token_logprobs.insert(0, None)
            top.insert(0, None)
        return {
            "tokens": [self.spelling.text(token_id) for token_id in token_ids],
            "token_logprobs": token_logprobs,
            "top_logprobs": top,
            "text_offset": offsets,
        }

    def chat(self, delta: Delta) -> dict[str, Any]:
        """models.ChatLogprobs."""

        def written(token_id: int, logprob: float) -> dict[str, Any]:
            return {
                "token": self.spelling.text(token_id),
                "logprob": logprob,
                "bytes": list(self.spelling.raw_bytes(token_id)),
            }

        content = [
            written(token.token_id, token.logprob)
            | {"top_logprobs": [written(*each) for each in self.spelling.alternatives(token)]}
            for token in self._within_text(delta)
        ]
        return {"content": content, "refusal": None}

    def _text_offset(self, token_id: int, is_prompt: bool = False) -> int:
        """Where in the text this token begins, in characters; called for each in turn."""
        start = self.offset
        if is_prompt or token_id not in self.spelling.special_ids:
            self.offset += len(self.decoder.decode(self.spelling.raw_bytes(token_id)))
        return start

    def _within_text(self, delta: Delta) -> Sequence[PositionLogprobs]:
        """The delta's tokens that end within the text."""
        self.num_characters += len(delta.text)
        if delta.finish_reason != "stop":
            return delta.logprobs
        decoder, end, kept = copy.deepcopy(self.decoder), self.offset, []
        for token in delta.logprobs:
            if token.token_id not in self.spelling.special_ids:
                end += len(decoder.decode(self.spelling.raw_bytes(token.token_id)))
            if end > self.num_characters:
                break
            kept.append(token)
        return kept

    def _top(self, token: PositionLogprobs) -> dict[str, float]:
        """The likeliest tokens and the token itself, each once."""
        likeliest = [*self.spelling.alternatives(token), (token.token_id, token.logprob)]
        return {self.spelling.text(id_): logprob for id_, logprob in likeliest}
