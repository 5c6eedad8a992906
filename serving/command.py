"""`python main.py`: the service by a command of its own, with an option for each setting.

Knows no torch before it is asked to serve or to check, so that `--help` is quick.
"""

import argparse
import asyncio
import os
import re
import sys
import time
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from serving.settings import Settings, read_settings

if TYPE_CHECKING:
    from serving.registry import ModelRegistry

DESCRIPTION = """\
Serves text generation with GPT-2-class models; see http://HOST:PORT/docs once it runs."""
EPILOG = """\
Each setting is also a variable of the environment or of .env: --max-num-seqs is MAX_NUM_SEQS. An
option goes before the environment, that before .env. Others can read a command line, so keys belong
in one of the other two. HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what they always mean.
`uvicorn main:app` serves the same and has further options of its own."""
GRACEFUL_SHUTDOWN_SECONDS = 25  # as the Procfile has it
CHECK_PROMPT, CHECK_TOKENS = "Once upon a time", 16
# What a URL may hold of a secret: who asks, and what follows a question mark.
USER_OF_URL = re.compile(r"(?<=://)[^/,@]*(?=@)")
QUERY_OF_URL = re.compile(r"(?P<before>://[^?,\s]*\?)[^#,]*")
HIDDEN = "**********"
PLAIN_VALUE = re.compile(r"[\w@%+=:,./-]*", re.ASCII)  # that needs no quotes


def run_command(app: str) -> NoReturn:
    """Does what the process's arguments say, and ends it. app: as uvicorn names it."""
    options = vars(new_parser().parse_args())
    host, port = options.pop("host"), options.pop("port")
    shows_settings, checks = options.pop("show_settings"), options.pop("check")
    os.environ.update({name.upper(): value for name, value in options.items()})
    if shows_settings:
        print(described_settings(read_settings()))
        sys.exit()
    import uvicorn

    if checks:
        from uvicorn.importer import import_from_string

        service = import_from_string(app).state.service
        sys.exit(not asyncio.run(check_models(service.registry)))
    uvicorn.run(app, host=host, port=port, timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_SECONDS)
    sys.exit()


def new_parser() -> argparse.ArgumentParser:
    """Takes the settings as they are written in the environment, which Settings reads then."""
    parser = argparse.ArgumentParser(
        prog="python main.py",
        usage="%(prog)s [--option VALUE …]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--host", default="127.0.0.1", help="to listen on [127.0.0.1]")
    parser.add_argument("--port", default=8000, type=int, help="to listen on [8000]")
    for option, told in (
        ("--show-settings", "print the settings that are in force, keys hidden, and exit"),
        ("--check", "load every model, generate a few tokens with it, and exit; status 0: all did"),
    ):
        parser.add_argument(option, action="store_true", default=False, help=told)
    settings = parser.add_argument_group("settings")
    for name, field in Settings.model_fields.items():
        option = "--" + name.replace("_", "-")
        settings.add_argument(option, metavar=form_of(field.annotation), help=described(field))
    return parser


def form_of(annotation: Any) -> str:
    """What a value looks like."""
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    kinds = get_args(annotation) or (annotation,)
    forms = {bool: "true|false", int: "NUMBER", float: "NUMBER", str: "TEXT", SecretStr: "TEXT"}
    return forms.get(kinds[0], "FILE")


def described(field: FieldInfo) -> str:
    """A setting's description and its default, for argparse, to which % means something."""
    default = field.default
    if isinstance(default, SecretStr):
        default = default.get_secret_value()
    if isinstance(default, bool):
        default = str(default).lower()
    told = "" if default in (None, "") else f" [{default}]"
    return f"{field.description}{told}".replace("%", "%%")


def described_settings(settings: Settings) -> str:
    """A line for each setting, as `.env` has it, or several for a value that has several; what may
    be a secret is hidden."""
    lines = []
    for name, value in settings.model_dump(mode="json").items():
        default = Settings.model_fields[name].default
        if isinstance(default, SecretStr) and getattr(settings, name) == default:
            value = default.get_secret_value()
        elif isinstance(value, bool):
            value = str(value).lower()
        written = "" if value is None else USER_OF_URL.sub(HIDDEN, str(value))
        written = QUERY_OF_URL.sub(rf"\g<before>{HIDDEN}", written)
        lines.append(f"{name.upper()}={quoted(written)}")
    return "\n".join(lines)


def quoted(value: str) -> str:
    """A value as `.env` has it. A shell would read most in the same way, but not a quote in one."""
    if PLAIN_VALUE.fullmatch(value):
        return value
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


async def check_models(registry: "ModelRegistry") -> bool:
    """Generates a few tokens with every model and prints them; whether all of them did."""
    import models
    from backends.base import Client
    from engine import EngineError

    params = models.TextRequest(prompt=CHECK_PROMPT, max_new_tokens=CHECK_TOKENS)
    all_did = True
    registry.start()
    try:
        for name, backend in registry.backends.items():
            started_seconds = time.monotonic()
            try:
                submitting = backend.submit_text(CHECK_PROMPT, params, client=Client("check"))
                (delta,) = await (await submitting).complete()
            except EngineError as error:
                all_did = False
                print(f"{name}: {type(error).__name__} {error}".rstrip())
            else:
                seconds = time.monotonic() - started_seconds
                print(f"{name}: {CHECK_PROMPT + delta.text!r} in {seconds:.1f} s")
    finally:
        await registry.stop()
    return all_did
