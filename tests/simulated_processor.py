"""The service on another processor than this one, as far as that can be asked for.

    ONEDNN_MAX_CPU_ISA=AVX2 PYTHONPATH=. python tests/simulated_processor.py

--one-core leaves the process one core, --without-onednn switches oneDNN off. It starts the
service, answers requests, and prints what came of them: the last line is one JSON object, which
`test_processors.py` judges.
"""

import argparse
import asyncio
import json
import os
import sys
from typing import Any

parser = argparse.ArgumentParser()
parser.add_argument("--one-core", action="store_true")
parser.add_argument("--without-onednn", action="store_true")
arguments = parser.parse_args()
if arguments.one_core:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import httpx
import torch
from transformers import AutoModelForCausalLM

if arguments.without_onednn:
    torch._C._set_mkldnn_enabled(False)

import main
from engine import Delta, Engine, SamplingParams, instruction_set
from engine.kernels import Kernel
from serving.model_sources import BUNDLED_MODEL

SEEDED = {"prompt": "A fox", "seed": 1, "max_new_tokens": 20}
GREEDY = {  # prompt: new tokens; they run together, and leave one after another
    "The": 20,
    "Once upon a time there was a king who": 7,
    "She said to him: " * 12: 12,
}


async def seeded_texts() -> dict[str, str]:
    """What one seed gives alone, alone once more, and among 16 other requests."""
    transport = httpx.ASGITransport(app=main.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://simulated") as client:

        async def text(**body: Any) -> str:
            answer = await client.post("/generate", json=body)
            return answer.raise_for_status().json()["generated_text"]

        alone, again = await text(**SEEDED), await text(**SEEDED)
        others = [
            text(prompt="In the wood " * (1 + i % 5), max_new_tokens=5 + i) for i in range(16)
        ]
        texts = await asyncio.gather(*others[:8], text(**SEEDED), *others[8:])
    return {"alone": alone, "again": again, "among_others": texts[8]}


def deltas_of_a_beginning() -> list[tuple[int, Delta]]:
    """What the served engine says to a prompt that begins as one before did, and to the same prompt
    when nothing of it is known; each with how many of its tokens were known."""
    prompt = [1 + i * 31 % 8000 for i in range(500)]
    params = SamplingParams(max_new_tokens=6, temperature=0, num_logprobs=1)

    async def complete(token_ids: list[int], salt: str) -> tuple[int, Delta]:
        with main.engine.place("") as place:
            read = main.engine.read_prompt(token_ids)
            options = {"place": place, "cache_salt": (salt,)}
            (request,) = main.engine.submit_all([read], params, **options)
        (delta,) = [delta async for delta in main.engine.stream(request)]
        return request.num_cached_tokens, delta

    async def complete_all() -> list[tuple[int, Delta]]:
        await complete(prompt, "a")
        return [await complete([*prompt[:485], 7, 8, 9], salt) for salt in "ab"]

    return asyncio.run(complete_all())


def greedy_deltas(engine: Engine) -> tuple[list[Delta], list[Delta]]:
    """What the engine says to one prompt after another, and to all of them together."""

    async def complete(prompt: str, num_tokens: int) -> Delta:
        params = SamplingParams(max_new_tokens=num_tokens, temperature=0, num_logprobs=1)
        request = engine.submit(engine.tokenizer(prompt)["input_ids"], params)
        (delta,) = [delta async for delta in engine.stream(request)]
        return delta

    async def complete_all() -> tuple[list[Delta], list[Delta]]:
        alone = [await complete(*each) for each in GREEDY.items()]
        return alone, await asyncio.gather(*(complete(*each) for each in GREEDY.items()))

    return asyncio.run(complete_all())


def generated_token_ids(model: Any, tokenizer: Any) -> list[list[int]]:
    """What transformers generates, for one prompt after another."""
    outputs = []
    for prompt, num_tokens in GREEDY.items():
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(
            **inputs, do_sample=False, max_new_tokens=num_tokens, pad_token_id=0
        )
        outputs.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return outputs


def adversarial_sum(kernel: Kernel) -> float:
    """63 as an int8 layer computes it from values that are as large as can be: pairs of their
    8-bit products exceed 16 bits."""
    assert kernel.pack
    x = torch.ones(3, 64)
    x[:, 0] = 0
    return kernel.pack(torch.ones(8, 64), None, False)(x)[0, 0].item()


def load() -> Any:
    return AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)


served = main.engine
float32_engine = Engine(load(), served.tokenizer, num_threads=1)
alone, together = greedy_deltas(float32_engine)
(num_cached_tokens, hit), (_, missed) = deltas_of_a_beginning()
about = {
    "dtype": str(served.model.dtype),
    "kernel": served.kernel.name,
    "instruction_set": instruction_set(),
    "seeded": asyncio.run(seeded_texts()),
    "float32_kernel": float32_engine.kernel.name,
    "greedy": [delta.token_ids for delta in together],
    "generated": generated_token_ids(load().eval(), served.tokenizer),
    "is_same_bits_alone": alone == together,
    "num_cached_tokens": num_cached_tokens,
    "is_same_bits_cached": hit == missed,
    "adversarial_sum": adversarial_sum(served.kernel) if served.kernel.name[:4] == "int8" else None,
}
print(json.dumps(about), file=sys.stderr)  # the log goes to standard output, in its own time
