"""`python main.py`, in processes of its own."""

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from backends.base import Unreachable
from serving.command import check_models, described_settings
from serving.settings import Settings
from tests.support import FOLDER, NAME, ROOT, free_port, wait_until


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *arguments],
        env=os.environ | environment,
        cwd=FOLDER,  # not where the service lies
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_help_describes_every_setting_without_loading_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "main.py"), "--help"],
        capture_output=True, text=True, env=os.environ | {"COLUMNS": "1000"},
    )  # fmt: skip
    assert done.returncode == 0
    for name, field in Settings.model_fields.items():
        assert f"  --{name.replace('_', '-')} " in done.stdout
        assert str(field.description) in done.stdout
    assert " torch" not in done.stderr.replace("|", "")


def test_described_settings_are_read_again_from_env_files(tmp_path: Path) -> None:
    """Quotes were a shell's, which `.env` does not know: a setting with an apostrophe was left
    out, and a template with one took the settings after it along. What follows a question mark
    was hidden outside of URLs too."""
    written = Settings(
        _env_file=None,  # type: ignore[call-arg]
        forbidden_words="it's,a#b",
        chat_template='{{ "a\\n" }}\n{# who? one\'s #}',
        log_level="ERROR",
    )
    (tmp_path / ".env").write_text(described_settings(written))
    read = Settings(_env_file=tmp_path / ".env")  # type: ignore[call-arg]
    told = {"forbidden_words", "chat_template", "log_level"}
    assert read.model_dump(include=told) == written.model_dump(include=told)


def test_show_settings_says_what_is_in_force_and_no_secret() -> None:
    written = command(
        "--show-settings", "--max-num-seqs", "3", "--api-keys", "me:abc",
        "--model-name", "a=http://me:pass@host/v1?key=word#b",
        MAX_NUM_SEQS="9", MAX_QUEUE_SIZE="7", FILTER_OUTPUT="false", FORBIDDEN_WORDS="bad*,worse",
    ).stdout  # fmt: skip
    lines = set(written.splitlines())
    assert {"MAX_NUM_SEQS=3", "MAX_QUEUE_SIZE=7", "FILTER_OUTPUT=false", "USAGE_LOG="} <= lines
    assert {line.partition("=")[0] for line in lines} == {n.upper() for n in Settings.model_fields}
    assert "FORBIDDEN_WORDS='bad*,worse'" in lines
    assert {"API_KEYS='**********'", "RATE_LIMIT_STORAGE=memory://"} <= lines
    assert not any(secret in written for secret in ("abc", "me:", "pass", "word#"))


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--max-num-seqs", "0", "--show-settings"], 1, "MAX_NUM_SEQS: Input should be greater"),
        (["--max-seqs", "3"], 2, "unrecognized arguments: --max-seqs 3"),
        (["--max-num-seqs"], 2, "--max-num-seqs: expected one argument"),
    ],
)
def test_option_that_is_not_allowed_is_named(arguments: list[str], status: int, words: str) -> None:
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_check_generates_once_with_every_model() -> None:
    """Two names of one model are one model: it is loaded once."""
    names = f"story={FOLDER},tale={FOLDER}"
    done = command("--check", "--model-name", names, "--log-level", "WARNING")
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    assert re.match("""story: ['"]Once upon a time""", line)


def test_check_tells_which_model_fails(capsys: pytest.CaptureFixture[str]) -> None:
    async def refuse(*_: Any, **__: Any) -> Any:
        raise Unreachable("no connection")

    async def stop() -> None:
        pass

    backends = {"far": SimpleNamespace(submit_text=refuse)}
    registry: Any = SimpleNamespace(backends=backends, start=lambda: None, stop=stop)
    assert asyncio.run(check_models(registry)) is False
    assert capsys.readouterr().out == "far: Unreachable no connection\n"


def test_command_serves_under_every_name_and_ends_in_order() -> None:
    port = str(free_port())
    options = ["--model-name", f"story={FOLDER},tale={FOLDER}", "--chat-template", "plain"]
    arguments = [sys.executable, str(ROOT / "main.py"), "--port", port, *options]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    address = f"http://127.0.0.1:{port}"

    def is_ready() -> bool:
        assert process.poll() is None
        try:
            return httpx.get(f"{address}/ready").status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_until(is_ready)
        listed = [each["id"] for each in httpx.get(f"{address}/v1/models").json()["data"]]
        body = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 3, "seed": 1}
        answers = [
            httpx.post(f"{address}/v1/chat/completions", json={**body, "model": name}, timeout=60)
            for name in ("story", "tale", NAME)
        ]
    finally:
        process.terminate()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert listed == ["story", "tale"]
    assert {answer.status_code for answer in answers} == {200}
    assert len({json.dumps(answer.json()["choices"]) for answer in answers}) == 1
    assert output.count('"message": "loaded story') == 1
