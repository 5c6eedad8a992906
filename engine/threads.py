"""The cores that the process may use, and the threads in which engines work."""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from transformers import PreTrainedModel

# A model with fewer weights is computed in one thread: two would wait for each other at each of its
# short products, above all where the event loop needs one of the cores (docs/performance.md).
SMALL_MODEL_WEIGHTS = 20_000_000


def available_cores(control_group: Path = Path("/sys/fs/cgroup")) -> int:
    """The cores this process may use: at least 1: affinity, cut by its group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = math.inf
    v2, v1 = control_group / "cpu.max", control_group / "cpu" / "cpu.cfs_quota_us"
    try:
        if v2.exists():
            limit, period = v2.read_text().split()
            quota = math.inf if limit == "max" else int(limit) / int(period)
        elif v1.exists() and (limit_us := int(v1.read_text())) > 0:
            quota = limit_us / int(v1.with_name("cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        pass  # an unreadable quota is no quota
    return max(1, math.ceil(min(cores or 1, quota)))


def useful_threads(model: PreTrainedModel) -> int:
    """How many threads compute a model the fastest on a CPU, while it is served."""
    is_small = sum(weight.numel() for weight in model.parameters()) < SMALL_MODEL_WEIGHTS
    return 1 if is_small else available_cores()


@cache
def computing_thread() -> ThreadPoolExecutor:
    """The thread in which engines compute, in which `use_threads` gives it others to help it.

    OpenMP keeps a pool of threads for each thread that computes in parallel. Once there are more
    of them than cores they stop spinning, and a one-row step takes 1.5 times as long. So all
    engines share one thread, and threads that load models compute alone.
    """
    return ThreadPoolExecutor(1, "engine")


def use_threads(num_threads: int) -> None:
    """Lets the calling thread compute with num_threads - 1 others."""
    if torch.get_num_threads() != num_threads:
        torch.set_num_threads(num_threads)


@cache
def mask_thread() -> ThreadPoolExecutor:
    """The thread in which masks of tokens are found while the computing thread computes."""
    return ThreadPoolExecutor(1, "masks")
