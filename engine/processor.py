"""What the processor computes with: its instruction set, and the precision that it is fast in."""

import os
import platform

import torch

# From least to most; below, the values of ONEDNN_MAX_CPU_ISA that allow no more than these.
INSTRUCTION_SETS = ("sse41", "avx", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")
_ONEDNN_LIMITS = {
    "SSE41": "sse41",
    "AVX": "avx",
    "AVX2": "avx2",
    "AVX2_VNNI": "avx2",
    "AVX2_VNNI_2": "avx2",
    "AVX512_CORE": "avx512",
    "AVX512_CORE_VNNI": "avx512_vnni",
    "AVX512_CORE_BF16": "avx512_bf16",
    "AVX512_CORE_FP16": "avx512_bf16",
}


def instruction_set() -> str:
    """The one that matrix kernels use: of INSTRUCTION_SETS on x86, else the processor's family.

    ONEDNN_MAX_CPU_ISA, which tells oneDNN to use no more than so much, counts here too
    (https://uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html).
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability().lower()}"
    has = {
        "amx": torch.cpu._is_amx_tile_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "avx512_vnni": torch.cpu._is_avx512_supported() and torch.cpu._is_vnni_supported(),
        "avx512": torch.cpu._is_avx512_supported(),
        "avx2": torch.cpu._is_avx2_supported(),
    }
    best = next((name for name, is_supported in has.items() if is_supported), "sse41")
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    limit = _ONEDNN_LIMITS.get(allowed.upper(), best)
    return min(best, limit, key=INSTRUCTION_SETS.index)


def has_onednn() -> bool:
    """Whether torch has oneDNN, and it is not switched off."""
    return torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()


def native_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """bfloat16 where the device computes in it natively, else float32."""
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if torch.device(device).type == "cpu" and has_onednn():
        is_native = instruction_set() in ("avx512_bf16", "amx")
        return torch.bfloat16 if is_native else torch.float32
    return torch.float32
