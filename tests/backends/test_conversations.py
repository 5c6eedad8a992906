"""Where an answer in a conversation ends, by the chat template."""

import pytest

from backends.conversations import TemplateMessages, find_turn_ends


@pytest.mark.parametrize(
    ("before_user", "before_assistant", "stops"),
    [
        ("\nUser: ", "\nAssistant: ", ("\nUser:", "\nAssistant:")),
        ("\n\n### Human:\n", "\n", ("\n\n### Human:", "\n### Human:")),
        ("<|end|>\n<|user|>\n", "<|end|>\n", ("<|end|>\n<|user|>", "<|end|>")),
        ("\n", "", ()),
    ],
)
def test_answer_ends_at_what_stands_before_the_next_turn(
    before_user: str, before_assistant: str, stops: tuple[str, ...]
) -> None:
    def apply_template(messages: TemplateMessages) -> str:
        before = {"user": before_user, "assistant": before_assistant}
        return "".join(before[each["role"]] + each["content"] for each in messages)

    assert find_turn_ends(apply_template) == stops


def test_template_that_shows_no_messages_ends_nothing() -> None:
    assert find_turn_ends(lambda messages: "Say something:") == ()
