"""A checkpoint is read whole, or it is refused with the reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaModel, ModernBertConfig, ModernBertForMaskedLM

import main
from serving.checkpoint import load_weights
from tests.support import tiny_llama, tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def configure(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def rename_tensors(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = {f"wrapped.{name}": tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def save_encoder(folder: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    ids = dict.fromkeys(("pad_token_id", "cls_token_id", "sep_token_id"), 0)
    config = ModernBertConfig(vocab_size=512, num_attention_heads=4, **sizes, **ids)
    ModernBertForMaskedLM(config).save_pretrained(folder)


def bring_code(folder: Path) -> None:
    (folder / "its_own.py").write_text("raise SystemExit('it ran')")
    configure(folder, model_type="its_own", auto_map={"AutoConfig": "its_own.Config"})


def remove_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


FAULTY: dict[str, tuple[Callable[[Path], Any], str]] = {
    "saved without its output layer": (
        lambda folder: LlamaModel(tiny_llama().config).save_pretrained(folder),
        "LlamaForCausalLM has tensors that are not in its files: lm_head.weight;",
    ),
    "fewer layers than it says": (
        lambda folder: configure(folder, num_hidden_layers=3),
        "not in its files: model.layers.2.input_layernorm.weight and 8 more;",
    ),
    "tensors under other names": (rename_tensors, "not in its files: lm_head.weight and 20 more;"),
    "tensors of another size": (
        lambda folder: configure(folder, intermediate_size=32),
        "another size in its files: model.layers.0.mlp.down_proj.weight and 5 more;",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "no file named model.safetensors",
    ),
    "an adapter": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        r"it has an adapter \(adapter_config.json\)",
    ),
    "a broken generation_config.json": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": [0'),
        "its generation_config.json is no JSON",
    ),
    "an encoder": (save_encoder, "ModernBertForMaskedLM is no causal language model"),
    "code of its own": (bring_code, "contains custom code"),
    "no tokenizer": (remove_tokenizer, "its tokenizer cannot be read: Could"),
}


@pytest.mark.parametrize(("spoil", "reason"), FAULTY.values(), ids=FAULTY)
def test_checkpoint_that_is_not_whole_is_refused(
    folder: Path, spoil: Callable[[Path], Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were served with random numbers for what was missing, or refused with a first line, the
    one that is shown, that told no reason; for code of its own the terminal was asked."""
    spoil(folder)
    monkeypatch.setattr("builtins.input", lambda _prompt: "yes")
    with pytest.raises((ValueError, OSError), match=rf"\A.*{reason}"):
        main.load_pipeline(str(folder))


def test_checkpoint_is_read_as_transformers_reads_it(folder: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    read = load_weights(str(folder), torch.float32).state_dict()
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())
