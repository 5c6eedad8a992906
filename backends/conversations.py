"""How a model reads a conversation, as far as its chat template says."""

from collections.abc import Callable

import models

TemplateMessages = list[dict[str, str]]  # each with its `role` and `content`


def texts_of(messages: list[models.ChatMessage]) -> list[str]:
    return [message.text for message in messages]


def as_template_reads(messages: list[models.ChatMessage]) -> TemplateMessages:
    """The messages of a conversation as chat templates know them, which have no developers."""
    return [
        {"role": "system" if each.role == "developer" else each.role, "content": each.text}
        for each in messages
    ]


def find_turn_ends(apply_template: Callable[[TemplateMessages], str]) -> tuple[str, ...]:
    """The stop strings at which an answer ends, since the next turn would begin there: what a
    template puts before a question and before an answer. Raises what the template does."""
    said = (("user", "A question"), ("assistant", "An answer"), ("user", "Another one"))
    text = apply_template([{"role": role, "content": content} for role, content in said])
    before_answer = text.partition("A question")[2].partition("An answer")[0]
    before_question = text.partition("An answer")[2].partition("Another one")[0]
    return (*_stops(before_question), *_stops(before_answer))


def _stops(between: str) -> list[str]:
    """between: what stands before a new turn. Fewer lines may stand there than the template has,
    so one line's end before it is enough."""
    opening = between.strip()
    if not opening:
        return []
    whole = between.rstrip()
    return list(dict.fromkeys([whole, "\n" + opening] if whole[0] == "\n" else [whole]))
