"""Structures and the tokens that they let come: of the bundled model and of one that spells unknown
words byte by byte. No model: tokens are drawn at random from what is allowed."""

import json
import random
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

import models
from backends.base import InvalidField
from backends.logprobs import TokenSpelling
from backends.structure import StructureCompiler, StructureMatcher, read_structure
from engine import CANNOT_BE_FOLLOWED, ConstraintFailed
from tests.support import byte_fallback_tokenizer, token, tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "home": {"type": "object", "properties": {"size": {"enum": ["small", "big"]}}},
        "ages": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}},
    },
    "required": ["name", "home", "ages"],
}


DATED = "[A-Z][a-z]{1,5}, é?[0-9]{2}"


def new_compiler(of: Any) -> StructureCompiler:
    special_ids = set(of.all_special_ids)
    return StructureCompiler(TokenSpelling(of, None), len(of.get_vocab()), special_ids)


COMPILERS = [new_compiler(tokenizer), new_compiler(byte_fallback_tokenizer())]


def started(compiler: StructureCompiler = COMPILERS[0], **asked: Any) -> StructureMatcher:
    read = read_structure("structured_outputs", models.StructuredOutputs(**asked))
    return compiler.compile(read).start()


def allowed(matcher: StructureMatcher, token_ids: list[int]) -> list[int]:
    return (matcher.mask(token_ids).bias == 0).nonzero()[:, 0].tolist()


def write(matcher: StructureMatcher, seed: int, most_tokens: int = 400) -> list[int]:
    """Tokens drawn at random from what may come, to an end, which comes where it may."""
    drawn, token_ids = random.Random(seed), []
    while not (matcher.mask(token_ids).can_end or matcher.is_complete(token_ids)):
        assert len(token_ids) < most_tokens
        token_ids.append(drawn.choice(allowed(matcher, token_ids)))
    return token_ids


def spelled(compiler: StructureCompiler, token_ids: list[int]) -> str:
    return b"".join(map(compiler.spelling.raw_bytes, token_ids)).decode()


def is_person(text: str) -> bool:
    person = json.loads(text)
    assert list(person) == ["name", "home", "ages"]
    return len(person["name"]) <= 4 and all(0 <= age <= 9 for age in person["ages"])


def is_compact_person(text: str) -> bool:
    return is_person(text) and '","home":{' in text


@pytest.mark.parametrize("compiler", COMPILERS, ids=["byte level", "SentencePiece"])
@pytest.mark.parametrize(
    ("asked", "is_right"),
    [
        ({"choice": [" sad", "日本", 'a"b\\', "😀"]}, [" sad", "日本", 'a"b\\', "😀"].__contains__),
        ({"regex": DATED}, re.compile(DATED).fullmatch),
        ({"regex": "^(one|two)$"}, ["one", "two"].__contains__),
        ({"json": PERSON}, is_person),
        ({"json": json.dumps(PERSON), "disable_any_whitespace": True}, is_compact_person),
        ({"grammar": 'root ::= "yes" | "no" (" way"){2}'}, ["yes", "no way way"].__contains__),
        ({"grammar": 'start: "a"~3 /[bc]/'}, ["aaab", "aaac"].__contains__),
    ],
)  # fmt: skip
def test_texts_are_what_was_asked_for(
    compiler: StructureCompiler, asked: Any, is_right: Callable[[str], Any]
) -> None:
    for seed in range(20):
        text = spelled(compiler, write(started(compiler, **asked), seed))
        assert is_right(text), text


def test_every_spelling_of_a_byte_is_allowed() -> None:
    """Of SentencePiece's, some characters have two: a token, and that of their byte."""
    compiler = COMPILERS[1]
    names = compiler.spelling.tokenizer.convert_ids_to_tokens(
        allowed(started(compiler, regex="[bc]+"), [])
    )
    assert {"b", "c", "<0x62>", "<0x63>"} <= set(names)


def test_a_mask_depends_on_the_tokens_alone() -> None:
    """Also after a text was taken back, in part or to the end, and when it had come to its end."""
    matcher = started(json=PERSON)
    texts = [write(started(json=PERSON), seed) for seed in range(4)]
    for token_ids in [*texts, texts[0][:5], [], texts[1], texts[1][:-1]]:
        fresh = started(json=PERSON)
        assert matcher.is_complete(token_ids) == fresh.is_complete(token_ids)
        assert allowed(matcher, token_ids) == allowed(fresh, token_ids)


def test_an_end_may_come_before_the_text_is_complete() -> None:
    matcher = started(choice=["sad", "sadly", "so"])
    sad = [token("s"), token("ad")]
    assert [matcher.mask(sad[:n]).can_end for n in range(3)] == [False, False, True]
    assert not matcher.is_complete(sad)
    assert allowed(matcher, sad)
    assert matcher.is_complete([*sad, token("ly")])


def test_special_tokens_are_no_text() -> None:
    matcher = started(regex="(.|\n)*")
    assert matcher.mask([]).can_end
    assert tokenizer.eos_token_id not in allowed(matcher, [])


def test_what_leaves_no_choice_is_spelled_as_the_tokenizer_would() -> None:
    token_ids = write(started(choice=["there was a king"]), 0)
    assert token_ids == tokenizer("there was a king")["input_ids"]


@pytest.mark.parametrize(
    ("schema", "is_closed"),
    [
        ({"properties": {"a": {}}}, True),
        ({"properties": {"a": {}}, "additionalProperties": {"type": "null"}}, False),
        ({"properties": {"a": {}}, "required": ["b"]}, False),
        ({"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, False),
        ({"properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}}]}, False),
        ({"const": {"properties": {"a": 1}}}, False),
    ],
)
def test_objects_have_the_named_properties_alone(schema: Any, is_closed: bool) -> None:
    as_sent = json.dumps(schema, separators=(",", ":"))
    asked = models.StructuredOutputs(json=schema)
    closed = read_structure("response_format", asked).source
    assert (closed == as_sent) is not is_closed
    opened = asked.model_copy(update={"disable_additional_properties": False})
    assert read_structure("response_format", opened).source == as_sent
    assert schema == json.loads(as_sent)


SECRET = "hunter2"
IMPOSSIBLE = {"type": "integer", "minimum": 2, "maximum": 1}


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"regex": f"({SECRET}"}, "regex is not valid"),
        ({"regex": f"a(?={SECRET})"}, "regex looks ahead or behind, which is not supported"),
        ({"grammar": f'start: a\na: {SECRET}'}, "grammar is not valid: line 2, column 4"),
        ({"grammar": f"root ::= {SECRET} ("}, "grammar is not valid"),
        ({"grammar": "root ::= " + "(" * 5000}, "grammar is not valid"),
        ({"json": f"{{{SECRET}"}, "json is not valid JSON"),
        ({"json": {"type": SECRET}}, "json is not valid"),
        ({"json": {"uniqueItems": True}}, "json has uniqueItems: not supported"),
        ({"json": {"type": "string", "format": SECRET}}, "json has a format that is not supported"),
        ({"json": {"$ref": f"https://example.com/{SECRET}"}}, "json refers to what is not in it"),
        ({"json": IMPOSSIBLE}, "json asks for what no text can be"),
        ({"json": {"enum": [SECRET * 3000]}}, "json has more than 16384 characters"),
        ({"json": {"enum": json.loads("[" * 900 + "]" * 900)}}, "json is not valid"),
        ({"json": {"properties": {f"p{n}": {} for n in range(900)}}}, CANNOT_BE_FOLLOWED),
    ],
)  # fmt: skip
def test_refusals_say_why_without_the_text(asked: Any, reason: str) -> None:
    with pytest.raises(InvalidField) as caught:
        started(**asked)
    assert (caught.value.field, caught.value.reason) == ("structured_outputs", reason)


def test_what_the_model_cannot_spell_is_refused() -> None:
    piece = tokenizer.convert_ids_to_tokens(token(" king"))
    few = StructureCompiler(TokenSpelling(tokenizer, None), 10, {0})
    assert piece
    with pytest.raises(InvalidField, match="no token for it"):
        started(few, choice=[" king"])


def test_an_ambiguous_grammar_comes_to_its_limits() -> None:
    """Each token made the next mask take longer, for everybody: without limits a mask took half a
    second."""
    matcher = started(grammar='start: x\nx: x x | "a" | "b" | x x x | ""')

    def read_on() -> None:
        for length in range(200):
            matcher.mask([token("a")] * length)

    with pytest.raises(ConstraintFailed, match="too complex"):
        read_on()


def test_repetitions_of_repetitions_come_to_their_limits() -> None:
    """Each took a second and 180 MB, which stayed as long as it was kept for the next request."""

    def read_on(letter: str) -> None:
        matcher = started(regex=f"(({letter}{{100}}){{100}}){{100}}")
        for length in range(20):
            matcher.mask([token(letter)] * length)

    began = time.process_time()
    for letter in "bcde":
        with pytest.raises((ConstraintFailed, InvalidField), match="too complex"):
            read_on(letter)
    assert time.process_time() - began < 1.5


def test_compiled_structures_are_kept() -> None:
    read = read_structure("response_format", models.StructuredOutputs(json=PERSON))
    again = read_structure("response_format", models.StructuredOutputs(json=json.dumps(PERSON)))
    assert COMPILERS[0].compile(read) is COMPILERS[0].compile(again)
