"""Why another server did not take a request, in the words of those that speak OpenAI's protocol.

Only names that were sent there are read out of what it says: it may quote the prompt, and none
of that goes on to a client or the log.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

# OpenAI's codes for a field that it does not know, or not with any other value than its own.
FIELD_CODES = ("unsupported_parameter", "unsupported_value", "unknown_parameter")
CODES = {
    "context_length_exceeded": "context_length_exceeded",
    "exceed_context_size_error": "context_length_exceeded",  # a type of llama.cpp's server
    "content_filter": "content_filter",
    "content_policy_violation": "content_filter",
}
# vLLM, Mistral, OpenAI; Anthropic; TGI. They say it in no other way.
TOO_LONG = re.compile(
    r"maximum context length|prompt is too long|`max_new_tokens` must be <=", re.IGNORECASE
)
# OpenAI; vLLM.
NO_COMPLETIONS = re.compile(
    r"This is a chat model|The model (\S+ )?does not support (the )?(/v1/)?completions",
    re.IGNORECASE,
)
# How a message begins that names fields which were refused, where there is no code: OpenAI and
# those that pass its message on; Groq; Anthropic, and pydantic behind many a server; Google.
REFUSED_FIELDS = re.compile(
    r"Unrecognized request arguments? supplied: (?P<unrecognized>[\w, ]+)"
    r"|(?:Unsupported parameter|Unsupported value|Unknown parameter): '(?P<unsupported>\w+)'"
    r"|property '(?P<property>\w+)' is unsupported"
    r"|(?P<extra>\w+): Extra inputs are not permitted"
    r"|(?:Invalid JSON payload received\. )?Unknown name \"(?P<unknown>\w+)\""
)
NOT_BOTH = re.compile(r"`(?P<other>\w+)` and `(?P<name>\w+)` cannot both be specified")


@dataclass(frozen=True)
class RefusedField:
    """A field that a server does not take; beside: only with this other one."""

    name: str
    beside: str | None = None


@dataclass(frozen=True)
class Refusal:
    """An answer with another status than 200. code: OpenAI's `context_length_exceeded` or
    `content_filter`, if it says so in whatever way."""

    status: int
    fields: tuple[RefusedField, ...] = ()
    code: str | None = None
    names_completions: bool = False  # as what the model does not have

    @property
    def has_no_completions(self) -> bool:
        """Whether the server may have no `completions` at all, or not for this model."""
        return self.status in (404, 405, 501) or (self.status == 400 and self.names_completions)


def read_refusal(status: int, body: bytes) -> Refusal:
    """What an answer with this status says. One that cannot be read says nothing else."""
    try:
        content = from_json(body)
    except ValueError:
        return Refusal(status)
    if isinstance(content, list) and content:  # Google's
        content = content[0]
    if not isinstance(content, dict):
        return Refusal(status)
    error = content.get("error")
    if isinstance(error, str):  # TGI's
        error = {"message": error}
    error = error if isinstance(error, dict) else content
    message = error.get("message")
    message = message if isinstance(message, str) else ""
    codes = [CODES.get(str(error.get(name))) for name in ("code", "type")]
    if TOO_LONG.search(message):
        codes.append("context_length_exceeded")
    return Refusal(
        status,
        tuple(_refused_fields(error, message)),
        next(filter(None, codes), None),
        bool(NO_COMPLETIONS.match(message)),
    )


def _refused_fields(error: dict[str, Any], message: str) -> Iterator[RefusedField]:
    if error.get("code") in FIELD_CODES and isinstance(error.get("param"), str):
        yield RefusedField(error["param"])
    elif found := REFUSED_FIELDS.match(message):
        for name in re.findall(r"\w+", found[found.lastgroup or 0]):
            yield RefusedField(name)
    elif found := NOT_BOTH.match(message):
        yield RefusedField(found["name"], beside=found["other"])
    for problem in _problems(error):
        match problem:
            case {"type": "extra_forbidden", "loc": ["body", str(name), *_]}:
                yield RefusedField(name)


def _problems(error: dict[str, Any]) -> list[Any]:
    """The list of a server on FastAPI, like Mistral's, which has it in its `message` too."""
    for place in (error.get("message"), error):
        detail = place.get("detail") if isinstance(place, dict) else place
        if isinstance(detail, list):
            return detail
    return []
