"""Which architectures of transformers are served right: a table, a line for each.

    python scripts/check_models.py                      # all of them, about five minutes
    python scripts/check_models.py gemma2 phi3          # these
    python scripts/check_models.py --write              # also writes the table of docs/models.md

For each architecture that transformers can load as a causal language model, a small checkpoint
is made with random weights and read back as the service reads it. Windows, chunks and caps are
so small, and weights so large, that they change tokens. Twelve prompts of one to a hundred
tokens then run at the same time through the engine, greedily, and each token and its log
probabilities are compared with what the unmodified model's own `generate` gives for that prompt
alone. Then each prompt runs alone, and has to give the same bits as beside the others, unless the
engine has warned that it does not. In the end stands one of

    right    every token the same, every log probability as near as float order explains
    refused  the engine refuses the model when it is loaded, and says why
    WRONG    anything else; the exit status is then 1

An architecture for which no checkpoint can be made here, or whose own `generate` fails, is left
out of the table, with the reason.
"""

import argparse
import asyncio
import itertools
import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# As main.py has it: threads that spin wait for each other in models as small as these.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from engine import Delta, Engine, InferenceError, SamplingParams

PROMPT_LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 40, 50, 70, 100)
CONTEXT_TOKENS = 256
WINDOW_TOKENS = 16
CHUNK_TOKENS = 32
VOCAB_SIZE = 512
MAX_PARAMETERS = 20_000_000
# By how much log probabilities may be off; it was 0.0003 at most where texts were right.
TOLERANCE = 2e-3
NUM_TOP = 3  # tokens whose log probabilities are compared at each position
PAGE = ROOT / "docs" / "models.md"
MARK = "## The table"  # of the page; what follows is written by `--write`
HEADINGS = {
    "right": "Served right: {}",
    "refused": "Refused at start: {}",
    "WRONG": "Wrong: {}",
    "left out": "Not looked at: {}",
}

# What a configuration is given of these, if it has them.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    # Width
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "emb_dim": 64,
    "embedding_size": 64,
    "word_embed_proj_dim": 64,
    "input_embedding_size": 64,
    "output_embedding_size": 64,
    "hidden_size_per_layer_input": 16,
    # Depth
    "num_hidden_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "num_layers": 4,
    "decoder_layers": 4,
    "encoder_layers": 4,
    "num_decoder_layers": 4,
    "num_encoder_layers": 4,
    "num_layers_per_stack": 2,
    # Heads
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "attention_heads": 4,
    "swa_num_attention_heads": 4,
    "num_key_value_heads": 2,
    "swa_num_key_value_heads": 2,
    "num_kv_heads": 4,
    "head_dim": 16,
    "swa_head_dim": 16,
    "attention_head_size": 16,
    "kv_channels": 16,
    "rotary_dim": 8,
    # Latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 16,
    "o_lora_rank": 16,
    "index_head_dim": 16,
    "index_n_heads": 16,  # of fewer, all are at zero for many keys, and which are chosen is open
    "index_topk": 8,
    # Feed-forward
    "intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "dense_intermediate_size": 96,
    "ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "ffn_hidden_size": 96,
    "dff": 96,
    "n_inner": 96,
    "dim_ff": 96,
    "feed_forward_size": 96,
    "block_multiple_of": 8,
    "laurel_rank": 8,
    # Experts
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 2,
    "num_expert_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "zero_expert_num": 4,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 3,
    "num_nextn_predict_layers": 0,
    # How far it sees
    "max_position_embeddings": CONTEXT_TOKENS,
    "n_positions": CONTEXT_TOKENS,
    "n_ctx": CONTEXT_TOKENS,
    "max_seq_len": CONTEXT_TOKENS,
    "seq_length": CONTEXT_TOKENS,
    "context_length": CONTEXT_TOKENS,
    "model_max_length": CONTEXT_TOKENS,
    "max_target_positions": CONTEXT_TOKENS,
    "sliding_window": WINDOW_TOKENS,
    "sliding_window_size": WINDOW_TOKENS,
    "attention_window_size": WINDOW_TOKENS,
    "window_size": WINDOW_TOKENS,
    "local_attention": WINDOW_TOKENS,
    "keep_window_size": WINDOW_TOKENS,
    "attention_chunk_size": CHUNK_TOKENS,
    "rel_extent": WINDOW_TOKENS,
    # Caps so low that they bend what comes
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 4.0,
    "logits_soft_cap": 4.0,
    # Recurrent and convolution layers
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_d_state": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_d_ssm": 128,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "ssm_state_size": 16,
    "state_size": 16,
    "lru_width": 64,
    # Ids
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}

NUM_LAYERS = 4
# Attention over latent vectors, whose keys have another size than values.
LATENT: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": None, "v_head_dim": 12}
LONGROPE: dict[str, Any] = {
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
    },
}

# What these need besides, by `model_type` and, where one is checked in several forms, a few words
# about the form. A value of None leaves a size out.
SPECIAL: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "bloom": {"seq_length": CONTEXT_TOKENS},
    "bert as a decoder": {"is_decoder": True},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "dots1": {"n_shared_experts": 1},
    "falcon alibi": {"alibi": True},
    "falcon new decoder": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma3n_text": {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * NUM_LAYERS},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "gpt2 scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "gpt_bigcode one head each": {"multi_query": False, "num_key_value_heads": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama yarn rope": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "longcat_flash": LATENT,
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "minicpm3": LATENT,
    "mistral no window": {"sliding_window": None},
    "mixtral no window": {"sliding_window": None},
    "phi3 longrope": LONGROPE | {"sliding_window": None},
    "phimoe no window": {"sliding_window": None},
    "qwen2 window": {"use_sliding_window": True, "max_window_layers": 2},
    "reformer": {"is_decoder": True},
    "starcoder2 no window": {"sliding_window": None},
    "xmod": {"default_language": "en_XX"},
    "youtu": LATENT,
}


def all_names() -> list[str]:
    """Every `model_type` of a causal language model, and the forms that some are checked in."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *SPECIAL})


def model_type_of(name: str) -> str:
    return name.partition(" ")[0]


def small_config(name: str) -> Any:
    """A configuration of the architecture in small. Raises what its own checks raise."""
    config_class = CONFIG_MAPPING[model_type_of(name)]
    known = config_class().to_dict()
    sizes = {field: size for field, size in SIZES.items() if field in known}
    for field in ("layer_types", "mlp_layer_types"):
        if kinds := known.get(field):  # each kind in turn, however rare it is in the large model
            in_turn = itertools.cycle(dict.fromkeys(kinds))
            sizes[field] = list(itertools.islice(in_turn, NUM_LAYERS))
    sizes |= SPECIAL.get(name, {})
    # No window is one of the sizes that a window can have; for others, None is the default.
    return config_class(
        **{
            field: size
            for field, size in sizes.items()
            if size is not None or field == "sliding_window"
        }
    )


@torch.no_grad()
def randomize(model: Any) -> None:
    """Gives a model weights under which each part of it changes tokens.

    Weights as they are initialised for training leave attention even, and logits near zero.
    """
    torch.manual_seed(0)
    embedding = model.get_input_embeddings().weight
    for weight in model.parameters():
        if weight is embedding:
            weight.normal_(std=1.0)
        elif weight.dim() >= 2:
            weight.normal_(std=1.5 / weight.shape[-1] ** 0.5)
        else:  # norms, biases, sinks
            weight.add_(torch.randn_like(weight) * 0.3)


def make_checkpoint(name: str, folder: str) -> None:
    config = small_config(name)
    with torch.device("meta"):
        num_parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    if num_parameters > MAX_PARAMETERS:
        raise ValueError(f"{num_parameters:,} parameters, however small its configuration")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model)
    model.save_pretrained(folder)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
        for length in PROMPT_LENGTHS
    ]


@dataclass
class Greedy:
    """A greedy continuation: its tokens, and each position's log probabilities (vocab,)."""

    token_ids: list[int]
    logprobs: torch.Tensor


@torch.no_grad()
def own_generate(model: Any, prompt: list[int], num_new_tokens: int) -> Greedy:
    """What the model itself generates for one prompt alone."""
    prompt_ids = torch.tensor([prompt])
    generated = model.generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        do_sample=False,
        max_new_tokens=num_new_tokens,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.cat(generated.logits).float()
    token_ids = generated.sequences[0, -len(logits) :].tolist()
    return Greedy(token_ids, torch.log_softmax(logits, dim=-1))


@torch.no_grad()
def agrees_with_forward(model: Any, prompt: list[int], greedy: Greedy) -> bool:
    """Whether a forward pass over all tokens at once gives what `generate` gave step by step."""
    input_ids = torch.tensor([[*prompt, *greedy.token_ids[:-1]]])
    try:
        logits = model(input_ids=input_ids, use_cache=False).logits[0, len(prompt) - 1 :].float()
    except Exception:  # of this the engine will tell
        return True
    return torch.allclose(torch.log_softmax(logits, dim=-1), greedy.logprobs, atol=TOLERANCE)


async def engine_generate(
    engine: Engine, prompts: list[list[int]], num_new_tokens: int
) -> list[Delta]:
    """What the engine generates for these prompts at the same time."""
    params = SamplingParams(
        max_new_tokens=num_new_tokens, temperature=0, ignore_eos=True, num_logprobs=NUM_TOP
    )

    async def answer(prompt: list[int]) -> Delta:
        request = engine.submit(prompt, params)
        (delta,) = [delta async for delta in engine.stream(request, timeout_seconds=120)]
        return delta

    return await asyncio.gather(*map(answer, prompts))


def difference(expected: Greedy, got: Delta) -> tuple[float, str]:
    """The largest difference of log probabilities while tokens were the same, and how the texts
    differ; "" if they do not. Tokens may differ where both are as likely, up to the tolerance;
    what follows is then another text, and is not compared."""
    largest = 0.0
    for step, (token_id, logprobs) in enumerate(zip(got.token_ids, got.logprobs, strict=True)):
        row = expected.logprobs[step]
        for each, logprob in [(logprobs.token_id, logprobs.logprob), *logprobs.top]:
            largest = max(largest, abs(row[each].item() - logprob))
        if not largest <= TOLERANCE:
            return largest, f"log probability off by {largest:.2g} at token {step + 1}"
        if token_id != expected.token_ids[step]:
            return largest, ""
    if len(got.token_ids) != len(expected.token_ids):
        return largest, f"{len(got.token_ids)} tokens instead of {len(expected.token_ids)}"
    return largest, ""


@dataclass
class Verdict:
    name: str
    class_name: str
    outcome: str  # right, refused, WRONG, left out
    reason: str
    largest: float = 0.0


class Warnings(logging.Handler):
    """The warnings of an engine while it is made."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger("engine").addHandler(self)
        return self.messages

    def __exit__(self, *_: object) -> None:
        logging.getLogger("engine").removeHandler(self)


def in_a_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def check(name: str, tokenizer: Any, arguments: argparse.Namespace) -> Verdict:
    class_name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type_of(name)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            make_checkpoint(name, folder)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        class_name = type(model).__name__
        model.generation_config = GenerationConfig()  # no end of text, nothing banned
        expected = [own_generate(model, prompt, arguments.new_tokens) for prompt in prompts()]
        if not all(each.logprobs.isfinite().any(-1).all() for each in expected):
            raise ValueError("its own logits are not finite")
    except Exception as error:
        logging.debug("%s", traceback.format_exc())
        reason = f"{type(error).__name__}: {in_a_line(error)}"
        return Verdict(name, class_name, "left out", reason)
    is_consistent = agrees_with_forward(model, prompts()[0], expected[0])
    try:
        with Warnings() as warned:
            engine = Engine(model, tokenizer, max_num_seqs=16, num_threads=1)
    except Exception as error:
        logging.debug("%s", traceback.format_exc())
        kind = "refused" if isinstance(error, ValueError) else "WRONG"
        return Verdict(name, class_name, kind, in_a_line(error))
    try:
        is_told = any("only for requests that run alone" in each for each in warned)
        verdict = compare(name, class_name, engine, expected, is_told)
    finally:
        engine.stop()
    if verdict.outcome == "WRONG" and not is_consistent:
        verdict.outcome = "left out"
        verdict.reason = "its own `generate` computes something else than its own forward pass"
    return verdict


def compare(
    name: str, class_name: str, engine: Engine, expected: list[Greedy], is_told: bool
) -> Verdict:
    """is_told: that the engine has said that a seed's text depends on other requests."""
    num_new_tokens = len(expected[0].token_ids)

    def generate(prompts: list[list[int]]) -> list[Delta]:
        return asyncio.run(engine_generate(engine, prompts, num_new_tokens))

    try:
        got = generate(prompts())
        is_same = got == [generate([prompt])[0] for prompt in prompts()]
    except (InferenceError, TimeoutError, ValueError) as error:
        cause = error.__cause__ or error
        reason = f"fails at a request: {type(cause).__name__}: {in_a_line(cause)}"
        return Verdict(name, class_name, "WRONG", reason)
    differences = [difference(mine, answer) for mine, answer in zip(expected, got, strict=True)]
    largest = max(each for each, _ in differences)
    wrong = [
        f"{length}-token prompt: {problem}"
        for length, (_, problem) in zip(PROMPT_LENGTHS, differences, strict=True)
        if problem
    ]
    if wrong:
        reason = f"{len(wrong)} of {len(got)} texts; {wrong[0]}"
        return Verdict(name, class_name, "WRONG", reason, largest)
    if not is_same and not is_told:
        reason = "other bits in other company, of which the engine has not warned"
        return Verdict(name, class_name, "WRONG", reason, largest)
    return Verdict(name, class_name, "right", "alone" if is_told else "", largest)


def write_page(verdicts: list[Verdict]) -> None:
    """Puts the verdicts into docs/models.md, in place of those that are there."""
    kept = PAGE.read_text().partition(MARK)[0]
    lines = [kept + MARK]
    for outcome, heading in HEADINGS.items():
        rows = [verdict for verdict in verdicts if verdict.outcome == outcome]
        if not rows:
            continue
        lines += ["", f"### {heading.format(len(rows))}", ""]
        if outcome == "right":
            lines += ["| `model_type` | class | seeds hold |", "|---|---|---|"]
            lines += [
                f"| {verdict.name} | `{verdict.class_name}` | {verdict.reason or 'in company'} |"
                for verdict in rows
            ]
        else:
            lines += ["| `model_type` | class | why |", "|---|---|---|"]
            lines += [
                f"| {verdict.name} | `{verdict.class_name}` | {brief(verdict)} |"
                for verdict in rows
            ]
    PAGE.write_text("\n".join([*lines, ""]))


def brief(verdict: Verdict) -> str:
    """The reason without what the table says beside it, or the page."""
    reason = verdict.reason.removeprefix(verdict.class_name).partition("; docs/models.md")[0]
    return reason.replace("|", "\\|").strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", help="as `model_type` in config.json; all if none is named"
    )
    parser.add_argument("--new-tokens", type=int, default=24, help="that follow each prompt")
    parser.add_argument("--write", action="store_true", help="write the table of docs/models.md")
    parser.add_argument("--verbose", action="store_true", help="show where an error came from")
    arguments = parser.parse_args()
    level = logging.DEBUG if arguments.verbose else logging.CRITICAL
    logging.basicConfig(level=level, format="%(message)s")
    logging.getLogger("engine").setLevel(logging.DEBUG if arguments.verbose else logging.WARNING)
    logging.getLogger("engine").propagate = arguments.verbose
    transformers_logging.set_verbosity(50)
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # of this thread, and of the engine's below
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "gpt2-tales")
    verdicts = []
    for name in arguments.names or all_names():
        started_seconds = time.monotonic()
        verdict = check(name, tokenizer, arguments)
        verdicts.append(verdict)
        seconds = time.monotonic() - started_seconds
        print(
            f"{verdict.outcome:9}{name:26}{verdict.class_name:38}{verdict.largest:8.1e} "
            f"{seconds:5.1f} s  {verdict.reason}",
            flush=True,
        )
    counts = Counter(verdict.outcome for verdict in verdicts)
    print(", ".join(f"{counts[outcome]} {outcome}" for outcome in HEADINGS))
    if arguments.write:
        write_page(verdicts)
    sys.exit(counts["WRONG"] > 0)


if __name__ == "__main__":
    main()
