"""Where models are to be had, and where they compute."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()


def pick_device() -> tuple[str, torch.dtype]:
    """Where models compute, and in what."""
    if not torch.cuda.is_available():
        return "cpu", torch.float32
    return "cuda", torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def from_cache_or_hub(load: Callable[..., Any], source: str, **options: Any) -> Any:
    """What load gives for a folder or a Hugging Face id. The hub is not asked for what is in the
    local cache; without a network, its client would try for 23 seconds."""
    try:
        return load(source, local_files_only=True, **options)
    except (OSError, ValueError):
        return load(source, **options)
