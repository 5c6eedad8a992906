"""What clients send, as prompts that an engine takes: texts, token ids, conversations."""

import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

import models
from backends.base import ContextExceeded, ForbiddenPrompt, InvalidField, Tokens
from backends.conversations import as_template_reads
from backends.reader import Pieces, find_in_pieces, read_in_pieces
from engine import Engine, Prompt, TextFilter

PIECE_TOKENS = 10_000  # that are looked up before others have their turn

LogPrompts = Callable[[str | list[str]], None]


class Prompts:
    """Reads prompts for one model, piece by piece (`backends.reader`), and refuses those that it
    cannot take.

    content_filter: what prompts must not hold. log_prompts: called with each request's prompts.
    """

    def __init__(
        self, tokenizer: Any, engine: Engine, content_filter: TextFilter, log_prompts: LogPrompts
    ):
        self.tokenizer = tokenizer
        self.engine = engine
        self.content_filter = content_filter
        self.log_prompts = log_prompts

    @cached_property
    def longest_token_characters(self) -> int:
        return max(map(len, self.tokenizer.get_vocab()))

    def check_sizes(self, prompts: SequenceOf[str | list[int]], most_tokens: int | None) -> None:
        """Raises ContextExceeded for prompts that are seen to be too long without reading them:
        by their token ids, or even if each token was the longest there is."""
        for prompt in prompts:
            if not isinstance(prompt, str):
                self._check_length(len(prompt), most_tokens)
                continue
            at_least = math.ceil(len(prompt) / self.longest_token_characters)
            if at_least > self.engine.max_model_len:
                self._check_length(at_least, most_tokens)

    def of_text(self, text: str, is_chat: bool) -> Pieces[Prompt]:
        """A prompt; is_chat: what a conversation begins with, by the model's template."""
        self.log_prompts(text)
        options = {}
        written = text
        if is_chat:
            text = self.apply_chat_template("prompt", [{"role": "user", "content": text}])
            options = {"add_special_tokens": False}
        return (yield from self._prompt("prompt", [written], self._encode(text, **options)))

    def of_completion(
        self, body: models.CompletionRequest
    ) -> Pieces[tuple[list[str], list[Prompt]]]:
        """The prompts as text, and as the engine takes them."""
        texts: list[str] = []
        prompts: list[Prompt] = []
        for prompt in body.prompts:
            if isinstance(prompt, str) and (token_ids := self._encode(prompt)):
                text = prompt
            elif isinstance(prompt, str):
                token_ids = self._beginning()
                text = self.tokenizer.decode(token_ids)
            elif max(prompt) >= self.engine.vocab_size:
                raise InvalidField("prompt", f"token ids go up to {self.engine.vocab_size - 1}")
            else:
                text, token_ids = self.tokenizer.decode(prompt), prompt
            self._check_length(len(token_ids), body.most_tokens)
            texts.append(text)
            self.log_prompts(texts)
            yield
            prompts.append((yield from self._prompt("prompt", [text], token_ids)))
        return texts, prompts

    def of_chat(self, body: models.ChatCompletionRequest, texts: list[str]) -> Pieces[Prompt]:
        """A conversation, by the model's own template. texts: of its messages."""
        self.log_prompts(texts)
        prompt = self.apply_chat_template("messages", as_template_reads(body.messages))
        yield
        token_ids = self._encode(prompt, add_special_tokens=False)
        self._check_length(len(token_ids), body.most_tokens)
        return (yield from self._prompt("messages", texts, token_ids))

    def tokens(self, body: models.TokenizeRequest) -> Pieces[Tokens]:
        """What the tokenizer makes of a text or a conversation."""
        adds_special_tokens = body.add_special_tokens
        if body.messages is not None:
            messages = as_template_reads(body.messages)
            text = self.apply_chat_template("messages", messages, body.add_generation_prompt)
            yield
        else:
            text = body.prompt or ""
            adds_special_tokens = adds_special_tokens is not False
        token_ids = self._encode(text, add_special_tokens=bool(adds_special_tokens))
        if not body.return_token_strs:
            return Tokens(token_ids, None)
        token_strs: list[str] = []
        for start in range(0, len(token_ids), PIECE_TOKENS):
            yield
            piece = token_ids[start : start + PIECE_TOKENS]
            token_strs += self.tokenizer.convert_ids_to_tokens(piece)
        return Tokens(token_ids, token_strs)

    def decoded(self, token_ids: list[int]) -> Pieces[str]:
        yield
        # `decode` would keep Python's lock.
        backend = self.tokenizer.backend_tokenizer
        (text,) = backend.decode_batch([token_ids], skip_special_tokens=False)
        return str(text)

    def apply_chat_template(
        self, field: str, messages: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as the model reads it. Raises InvalidField, whatever the template does,
        which is a program that came with the model."""
        try:
            prompt: str = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except Exception as error:
            reason = f"the model's chat template failed ({type(error).__name__})"
            if type(error) is TemplateError:  # of a template's own `raise_exception`
                reason = "the model's chat template does not take these roles in this order"
            raise InvalidField(field, reason) from None
        return prompt

    def _encode(self, text: str, **options: bool) -> list[int]:
        # `encode` would keep Python's lock, and hold everybody up: a megabyte takes half a second.
        (encoding,) = self.tokenizer.backend_tokenizer.encode_batch_fast([text], **options)
        token_ids: list[int] = encoding.ids
        return token_ids

    def _beginning(self) -> list[int]:
        """What a text begins after that follows on nothing: as in the pipeline, the token that
        begins a text, which GPT-2's end-of-text token does too."""
        for token_id in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return [token_id]
        raise InvalidField("prompt", "must hold at least one token")

    def _check_length(self, num_prompt_tokens: int, most_tokens: int | None) -> None:
        """Raises ContextExceeded for a prompt that leaves no room for a token, or none for itself
        where nothing is to be generated."""
        if num_prompt_tokens + (most_tokens != 0) > self.engine.max_model_len:
            raise ContextExceeded(num_prompt_tokens, self.engine.max_model_len)

    def _prompt(self, field: str, texts: list[str], token_ids: list[int]) -> Pieces[Prompt]:
        """A prompt as the engine takes it. Raises InvalidField for one that the model cannot read;
        ForbiddenPrompt after a look at it as it was written, and as the model reads it: past a
        special token in the middle of a word."""
        if not token_ids:
            raise InvalidField(field, "must hold at least one token")
        if max(token_ids) >= self.engine.vocab_size:
            reason = f"holds a token that is not among the model's {self.engine.vocab_size}"
            raise InvalidField(field, reason)
        read = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        for text in dict.fromkeys([*texts, read]):
            if (yield from find_in_pieces(self.content_filter, text)):
                raise ForbiddenPrompt(field)
            yield
        text_filter = self.engine.output.text_filter
        reading = (yield from read_in_pieces(text_filter, read)) if text_filter else None
        return Prompt(token_ids, reading)
