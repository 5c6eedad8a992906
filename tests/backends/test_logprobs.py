"""How tokens are written in OpenAI's form, by the tokenizers of several families."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from backends.logprobs import PIECE_TOKENS, ChoiceLogprobs, TokenSpelling
from engine import Delta, PositionLogprobs
from serving.content_filter import ContentFilter
from tests.support import PROMPT, byte_fallback_tokenizer, byte_tokens, ids, run, token, tokenizer

LLAMA = byte_fallback_tokenizer()


def test_token_of_a_byte_fallback_tokenizer() -> None:
    """A letter of its vocabulary, `Ġ`, made it look like GPT-2's: words lost their spaces."""
    spelling = TokenSpelling(LLAMA, None)
    names = ["▁one", "a", "▁", "Ġ", "<0x41>", "<0xF0>", "<s>"]
    written = [spelling.text(token_id) for token_id in LLAMA.convert_tokens_to_ids(names)]
    assert written == [" one", "a", " ", "Ġ", "A", "bytes:\\xf0", "<s>"]


def test_token_that_was_added_is_spelled_as_it_is() -> None:
    """Of a byte-level tokenizer: it lost its blanks, which are no letters of that alphabet."""
    added = tokenizer.__class__.from_pretrained(tokenizer.name_or_path)
    added.add_tokens(["<a b>"])
    spelling = TokenSpelling(added, None)
    assert spelling.text(added.convert_tokens_to_ids("<a b>")) == "<a b>"
    assert [spelling.text(token_id) for token_id in ids(" one two")] == [" one", " two"]


@pytest.mark.parametrize(
    ("model", "text", "written", "offsets"),
    [
        (LLAMA, "one two", None, [0, 0, 3]),  # <s> is not shown, nor the space before `one`
        (LLAMA, "<s> one two", [1, 263, 264], [0, 3, 7]),
        (LLAMA, " one", None, [0, 0, 1]),
        (LLAMA, "one 🦊 two", None, [0, 0, 3, 4, 4, 4, 4, 5]),
        (LLAMA, "</s>one two", None, [0, 0, 4, 7]),
        (tokenizer, " one two", None, [0, 4]),
        (tokenizer, "<|endoftext|> one", None, [0, 13]),
    ],
)
def test_offsets_index_the_prompt_as_it_is_shown(
    model: Any, text: str, written: list[int] | None, offsets: list[int]
) -> None:
    """They counted `<s>`, and all behind it were three characters too far."""
    token_ids = written or model(text)["input_ids"]
    assert run(TokenSpelling(model, None).offsets(text, token_ids)) == [offsets]


def test_prompt_tokens_are_told_without_forbidden_alternatives() -> None:
    king, fox, half = token(" king"), token(" fox"), byte_tokens("🦊")[0]
    at_fox = PositionLogprobs(fox, -2.0, [(king, -1.0), (half, -1.5), (fox, -2.0)], rank=3)
    request: Any = SimpleNamespace(prompt_logprobs=[at_fox])
    (told,) = run(TokenSpelling(tokenizer, ContentFilter("king")).of_prompt(request))
    assert told == [
        None,
        {
            str(fox): {"logprob": -2.0, "rank": 3, "decoded_token": " fox"},
            str(half): {"logprob": -1.5, "rank": 2, "decoded_token": "\ufffd"},
        },
    ]


def test_completion_offsets_of_a_stop_string_are_the_end_of_the_text() -> None:
    """Its tokens, which the text leaves out, were left out too."""
    names = ["▁one", "▁two", "▁three"]
    tokens = [
        PositionLogprobs(token_id, -1.0, [], text_offset)
        for token_id, text_offset in zip(LLAMA.convert_tokens_to_ids(names), (0, 4, 8), strict=True)
    ]
    delta = Delta(0, " one tw", [], tokens, "stop")
    (written,) = run(ChoiceLogprobs(TokenSpelling(LLAMA, None)).completion(delta, None))
    assert written["tokens"] == [" one", " two", " three"]
    assert written["text_offset"] == [0, 4, 7]


def test_long_prompt_is_spelled_in_pieces() -> None:
    """One of 32,000 tokens held the event loop for 2.4 seconds."""
    num_turns = 0
    token_ids = ids(PROMPT) * 1000
    positions = [PositionLogprobs(id_, -2.0, [(id_, -2.0)], rank=1) for id_ in token_ids[1:]]
    request: Any = SimpleNamespace(prompt_logprobs=positions, prompt_token_ids=token_ids)
    spelling = TokenSpelling(tokenizer, None)

    async def count_turns() -> None:
        nonlocal num_turns
        while True:
            num_turns += 1
            await asyncio.sleep(0)

    async def spell() -> tuple[Any, Any]:
        others = asyncio.create_task(count_turns())
        told = await spelling.of_prompt(request)
        delta = Delta(0, "", [], [], "length")
        written = await ChoiceLogprobs(spelling).completion(delta, (PROMPT * 1000, request))
        others.cancel()
        return told, written

    told, written = asyncio.run(spell())
    assert len(told) == len(written["tokens"]) == len(written["text_offset"]) == len(token_ids)
    assert "".join(written["tokens"]) == PROMPT * 1000
    assert num_turns >= 2 * (len(token_ids) // PIECE_TOKENS)
