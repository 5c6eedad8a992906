"""What clients of other servers send to `/v1`, and where it changes nothing here.

A field that no schema in models.py knows is refused: whoever sends one expects something of it. But
a client that sends all fields of another server mostly sends the values that ask for nothing.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic_core import PydanticCustomError

# What OpenAI, vLLM, llama.cpp, text-generation-webui and their clients (LangChain, LiteLLM,
# Open WebUI, SillyTavern, mikupad) send, and the values at which it changes nothing here, or
# ANYTHING. All else is refused. The first refused field of this table is named.
ANYTHING = object()
NEUTRAL_VALUES: dict[str, Any] = {
    # OpenAI
    **dict.fromkeys(
        ["user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
         "prompt_cache_retention", "reasoning_effort"],
        ANYTHING,
    ),
    "suffix": [""], "verbosity": ["medium"],
    "tools": [[]], "tool_choice": ["none", "auto"], "parallel_tool_calls": [True, False],
    "functions": [[]], "function_call": ["none", "auto"],
    "modalities": [["text"]], "audio": [], "prediction": [], "web_search_options": [],
    # vLLM
    **dict.fromkeys(["request_id", "include_reasoning", "guided_decoding_backend"],
                    ANYTHING),
    "use_beam_search": [False], "length_penalty": ANYTHING, "early_stopping": [False],
    "priority": [0], "bad_words": [[]], "allowed_token_ids": [], "truncate_prompt_tokens": [],
    "skip_special_tokens": [True], "spaces_between_special_tokens": [True],
    "return_tokens_as_token_ids": [False],
    "logits_processors": [[]], "prompt_embeds": [], "kv_transfer_params": [], "vllm_xargs": [{}],
    "guided_json": [], "guided_regex": [], "guided_choice": [],
    "guided_grammar": [""], "guided_whitespace_pattern": [], "echo": [False], "best_of": [1],
    "add_generation_prompt": [True], "continue_final_message": [False], "documents": [[]],
    "chat_template": [], "chat_template_kwargs": [{}], "mm_processor_kwargs": [{}],
    # llama.cpp
    **dict.fromkeys(["cache_prompt", "id_slot", "n_keep", "xtc_threshold", "dynatemp_exponent",
                     "dry_base", "penalize_nl", "dry_allowed_length", "dry_penalty_last_n",
                     "dry_sequence_breakers", "mirostat_tau", "mirostat_eta"], ANYTHING),
    "typical_p": [1], "tfs_z": [1], "top_n_sigma": [0, -1], "xtc_probability": [0],
    "dry_multiplier": [0], "dynatemp_range": [0], "mirostat": [0], "min_keep": [0],
    "grammar": [""], "json_schema": [{}], "lora": [[]], "n_indent": [0],
    "timings_per_token": [False], "return_progress": [False], "return_tokens": [False],
    "post_sampling_probs": [False],
    # text-generation-webui, and what SillyTavern and mikupad send to all servers of its kind
    **dict.fromkeys(["api_type", "api_server", "legacy_api", "truncation_length", "num_ctx",
                     "max_context_length", "smoothing_curve",
                     "adaptive_decay", "speculative_ngram", "negative_prompt"], ANYTHING),
    "typical": [1], "tfs": [1], "top_a": [0], "skew": [0], "epsilon_cutoff": [0],
    "eta_cutoff": [0], "nsigma": [0], "mirostat_mode": [0], "smoothing_factor": [0],
    "dynamic_temperature": [False], "guidance_scale": [1], "penalty_alpha": [0],
    "encoder_repetition_penalty": [1], "no_repeat_ngram_size": [0], "num_beams": [1],
    "min_length": [0], "max_tokens_second": [0], "add_bos_token": [True],
    "banned_tokens": ["", []], "banned_strings": [[]], "custom_token_bans": ["", []],
    "grammar_string": [""], "do_sample": [True], "rep_pen_slope": [1], "repetition_decay": [0],
    "trim_stop": [True], "adaptive_target": [-0.01, -1],
    # Open WebUI and other chat clients
    **dict.fromkeys(["chat_id", "session_id", "message_id", "parent_id", "conversation_id", "id",
                     "features", "variables", "background_tasks", "model_item"], ANYTHING),
    "files": [[]], "tool_ids": [[]], "tool_servers": [[]], "params": [{}], "filter_ids": [[]],
}  # fmt: skip
# What changes nothing, whatever it says, while another field has this value.
NEUTRAL_WHILE = {
    "do_sample": ("temperature", 0), "rep_pen_slope": ("repetition_penalty", 1),
    "repetition_decay": ("repetition_penalty", 1),
}  # fmt: skip
# In which order samplers follow on each other: in the fields of llama.cpp, text-generation-webui
# and KoboldCpp. Those that are not among these letters are off.
MAX_SAMPLERS = 100
ORDERS_OF_SAMPLERS = ("samplers", "sampler_priority", "sampler_order")
SAMPLER_LETTERS = {
    **dict.fromkeys(["penalties", "repetition_penalty", "presence_penalty", "frequency_penalty", 6],
                    "r"),
    "temperature": "t", 5: "t", "top_k": "k", 0: "k", "top_p": "p", 2: "p", "min_p": "m",
}  # fmt: skip
TEMPERATURE_FIRST, TEMPERATURE_LAST = re.compile("r*tkpm?"), re.compile("r*kpm?t")
# Other names of fields. Some clients send one thing under several, to be understood everywhere.
OTHER_NAMES = {
    "max_new_tokens": "max_tokens", "n_predict": "max_tokens", "num_predict": "max_tokens",
    "rep_pen": "repetition_penalty", "repeat_penalty": "repetition_penalty",
    "rep_pen_range": "repetition_penalty_range", "repeat_last_n": "repetition_penalty_range",
    "sampler_seed": "seed", "stopping_strings": "stop", "stop_sequence": "stop",
    "ban_eos_token": "ignore_eos", "n_probs": "logprobs",
}  # fmt: skip
# The same as NEUTRAL_VALUES of a message in a conversation.
NEUTRAL_MESSAGE_VALUES: dict[str, Any] = {
    **dict.fromkeys(["id", "metadata", "timestamp", "reasoning", "reasoning_content"], ANYTHING),
    "annotations": [[]], "tool_calls": [[]], "files": [[]], "images": [[]],
    "refusal": [""], "function_call": [], "audio": [], "tool_call_id": [], "prefix": [False],
}  # fmt: skip
# The same of OpenAI's pictures and speech.
NEUTRAL_IMAGE_VALUES: dict[str, Any] = {
    "user": ANYTHING, "response_format": ["b64_json"], "output_format": ["png"],
    "output_compression": [100], "quality": ["auto", "standard"], "style": [],
    "background": ["auto", "opaque"], "moderation": ["auto"], "partial_images": [0],
    "stream": [False],
}  # fmt: skip
NEUTRAL_SPEECH_VALUES: dict[str, Any] = {
    "user": ANYTHING, "speed": [1], "instructions": [""], "stream_format": ["audio"],
    "voice": ["alloy", "default"],
}  # fmt: skip


def unsupported(field: str, values: list[Any]) -> PydanticCustomError:
    taken = " or ".join(json.dumps(value) for value in values)
    reason = f"not supported but as {taken}" if values else "not supported"
    if field.startswith("guided_"):  # as vLLM called them before its version 0.12
        reason = f"not supported: it is {field.removeprefix('guided_')} of structured_outputs now"
    return PydanticCustomError("unsupported", reason, {"param": field})


def drop_neutral(
    fields: dict[str, Any], known: Mapping[str, Any], neutral: Mapping[str, Any]
) -> dict[str, Any]:
    """Those that are known, or that nobody knows; without what changes nothing. Raises for the
    first of `neutral` that would change something."""
    for name in neutral:
        if fields.get(name) is None or name in known or neutral[name] is ANYTHING:
            continue
        other, value = NEUTRAL_WHILE.get(name, (None, None))
        if fields[name] not in neutral[name] and not (other and fields.get(other, 1) == value):
            raise unsupported(name, neutral[name])
    return {
        name: value
        for name, value in sorted(fields.items())  # so that of unknown ones the same is named
        if name not in neutral or (name in known and neutral[name] is not ANYTHING)
    }


def under_known_names(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields under the names that the schemas have for them. Raises where two names of one
    field have two values."""
    fields = dict(fields)
    for name in OTHER_NAMES:
        if name not in fields:
            continue
        value = fields.pop(name)
        if fields.setdefault(OTHER_NAMES[name], value) != value:
            reason = f"must be the same as {OTHER_NAMES[name]}, of which it is another name"
            raise PydanticCustomError("two_values", reason, {"param": name})
    return fields


def with_order_of_samplers(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with `temperature_last` in place of orders of samplers. Raises for an order that
    cannot be kept."""
    fields = dict(fields)
    for name in ORDERS_OF_SAMPLERS:
        order = fields.pop(name, None)
        if not order:
            continue
        is_list = isinstance(order, list) and len(order) <= MAX_SAMPLERS
        known = [each for each in order if isinstance(each, int | str)] if is_list else []
        letters = "".join(SAMPLER_LETTERS.get(each, "") for each in known)
        if TEMPERATURE_LAST.fullmatch(letters):
            fields["temperature_last"] = True
        elif not TEMPERATURE_FIRST.fullmatch(letters):
            reason = (
                "not supported but with penalties first, then top_k, top_p and min_p, and "
                "temperature before or after these three"
            )
            raise PydanticCustomError("unsupported", reason, {"param": name})
    return fields
