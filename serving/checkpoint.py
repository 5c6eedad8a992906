"""Reads a checkpoint of transformers: all of it, or an error that says what is wrong with it.

transformers itself goes on where a part is missing: weights get random numbers, and an adapter is
left out. The text is then fluent nonsense, or another model's.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from serving.model_sources import cached_folder


def load_weights(source: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder or Hugging Face id, to whose last number as it was saved.

    Raises ValueError where it would not be, or where it is no causal language model; and what
    transformers raises. Code that comes with a model is not run.
    """
    if (Path(source) / "adapter_config.json").exists():
        raise ValueError(
            "it has an adapter (adapter_config.json), which is not applied: merge the two, and "
            "serve what comes of it without that file"
        )
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    model: PreTrainedModel
    model, found = choose_class(config).from_pretrained(
        source, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )
    missing = sorted(found["missing_keys"])
    misfits = sorted(name for name, *_ in found["mismatched_keys"])
    for names, fault in (
        (missing, "are not in its files"),
        (misfits, "have another size in its files"),
    ):
        if names:
            more = f" and {len(names) - 1} more" if names[1:] else ""
            raise ValueError(
                f"{type(model).__name__} has tensors that {fault}: {names[0]}{more}; the "
                "files are of another kind of model, or not whole"
            )
    _check_generation_config(source if Path(source).is_dir() else cached_folder(source))
    return model


def choose_class(config: PretrainedConfig) -> Any:
    """What loads a model: its class as a causal language model, else the one that it was saved as,
    such as one that reads pictures too. Raises ValueError for one that cannot go on with a text."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    name = next(iter(config.architectures or []), config.model_type)
    model_class = getattr(transformers, name, None)
    if model_class is None or config.is_encoder_decoder or not model_class.can_generate():
        raise ValueError(f"{name} is no causal language model")
    return model_class


def load_tokenizer(source: str) -> Any:
    """Raises ValueError where it cannot be read."""
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # of several libraries
        reason = " ".join(str(error).split())
        raise ValueError(f"its tokenizer cannot be read: {reason}") from error


def _check_generation_config(folder: str | None) -> None:
    """Raises ValueError for one that transformers would go on without."""
    file = Path(folder or "") / "generation_config.json"
    if folder and file.exists():
        try:
            json.loads(file.read_bytes())
        except ValueError as error:
            raise ValueError(f"its generation_config.json is no JSON: {error}") from error
