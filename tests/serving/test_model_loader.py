"""How a model is loaded, as far as the settings say."""

import json
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from transformers.utils import logging as transformers_logging

import main
import models
from backends.base import Client
from backends.generation_config import AuthorsDefaults
from backends.local import LocalBackend
from engine import available_cores
from serving.model_loader import (
    ModelLoader,
    choose_num_threads,
    choose_precision,
    show_only_downloads,
)
from serving.settings import Settings
from tests.support import FOLDER, PROMPT, fail, one, run


def test_precision_is_what_the_settings_name() -> None:
    assert choose_precision(Settings(dtype="float32"))["dtype"] == torch.float32


def test_threads_beyond_the_cores_are_taken_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cores = available_cores()
    assert choose_num_threads(Settings(torch_num_threads=cores)) == cores
    assert not caplog.messages
    assert choose_num_threads(Settings(torch_num_threads=cores + 1)) == cores + 1
    assert f"more than the cores that the process may use ({cores})" in caplog.text


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_bar_is_there_for_a_download_on_a_terminal(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was hidden together with that of loading weights, which still is."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    try:
        show_only_downloads()
        assert are_progress_bars_disabled() is not is_terminal
        assert not transformers_logging.is_progress_bar_enabled()
    finally:
        disable_progress_bars()


@pytest.fixture
def asking(tmp_path: Path) -> str:
    """A folder with the bundled model, whose author asks for more than its end-of-text."""
    for file in FOLDER.iterdir():
        if file.name != "generation_config.json":
            (tmp_path / file.name).symlink_to(file)
    likeliest = one(main.engine, PROMPT, temperature=0, max_new_tokens=1).token_ids
    asked = {"temperature": 0.6, "num_beams": 4, "suppress_tokens": likeliest, "eos_token_id": 0}
    (tmp_path / "generation_config.json").write_text(json.dumps(asked))
    return str(tmp_path)


def load_asking(source: str, generation_config: Literal["auto", "none"]) -> LocalBackend:
    settings = Settings(generation_config=generation_config, torch_num_threads=1)
    loader = ModelLoader(settings, main.content_filter, main.load_pipeline, fail)
    return loader.load_local("asking", source)


async def greedy_text(backend: LocalBackend) -> str:
    body = models.GenerateRequest(prompt=PROMPT, max_new_tokens=1, temperature=0)
    generation = await backend.submit_text(PROMPT, body, client=Client("a"))
    return (await generation.complete())[0].text


def test_generation_config_is_followed_and_told_once(
    asking: str, caplog: pytest.LogCaptureFixture
) -> None:
    """But for end-of-text it was ignored without a word."""
    with caplog.at_level("INFO"):
        backend = load_asking(asking, "auto")
    told = [line for line in caplog.messages if line.startswith("generation_config.json of asking")]
    assert told == [
        "generation_config.json of asking: default on /v1: temperature=0.6; in force on every "
        "route: suppress_tokens; GENERATION_CONFIG=none turns this off",
        "generation_config.json of asking asks for num_beams, which is not applied",
    ]
    assert backend.defaults.sampling == {"temperature": 0.6}
    assert run(greedy_text(backend)) != run(greedy_text(main.registry.default))
    backend.stop()


def test_generation_config_can_be_left_alone(asking: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        backend = load_asking(asking, "none")
    assert not [line for line in caplog.messages if "generation_config" in line]
    assert backend.defaults == AuthorsDefaults()
    assert run(greedy_text(backend)) == run(greedy_text(main.registry.default))
    backend.stop()
