"""Which model is served where none is named; the loader here only says what it was asked for."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from serving import registry
from serving.registry import load_default
from tests.support import FOLDER, NAME


def loading(load: Callable[[str, str], Any] = lambda *source: source) -> Any:
    """A loader whose models are what this function makes of a name and a source."""
    return SimpleNamespace(load_local=load)


def test_default_is_gpt2_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "cached_folder", lambda name: None)
    monkeypatch.setattr(registry, "hub_has", lambda name: True)
    assert load_default(loading()) == ("gpt2", "gpt2")


def test_default_is_rather_taken_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "cached_folder", lambda name: f"/cache/{name}")
    monkeypatch.setattr(registry, "hub_has", lambda name: pytest.fail("asked the hub"))
    assert load_default(loading()) == ("gpt2", "/cache/gpt2")


def test_default_is_the_bundled_model_when_gpt2_does_not_load(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load(name: str, source: str) -> tuple[str, str]:
        if name == "gpt2":
            raise OSError("connection reset\nin the middle of a file")
        return name, source

    monkeypatch.setattr(registry, "cached_folder", lambda name: None)
    monkeypatch.setattr(registry, "hub_has", lambda name: True)
    assert load_default(loading(load)) == (NAME, str(FOLDER))
    assert "not to be loaded (connection reset)" in caplog.text
