"""Which template CHAT_TEMPLATE gives to which model."""

from pathlib import Path

import pytest

from serving.chat_templates import EVERY_OTHER, PLAIN_TEMPLATE, read_chat_templates
from serving.settings import Settings
from tests.support import FOLDER, NAME, tokenizer

NAMES = f"story={FOLDER},tale={FOLDER},org/other,far=http://host/v1"
TEXT = "{% for m in messages %}{{ m.content }}, {% endfor %}"


@pytest.mark.parametrize(
    ("written", "templates"),
    [
        (None, {}),
        ("plain", {EVERY_OTHER: PLAIN_TEMPLATE}),
        ("FILE", {EVERY_OTHER: "[{{ messages }}]"}),
        (TEXT, {EVERY_OTHER: TEXT}),
        ("{% set a = 1 %}", {EVERY_OTHER: "{% set a = 1 %}"}),
        (f"story={TEXT}", {"story": TEXT}),
        ("org/other = plain, FILE", {"org/other": PLAIN_TEMPLATE, EVERY_OTHER: "[{{ messages }}]"}),
        ("tale=plain", {"story": PLAIN_TEMPLATE}),  # another name of the same model
        (f"{NAME}=plain", {"story": PLAIN_TEMPLATE}),  # and its own
    ],
)
def test_templates_are_found_by_the_name_of_their_model(
    written: str | None, templates: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("[{{ messages }}]")
    written = written and written.replace("FILE", str(file))
    assert read_chat_templates(Settings(model_name=NAMES, chat_template=written)) == templates


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("simple", "'simple' is neither 'plain', nor a file"),
        ("far=plain", "'far=plain' is neither"),
        ("story=plain,tale=plain", "has two templates for story"),
        ("plain,plain", "has two templates for the same models"),
        (str(FOLDER), "is neither 'plain', nor a file"),
    ],
)
def test_what_is_no_template_stops_the_start(written: str, reason: str) -> None:
    with pytest.raises(SystemExit, match=r"Invalid settings\. CHAT_TEMPLATE: ") as stopped:
        read_chat_templates(Settings(model_name=NAMES, chat_template=written))
    assert reason in str(stopped.value)


def test_plain_template_reads_like_a_play() -> None:
    messages = [
        {"role": "system", "content": "Two friends talk.\n"},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": " Hi."},
        {"role": "user", "content": "What now?"},
    ]
    written = tokenizer.apply_chat_template(
        messages, chat_template=PLAIN_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    expected = "Two friends talk.\nUser: Hello!\nAssistant: Hi.\nUser: What now?\nAssistant:"
    assert written == expected
