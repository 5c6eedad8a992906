"""What MODEL_NAME names, and where that is to be had: real cache folders, and no hub."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from serving.model_sources import cached_folder, hub_has, parse_model_names
from tests.support import ROOT


def test_cached_folder_needs_config_weights_and_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--gpt2" / "snapshots" / "1"
    folder.mkdir(parents=True)
    (tmp_path / "models--gpt2" / "refs").mkdir()
    (tmp_path / "models--gpt2" / "refs" / "main").write_text("1")
    (folder / "config.json").touch()
    assert cached_folder("gpt2") is None
    (folder / "model.safetensors").touch()
    assert cached_folder("gpt2") is None
    (folder / "vocab.json").touch()
    assert cached_folder("gpt2") == str(folder)


def test_unreachable_hub_is_a_quick_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert hub_has("gpt2") is False


def test_folder_is_served_under_its_last_component() -> None:
    assert parse_model_names(f"{ROOT}/gpt2-tales/, other/model") == {
        "gpt2-tales": f"{ROOT}/gpt2-tales/",
        "other/model": "other/model",
    }
