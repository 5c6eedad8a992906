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
    names = parse_model_names(f"{ROOT}/gpt2-tales/, other/model")
    assert names == (
        {"gpt2-tales": f"{ROOT}/gpt2-tales/", "other/model": "other/model"}, {}, {}
    )  # fmt: skip


def test_model_has_the_names_that_it_is_given_and_its_own() -> None:
    """Several names of one folder are one model, and what it is called is another one."""
    folder = f"{ROOT}/gpt2-tales"
    names = parse_model_names(
        f"story = {folder}, tale={folder}/, one=org/model, a=http://host/v1, b=http://host/v1"
    )
    assert names.sources == {
        "story": folder, "one": "org/model", "a": "http://host/v1", "b": "http://host/v1"
    }  # fmt: skip
    assert names.aliases == {"tale": "story"}
    assert names.own_names == {"gpt2-tales": "story", "org/model": "one"}


def test_given_name_goes_before_what_a_folder_is_called() -> None:
    names = parse_model_names(f"gpt2-tales=org/model,mine={ROOT}/gpt2-tales")
    assert names.sources == {"gpt2-tales": "org/model", "mine": f"{ROOT}/gpt2-tales"}
    assert names.own_names == {"org/model": "gpt2-tales"}


@pytest.mark.parametrize("written", ["a=one,a=two", "a=one,b=one,b=two", "a=one,a=http://host/v1"])
def test_name_that_comes_twice_stops_the_start(written: str) -> None:
    with pytest.raises(SystemExit, match=r"MODEL_NAME: names '[ab]' twice"):
        parse_model_names(written)
