"""What a text is to be, compiled into a constraint on tokens by llguidance."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

import models
from backends.base import InvalidField
from backends.logprobs import TokenSpelling
from engine import CANNOT_BE_FOLLOWED, ConstraintFailed, TokenMask

if TYPE_CHECKING:  # it is loaded for whoever asks for it first
    from llguidance import LLMatcher, LLTokenizer

NUM_CACHED_STRUCTURES = 64
# Whatever a client has made up, a mask takes some milliseconds at most and its automaton some
# megabytes: docs/structured.md.
MAX_STEP_ITEMS, MAX_STEP_FUEL, MAX_LEXER_STATES = 2000, 50_000, 20_000
# To begin with: `((a{100}){100}){100}`, of 20 characters, has a million nodes, and 180 MB.
MAX_INITIAL_FUEL = 30_000
# What may stand between the parts of JSON. By default at most one blank, behind a comma or a colon:
# JSON may have blanks and line ends without end, and a small model likes to write them.
COMPACT = {"whitespace_flexible": False}
ONE_BLANK = COMPACT | {"item_separator": ", ?", "key_separator": ": ?"}
# What llguidance says of what it does not take, and what a client is told: nothing of its text.
REASONS = [
    (re.compile("look-?around"), "looks ahead or behind, which is not supported"),
    (re.compile("Unsatisfiable"), "asks for what no text can be"),
    (re.compile("Unknown format"), "has a format that is not supported"),
    (re.compile("^Resource "), "refers to what is not in it"),
    (re.compile(r"too (large|many|big|complex)|; max is \d", re.IGNORECASE), "is too complex"),
]
UNSUPPORTED_KEYWORDS = re.compile(r"^Unimplemented keys: (\[.*\])")  # names of JSON Schema's own
PLACE = re.compile(r"^at (\d+)\((\d+)\)")  # line and column
# Where a schema has others in it: by name, and as they are.
NAMED_PARTS = ("properties", "patternProperties", "$defs", "definitions")
PARTS = ("items", "prefixItems", "additionalProperties", "allOf", "anyOf", "oneOf")


# By the eight bits of each byte, the lowest first: 0, or minus infinity where the bit is 0.
BIAS_OF_BITS = np.where(np.arange(256)[:, None] >> np.arange(8) & 1, 0, -np.inf).astype(np.float32)


class Structure(NamedTuple):
    """What one field of a request asks for.

    kind: `choice`, `regex`, `json` or `grammar`. source: choices and schemas as JSON text.
    blanks: llguidance's options for what stands between the parts of JSON.
    """

    field: str
    kind: str
    source: str
    blanks: tuple[tuple[str, Any], ...] = ()


def read_structure(field: str, asked: models.StructuredOutputs) -> Structure:
    """Raises InvalidField for a schema that is no JSON, or too long."""
    if asked.choice:
        return Structure(field, "choice", json.dumps(asked.choice))
    if asked.regex:
        return Structure(field, "regex", asked.regex)
    if asked.grammar:
        return Structure(field, "grammar", asked.grammar)
    source: Any = {"type": "object"} if asked.json_object else asked.json_schema
    try:
        schema = json.loads(source if isinstance(source, str) else json.dumps(source))
        if asked.disable_additional_properties:
            _close_objects(schema)
        source = json.dumps(schema, separators=(",", ":"))
    except ValueError:
        raise InvalidField(field, "json is not valid JSON") from None
    except RecursionError:
        raise InvalidField(field, "json is nested too deeply") from None
    if len(source) > models.MAX_GRAMMAR_CHARACTERS:
        reason = f"json has more than {models.MAX_GRAMMAR_CHARACTERS} characters"
        raise InvalidField(field, reason)
    blanks: dict[str, Any] = COMPACT if asked.disable_any_whitespace else ONE_BLANK
    if asked.whitespace_pattern:
        blanks = {"whitespace_pattern": asked.whitespace_pattern}
    return Structure(field, "json", source, tuple(blanks.items()))


def _close_objects(schema: Any) -> None:
    """Says of objects whose properties are named that they have no others, in place: a small model
    would go on making some up. Not where several parts of the schema say together what an object
    has."""
    parts = list(_parts(schema))
    for part in parts:
        if "allOf" in part or ("properties" in part and part.keys() & {"$ref", "anyOf", "oneOf"}):
            return
    for part in parts:
        named, required = part.get("properties"), part.get("required", [])
        if isinstance(named, dict) and isinstance(required, list) and set(required) <= set(named):
            part.setdefault("additionalProperties", False)


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """The schema and all that are in it."""
    if isinstance(schema, list):
        for each in schema:
            yield from _parts(each)
    elif isinstance(schema, dict):
        yield schema
        for name in NAMED_PARTS:
            if isinstance(named := schema.get(name), dict):
                yield from _parts(list(named.values()))
        for name in PARTS:
            yield from _parts(schema.get(name))


class Vocabulary:
    """The tokens of a model as llguidance wants them, with one more that ends a text.

    What a structure leaves no choice about is spelled as the tokenizer would; or, where that spells
    it otherwise (with a blank before it), in the longest tokens.
    """

    bos_token_id = None

    def __init__(self, spelling: TokenSpelling, vocab_size: int, special_ids: set[int]):
        self.backend = spelling.tokenizer.backend_tokenizer
        self.tokens = [*map(spelling.raw_bytes, range(vocab_size)), b"<end>"]
        self.eos_token_id = vocab_size
        self.special_token_ids = [*special_ids, vocab_size]
        self.greedy: Callable[[str], list[int]] = lambda text: []

    def __call__(self, text: bytes) -> list[int]:
        (encoding,) = self.backend.encode_batch_fast([text.decode()], add_special_tokens=False)
        token_ids: list[int] = encoding.ids
        is_same = (
            all(token_id < self.eos_token_id for token_id in token_ids)
            and b"".join(self.tokens[token_id] for token_id in token_ids) == text
            and not {*self.special_token_ids} & {*token_ids}
        )
        return token_ids if is_same else self.greedy(text.decode())


class StructureCompiler:
    """Makes constraints for one model. Used by one thread at a time.

    special_ids: of tokens that are no part of a text, within the vocabulary.
    """

    def __init__(self, spelling: TokenSpelling, vocab_size: int, special_ids: set[int]):
        self.spelling = spelling
        self.vocab_size = vocab_size
        self.special_ids = special_ids
        self.compile = lru_cache(NUM_CACHED_STRUCTURES)(self._compile)

    @cached_property
    def _tokenizer(self) -> "LLTokenizer":
        """Takes some tenths of a second to make."""
        from llguidance import LLTokenizer, TokenizerWrapper

        vocabulary = Vocabulary(self.spelling, self.vocab_size, self.special_ids)
        tokenizer = LLTokenizer(TokenizerWrapper(vocabulary))
        vocabulary.greedy = tokenizer.greedy_tokenize
        return tokenizer

    def _compile(self, structure: Structure) -> "CompiledStructure":
        """Raises InvalidField for what cannot be compiled, or spelled in tokens of the model."""
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(
            step_max_items=MAX_STEP_ITEMS,
            step_lexer_fuel=MAX_STEP_FUEL,
            initial_lexer_fuel=MAX_INITIAL_FUEL,
            max_lexer_states=MAX_LEXER_STATES,
            verbose_errors=False,
        )
        try:
            grammar = _grammar(structure)
        except (ValueError, RecursionError) as error:
            raise _refusal(structure, str(error)) from None
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise _refusal(structure, matcher.get_error())
        compiled = CompiledStructure(matcher, structure.field, self.vocab_size)
        try:
            compiled.start().mask([])
        except ConstraintFailed as failure:
            raise InvalidField(structure.field, CANNOT_BE_FOLLOWED) from failure
        return compiled


def _grammar(structure: Structure) -> str:
    """In llguidance's own form. Raises ValueError."""
    from llguidance import LLMatcher, grammar_from

    if structure.kind == "json":
        options: Any = dict(structure.blanks)
        return LLMatcher.grammar_from_json_schema(structure.source, overrides=options)
    if structure.kind == "choice":
        choices = " | ".join(map(json.dumps, json.loads(structure.source)))
        return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}")
    return grammar_from("regex" if structure.kind == "regex" else "grammar", structure.source)


def _refusal(structure: Structure, said: str) -> InvalidField:
    """What a client is told, with nothing of its own text in it."""
    if keywords := UNSUPPORTED_KEYWORDS.match(said):
        names = ", ".join(json.loads(keywords[1]))
        return InvalidField(structure.field, f"{structure.kind} has {names}: not supported")
    for pattern, reason in REASONS:
        if pattern.search(said):
            return InvalidField(structure.field, f"{structure.kind} {reason}")
    reason = f"{structure.kind} is not valid"
    is_lark = structure.kind == "grammar" and "::=" not in structure.source
    if is_lark and (place := PLACE.match(said)):
        reason += f": line {place[1]}, column {place[2]}"
    return InvalidField(structure.field, reason)


class CompiledStructure:
    """The engine's Constraint. matcher: at the beginning of a text, where it stays."""

    def __init__(self, matcher: "LLMatcher", field: str, vocab_size: int):
        self.matcher = matcher
        self.field = field
        self.vocab_size = vocab_size

    def start(self) -> "StructureMatcher":
        return StructureMatcher(self)


class StructureMatcher:
    """The engine's TextMatcher."""

    def __init__(self, structure: CompiledStructure):
        self.structure = structure
        self.matcher = structure.matcher.deep_copy()
        self.token_ids: list[int] = []  # that it has followed

    def mask(self, token_ids: Sequence[int]) -> TokenMask:
        self._follow(token_ids)
        vocab_size = self.structure.vocab_size
        words = np.zeros(vocab_size // 32 + 1, dtype=np.uint32)  # a bit for the end too
        self.matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._raise_failure()
        bias = np.take(BIAS_OF_BITS, words.view(np.uint8), axis=0).reshape(-1)
        return TokenMask(torch.from_numpy(bias[:vocab_size]), bool(bias[vocab_size] == 0))

    def is_complete(self, token_ids: Sequence[int]) -> bool:
        self._follow(token_ids)
        self._raise_failure()
        return self.matcher.is_stopped()

    def _follow(self, token_ids: Sequence[int]) -> None:
        num_kept = len(self.token_ids)
        if token_ids[:num_kept] != self.token_ids:  # some were taken back
            pairs = zip(token_ids, self.token_ids, strict=False)
            num_kept = next((at for at, (new, old) in enumerate(pairs) if new != old), num_kept)
            num_kept = min(num_kept, len(token_ids))
            self.matcher.rollback(len(self.token_ids) - num_kept)
            del self.token_ids[num_kept:]
        if added := list(token_ids[num_kept:]):
            self.matcher.consume_tokens(added)
            self.token_ids += added

    def _raise_failure(self) -> None:
        if self.matcher.is_error():
            raise ConstraintFailed(self.structure.field)
