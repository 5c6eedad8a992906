"""Log probabilities of a local model's tokens in OpenAI's form."""

import asyncio
import codecs
import re
from collections.abc import AsyncGenerator, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from engine import Delta, EngineRequest, PositionLogprobs, TextFilter

BYTE_NAME = re.compile("<0x([0-9A-F]{2})>")  # as SentencePiece calls a token of a single byte
BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
NUM_CACHED_TOKENS = 1 << 16
PIECE_TOKENS = 200  # that are spelled before others have their turn, each with up to 20 more

T = TypeVar("T")


async def pieces_of(values: Sequence[T]) -> AsyncGenerator[Sequence[T]]:
    for start in range(0, len(values), PIECE_TOKENS):
        if start:
            await asyncio.sleep(0)
        yield values[start : start + PIECE_TOKENS]


class TokenSpelling:
    """How OpenAI's protocol writes one model's tokens.

    text_filter: alternatives that hold one of its words are left out; None lets all pass.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text_filter: TextFilter | None):
        self.tokenizer = tokenizer
        self.text_filter = text_filter
        self.special_ids = set(tokenizer.all_special_ids)
        self.decoder = tokenizer.backend_tokenizer.decoder
        # Whether a token's name spells its bytes, as GPT-2's do.
        self.is_byte_level = bool(self.decoder) and self.decoder.decode(["aĠa"]) == "a a"
        self.raw_bytes = lru_cache(NUM_CACHED_TOKENS)(self._raw_bytes)
        self.is_forbidden = lru_cache(NUM_CACHED_TOKENS)(self._is_forbidden)

    def _raw_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; of a special token, its name."""
        piece = self.tokenizer.convert_ids_to_tokens(token_id) or ""
        if token_id in self.special_ids:
            return bytes(piece, "utf-8")
        if self.is_byte_level:
            if all(character in BYTE_OF for character in piece):
                return bytes(BYTE_OF[character] for character in piece)
            return bytes(piece, "utf-8")  # an added one, whose name is its text
        if match := BYTE_NAME.fullmatch(piece):
            return bytes.fromhex(match[1])
        if self.decoder:
            piece = self.decoder.decode(["a", piece])[1:]  # at the beginning it may lose its space
        return bytes(piece, "utf-8")

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

    def alternatives(
        self, token: PositionLogprobs, num_top: int | None = None
    ) -> list[tuple[int, float]]:
        """The likeliest tokens, or so many of them, without those that are forbidden words."""
        return [(id_, lp) for id_, lp in token.top[:num_top] if not self.is_forbidden(id_)]

    async def of_prompt(self, request: EngineRequest) -> list[dict[str, Any] | None]:
        """models.PromptLogprob of each token of a prompt and of the likeliest ones in its place,
        by their ids; None for the first. Like vLLM's, the prompt's own comes first."""

        def written(token_id: int, logprob: float, rank: int | None) -> dict[str, Any]:
            text = self.raw_bytes(token_id).decode(errors="replace")
            return {"logprob": logprob, "rank": rank, "decoded_token": text}

        def at_position(token: PositionLogprobs) -> dict[str, Any]:
            told = {str(token.token_id): written(token.token_id, token.logprob, token.rank)}
            for rank, (token_id, logprob) in enumerate(token.top, start=1):
                if not self.is_forbidden(token_id):
                    told.setdefault(str(token_id), written(token_id, logprob, rank))
            return told

        of_all: list[dict[str, Any] | None] = [None]
        async for piece in pieces_of(request.prompt_logprobs or []):
            of_all += map(at_position, piece)
        return of_all

    async def offsets(self, text: str, token_ids: Sequence[int]) -> list[int]:
        """Where in a prompt's text each of its tokens begins, in characters.

        What the text does not show takes no room there: a begin-of-text token, or a space, that
        the tokenizer puts before it. Blanks that the tokenizer drops belong to the token before.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        offsets, at = [], 0
        async for piece in pieces_of(token_ids):
            for token_id in piece:
                offsets.append(min(at, len(text)))
                is_special = token_id in self.special_ids
                raw = self.raw_bytes(token_id)
                written = raw.decode() if is_special else decoder.decode(raw)
                if text.startswith(written, at):
                    at += len(written)
                    continue
                behind_blanks = at
                while text[behind_blanks : behind_blanks + 1].isspace():
                    behind_blanks += 1
                if text.startswith(written.lstrip(" "), behind_blanks):
                    at = behind_blanks + len(written.lstrip(" "))
                elif not is_special:  # the tokenizer has normalized it
                    at += len(written)
        return offsets


class ChoiceLogprobs:
    """The tokens of one choice in OpenAI's form, delta by delta.

    As with vLLM, all generated tokens are there, those of a stop string and end-of-text too, which
    the text leaves out: their `text_offset` is its end. Only from a forbidden word on, which a stop
    string cut off, the engine gives none.
    """

    def __init__(self, spelling: TokenSpelling):
        self.spelling = spelling
        self.num_echoed_characters = 0  # of the prompt
        self.num_characters = 0  # of text so far, the echo included

    async def completion(
        self, delta: Delta, prompt: tuple[str, EngineRequest] | None, num_top: int | None = None
    ) -> dict[str, Any]:
        """models.CompletionLogprobs. prompt: one to be echoed, whose first token has none; num_top:
        so many of the likeliest tokens, of which a prompt's may have more."""
        tokens: list[PositionLogprobs] = []
        offsets: list[int] = []
        first_token_id = None
        if prompt:
            text, request = prompt
            self.num_characters = self.num_echoed_characters = len(text)
            tokens += request.prompt_logprobs or []
            first_token_id = request.prompt_token_ids[0]
            offsets += await self.spelling.offsets(text, request.prompt_token_ids)
        self.num_characters += len(delta.text)
        offsets += [
            min(self.num_echoed_characters + token.text_offset, self.num_characters)
            for token in delta.logprobs
        ]
        tokens += delta.logprobs
        has_first = first_token_id is not None
        spelled = [self.spelling.text(first_token_id)] if first_token_id is not None else []
        token_logprobs: list[float | None] = [None] if has_first else []
        top: list[dict[str, float] | None] = [None] if has_first else []
        async for piece in pieces_of(tokens):
            spelled += [self.spelling.text(token.token_id) for token in piece]
            token_logprobs += [token.logprob for token in piece]
            top += [self._top(token, num_top) for token in piece]
        return {
            "tokens": spelled,
            "token_logprobs": token_logprobs,
            "top_logprobs": top,
            "text_offset": offsets,
        }

    async def chat(self, delta: Delta) -> dict[str, Any]:
        """models.ChatLogprobs."""

        def written(token_id: int, logprob: float) -> dict[str, Any]:
            return {
                "token": self.spelling.text(token_id),
                "logprob": logprob,
                "bytes": list(self.spelling.raw_bytes(token_id)),
            }

        content: list[dict[str, Any]] = []
        async for piece in pieces_of(delta.logprobs):
            content += [
                written(token.token_id, token.logprob)
                | {"top_logprobs": [written(*each) for each in self.spelling.alternatives(token)]}
                for token in piece
            ]
        return {"content": content, "refusal": None}

    def _top(self, token: PositionLogprobs, num_top: int | None) -> dict[str, float]:
        """The likeliest tokens and the token itself, each once."""
        likeliest = self.spelling.alternatives(token, num_top)
        likeliest.append((token.token_id, token.logprob))
        return {self.spelling.text(id_): logprob for id_, logprob in likeliest}
