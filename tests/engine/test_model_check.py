"""Models that would be served wrong are refused when they are loaded, and right ones are not."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    DiffLlamaConfig,
    Lfm2Config,
    LlamaConfig,
    MixtralConfig,
)

from engine import Engine
from engine.kernels import ONEDNN, choose_kernel, what_is_wrong_with
from engine.model_check import BOUNDS, ModelCheck, choose_lengths, difference, limits_of
from engine.model_runner import ModelRunner
from tests.support import fail, load, tiny_llama, tokenizer
