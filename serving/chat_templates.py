"""What CHAT_TEMPLATE says: how models that are not made for chat read a conversation."""

from pathlib import Path

from serving.model_sources import BUNDLED_MODEL, is_external, parse_model_names
from serving.settings import Settings, refuse_setting

PLAIN = "plain"
# A conversation as a play has it. No blank follows the last colon: GPT-2's words begin with theirs.
PLAIN_TEMPLATE = """\
{%- for message in messages -%}
{{ '' if message.role == 'system' else message.role.title() + ': ' }}
{{- message.content.strip() + '\\n' }}
{%- endfor -%}
{{ 'Assistant:' if add_generation_prompt else '' }}"""
EVERY_OTHER = ""  # in place of a name: the models that have no template of their own


def read_chat_templates(settings: Settings) -> dict[str, str]:
    """The templates of CHAT_TEMPLATE by the name of their model, or EVERY_OTHER. Ends the process
    for an entry that is no template, or the second one for its models."""
    written = settings.chat_template or ""
    known = _local_names(settings)
    templates: dict[str, str] = {}
    # A text may have commas, so it is the only entry.
    entries = [written] if "{" in written else written.split(",")
    for entry in filter(str.strip, entries):
        name, equals, form = entry.partition("=")
        of = known.get(name.strip()) if equals else None
        if of is None:
            of, form = EVERY_OTHER, entry
        if of in templates:
            refuse_setting("CHAT_TEMPLATE", f"has two templates for {of or 'the same models'}")
        templates[of] = _read_template(form)
    return templates


def _local_names(settings: Settings) -> dict[str, str]:
    """For each name that a local model may be asked for by, the one that it goes by."""
    if settings.model_name is None:
        return {name: name for name in ("gpt2", BUNDLED_MODEL.name)}
    names = parse_model_names(settings.model_name)
    local = {name: name for name, source in names.sources.items() if not is_external(source)}
    return names.own_names | local | names.aliases


def _read_template(form: str) -> str:
    if "{" in form:
        return form
    if form.strip() == PLAIN:
        return PLAIN_TEMPLATE
    try:
        return Path(form.strip()).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        reason = f"{form.strip()!r} is neither {PLAIN!r}, nor a file, nor a text in Jinja; before "
        refuse_setting("CHAT_TEMPLATE", reason + "a = there may be the name of a local model")
