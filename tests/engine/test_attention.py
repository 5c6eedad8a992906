"""Models whose attention is not the plain causal one, against what they compute by themselves.

Each is small, with random weights so large and windows so short that what is left out changes
tokens.
"""

import asyncio
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers.masking_utils import sliding_window_overlay

from engine import Delta, Engine, SamplingParams
from engine.attention import PositionMask, refuse_other_attention
from engine.batch import ForwardBatch
from engine.kernels import choose_kernel
from engine.model_runner import ModelRunner
from engine.request import Sequence
from tests.support import sequences, tiny_llama, tokenizer

COMMON = {"vocab_size": 64, "max_position_embeddings": 160, "bos_token_id": 0, "eos_token_id": 0}
NAMED = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {"intermediate_size": 32, "num_key_value_heads": 2, "pad_token_id": 0, **NAMED, **COMMON}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, **LLAMA}
LAYER_TYPES = ["sliding_attention", "full_attention"]
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 24,
    "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0], "factor": 160 / 24,
}  # fmt: skip
MPT = {"d_model": 48, "n_layers": 2, "max_seq_len": 160, "vocab_size": 64}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "window": ("Mistral", {"sliding_window": 8, **LLAMA}),
    "some windows": ("Gemma3Text", {"layer_types": LAYER_TYPES, **GEMMA}),
    "cap and windows": (
        "Gemma2", {"attn_logit_softcapping": 2.0, "layer_types": LAYER_TYPES, **GEMMA},
    ),
    "sinks": (
        "GptOss",
        {"head_dim": 8, "sliding_window": 8, "layer_types": LAYER_TYPES, "num_local_experts": 2,
         "num_experts_per_tok": 2, **LLAMA},
    ),
    "chunks and scaled queries": (
        "Llama4Text",
        {"head_dim": 8, "attention_chunk_size": 8, "no_rope_layers": [1, 0], "floor_scale": 4,
         "attn_scale": 1.0, "num_local_experts": 2, "intermediate_size_mlp": 32, **LLAMA},
    ),
    "longrope": ("Phi3", {"rope_parameters": LONGROPE, **LLAMA}),
    "local layers": (
        "GPTNeo",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 8,
         "attention_types": [[["global", "local"], 1]], **COMMON},
    ),
    "gpt-j": ("GPTJ", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, **COMMON}),
    "codegen": ("CodeGen", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, **COMMON}),
    "stablelm": ("StableLm", LLAMA),
    "alibi": ("Bloom", {"hidden_size": 48, "n_layer": 2, "n_head": 6, "seq_length": 160, **COMMON}),
    "alibi of mpt": ("Mpt", {"n_heads": 6, **MPT}),
    "alibi of falcon": ("Falcon", {"alibi": True, "multi_query": False, **NAMED, **COMMON}),
    "one head of keys": ("Falcon", {"multi_query": True, **NAMED, **COMMON}),
    "as many heads of keys": (
        "GPTBigCode", {"n_embd": 32, "n_layer": 2, "n_head": 4, "multi_query": False, **COMMON},
    ),
    "falcon's groups": (
        "Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, **NAMED, **COMMON},
    ),
    "values smaller than keys": (
        "Youtu",
        {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
         "v_head_dim": 8, **LLAMA, "num_key_value_heads": 4},
    ),
    "heads of several sizes": (
        "Gemma4Text",
        {"global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
         "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8,
         "layer_types": LAYER_TYPES, "num_kv_shared_layers": 0, **GEMMA},
    ),
}  # fmt: skip


def make(case: str, **changes: Any) -> Any:
    name, options = CASES[case]
    config = getattr(hf, f"{name}Config")(**{**options, **changes}, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = getattr(hf, f"{name.removesuffix('Text')}ForCausalLM")(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    model.generation_config.eos_token_id = None
    return model


def make_runner(model: Any) -> ModelRunner:
    kernel = choose_kernel(model.dtype, "cpu", None)
    return ModelRunner(model, max_num_seqs=4, max_model_len=160, kernel=kernel)


def prompt(length: int) -> list[int]:
    return torch.randint(1, 64, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@torch.inference_mode()
def continue_greedily(runner: ModelRunner, running: list[Sequence], num_tokens: int) -> Tensor:
    """(num_tokens, sequences, vocab) float32 logits; all sequences begin together."""
    steps = []
    for step in range(num_tokens):
        steps.append(runner.forward(running, len(running) if step == 0 else 0))
        for seq, token_id in zip(running, steps[-1].argmax(-1).tolist(), strict=True):
            seq.output_token_ids.append(token_id)
    return torch.stack(steps)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models as small as these only wait for more."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


# tests/test_check_models.py looks at Mistral, Gemma 2 and Gemma 3 in the same way.
@pytest.mark.parametrize(
    "case", sorted(CASES.keys() - {"window", "some windows", "cap and windows"})
)
def test_text_in_company_is_what_the_model_generates_alone(case: str) -> None:
    """Two prompts pass every limit as they are, the others as they grow."""
    model = make(case)
    runner = make_runner(copy.deepcopy(model))
    running = [seq for length in (1, 12, 31, 133) for seq in sequences(prompt=prompt(length))]
    logits = continue_greedily(runner, running, 16)
    for row, seq in enumerate(running):
        own = model.generate(
            torch.tensor([seq.request.prompt_token_ids]),
            attention_mask=torch.ones(1, len(seq.request.prompt_token_ids), dtype=torch.long),
            max_new_tokens=16,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        own_logits = torch.stack(own.logits)[:, 0]
        assert seq.output_token_ids == own_logits.argmax(-1).tolist()
        assert torch.allclose(logits[:, row], own_logits, atol=own_logits.std().item() * 1e-3)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("cap and windows", torch.float32),
        ("cap and windows", torch.bfloat16),
        ("sinks", torch.float32),
        ("sinks", torch.bfloat16),
        ("alibi", torch.float32),
        ("longrope", torch.float32),
    ],
)
def test_bits_depend_on_neither_company_nor_capacity(
    case: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    """Beside a sequence of 120 tokens the cache has room for 128 or more tokens, alone for 64."""
    if dtype == torch.bfloat16:
        request.getfixturevalue("bfloat16_engine")  # skips where there is no such kernel
    options = {"num_experts_per_tok": 1, "num_local_experts": 1} if case == "sinks" else {}
    runner = make_runner(make(case, **options).to(dtype))
    runner.min_rows = runner.max_rows = 16  # so that products never differ
    alone = continue_greedily(runner, sequences(prompt=prompt(12)), 30)[:, 0]
    together = [seq for length in (12, 120, 12) for seq in sequences(prompt=prompt(length))]
    among = continue_greedily(runner, together, 30)
    assert torch.equal(among[:, 0], alone)
    assert torch.equal(among[:, 2], alone)


def test_sequences_of_one_prompt_go_apart_past_the_window() -> None:
    model = make("window")
    runner = make_runner(copy.deepcopy(model))
    running = sequences(prompt=prompt(12), count=2)
    with torch.inference_mode():
        runner.forward(running, 2)
        running[0].output_token_ids.append(5)
        running[1].output_token_ids.append(6)
        got = runner.forward(running, 0)
        own = model(torch.tensor([[*prompt(12), 5], [*prompt(12), 6]])).logits[:, -1]
    assert torch.allclose(got, own, atol=own.std().item() * 1e-3)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"indices": torch.zeros(1)}, "needs indices"),
        ({"position_bias": 2.0}, "needs position_bias"),
        ({"is_causal": False}, "not causal"),
        ({"attention_mask": torch.zeros(1, 1, 1, 1)}, "attention_mask of its own"),
    ],
)
def test_unknown_argument_of_attention_is_refused(arguments: dict[str, Any], problem: str) -> None:
    """Arguments were dropped, whatever they meant, and texts were wrong."""
    runner = make_runner(tiny_llama())
    attention = runner.model.model.layers[0].self_attn
    forward: Callable[..., Any] = attention.forward
    attention.forward = lambda **given: forward(**{**given, **arguments})
    batch = ForwardBatch(logit_rows=[0])
    batch.add_prompt([1], 0)
    with pytest.raises(ValueError, match=f"LlamaAttention .*{problem}"), torch.inference_mode():
        runner.run(batch)


@pytest.mark.parametrize("use", [lambda mask: mask.dtype, lambda mask: mask[:, 0]])
def test_mask_that_is_taken_for_a_tensor_is_refused_in_plain_words(
    use: Callable[[Any], Any],
) -> None:
    """What was said: 'function' object has no attribute 'dtype'."""
    mask = PositionMask(sliding_window_overlay(8))
    with pytest.raises(ValueError, match="makes a mask of its own"):
        use(mask)


def test_keys_of_other_sizes_than_the_caches_are_refused_in_plain_words() -> None:
    """What was said: value tensor cannot be broadcast to indexing result."""
    model = tiny_llama()
    runner = make_runner(model)
    runner.cache.shape = (5, 1, 8)
    with pytest.raises(ValueError, match=r"2 of keys, of 8 numbers, where .* has 4 and 1 of 8"):
        runner.probe()


def test_layers_of_several_numbers_of_heads_are_refused_in_plain_words() -> None:
    model = tiny_llama()
    model.config.per_layer_config = {1: {"num_attention_heads": 16}}
    with pytest.raises(ValueError, match="its layers differ in num_attention_heads"):
        make_runner(model)


def test_attention_by_an_index_is_refused() -> None:
    """It was said to be an encoder."""
    model = tiny_llama()
    model.config.layer_types = ["indexed_attention"] * 2
    with pytest.raises(ValueError, match="chooses by an index which tokens each one sees"):
        refuse_other_attention(model)


def test_model_that_sees_tokens_to_come_is_refused() -> None:
    model = tiny_llama()
    model.config.is_causal = False
    with pytest.raises(ValueError, match="tokens to come"):
        make_runner(model).probe()


def test_context_is_the_models_not_its_windows() -> None:
    """It was cut to the window: 60 tokens were asked for, and 26 came."""
    model = make("some windows", sliding_window=32, vocab_size=8192)
    engine = Engine(model, tokenizer, num_threads=1, max_num_seqs=2)

    async def generate() -> list[Delta]:
        params = SamplingParams(max_new_tokens=60, ignore_eos=True)
        request = engine.submit([1, 2, 3, 4, 5, 6], params)
        return [delta async for delta in engine.stream(request)]

    try:
        assert engine.max_model_len == 160
        deltas = asyncio.run(generate())
    finally:
        engine.stop()
    assert sum(len(delta.token_ids) for delta in deltas) == 60
    assert deltas[-1].finish_reason == "length"


def test_model_that_names_no_context_needs_one() -> None:
    model = make("alibi", seq_length=None, vocab_size=8192)
    del model.config.max_position_embeddings
    with pytest.raises(ValueError, match="names no context"):
        Engine(model, tokenizer, num_threads=1)
