"""The cores that the process may use, and the threads in which engines work."""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch


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


@cache
def computing_thread(num_threads: int) -> ThreadPoolExecutor:
    """The thread in which engines compute, with num_threads - 1 others that help it.

    OpenMP keeps a pool of threads for each thread that computes in parallel. Once there are more
    of them than cores they stop spinning, and a one-row step takes 1.5 times as long. So all
    engines share one thread, and threads that load models compute alone.
    """
    return ThreadPoolExecutor(1, "engine", torch.set_num_threads, (num_threads,))


@cache
def mask_thread() -> ThreadPoolExecutor:
    """The thread in which masks of tokens are found while the computing thread computes."""
    return ThreadPoolExecutor(1, "masks")
