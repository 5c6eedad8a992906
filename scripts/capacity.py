"""How many replicas a load needs, from what one replica was measured to do.

    python scripts/bench.py --model DIR --servers ours --env TORCH_NUM_THREADS=1 | tee bench.txt
    python scripts/capacity.py bench.txt --parameters 124e6 --requests-per-second 20

The model behind it, and what it leaves out, is in docs/scaling.md.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression
from typing import Any

BASE_BYTES = 700e6  # torch, transformers and Python, as measured
BYTES_PER_PARAMETER = 2  # bfloat16


@dataclass(frozen=True)
class StepTime:
    """How long one step takes that gives each of n sequences a token: fixed + n * each."""

    fixed_seconds: float  # reading the weights
    each_seconds: float  # computing, sampling and sending one more row

    def seconds(self, num_seqs: int) -> float:
        return self.fixed_seconds + num_seqs * self.each_seconds

    def most_seqs(self, inter_token_seconds: float) -> int:
        """The most sequences at which a token still comes within that time; 0: not even one."""
        return max(0, math.floor((inter_token_seconds - self.fixed_seconds) / self.each_seconds))

    def scaled(self, factor: float) -> "StepTime":
        """Of a model with factor times the parameters, on the same machine."""
        return StepTime(self.fixed_seconds * factor, self.each_seconds * factor)


@dataclass(frozen=True)
class Plan:
    num_seqs: int  # that run at once in each replica
    tokens_per_second: float  # of each replica, when that many run
    num_replicas: int
    memory_bytes: float  # of each replica


def fit(results: list[dict[str, Any]]) -> StepTime:
    """The line closest to the measured steps of `ours` (least squares)."""
    rows = [row for row in results if row["server"] == "ours"]
    points = [(row["concurrency"], row["concurrency"] / row["tokens_per_second"]) for row in rows]
    if len(points) < 2:
        sys.exit("The measurement needs at least two concurrencies of `ours`")
    each, fixed = linear_regression(*zip(*points, strict=True))
    return StepTime(fixed, each)


def plan(step: StepTime, args: argparse.Namespace, parameters: float) -> Plan | None:
    """None where a token takes longer than allowed even with one sequence."""
    num_seqs = min(args.max_num_seqs, step.most_seqs(args.inter_token_seconds))
    if num_seqs < 1:
        return None
    tokens_per_second = num_seqs / step.seconds(num_seqs)
    wanted = args.requests_per_second * args.new_tokens / args.utilisation
    kept_bytes = args.cache_bytes_per_token * args.context_tokens * num_seqs
    return Plan(
        num_seqs,
        tokens_per_second,
        math.ceil(wanted / tokens_per_second),
        BASE_BYTES + BYTES_PER_PARAMETER * parameters + kept_bytes,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bench", type=Path, help="what bench.py printed")
    parser.add_argument("--parameters", type=float, required=True, help="of the measured model")
    parser.add_argument("--for-parameters", type=float, help="of the model to plan for")
    parser.add_argument("--requests-per-second", type=float, required=True)
    parser.add_argument("--new-tokens", type=float, default=50, help="of a request, on average")
    parser.add_argument(
        "--context-tokens", type=float, default=128, help="prompt and text together"
    )
    parser.add_argument(
        "--inter-token-seconds", type=float, default=0.1, help="the longest that is acceptable"
    )
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument(
        "--cache-bytes-per-token",
        type=float,
        default=36_864,
        help="2 * layers * key heads * head size * 2; GPT-2: 2 * 12 * 768 * 2",
    )
    parser.add_argument(
        "--utilisation", type=float, default=0.7, help="the rest is for peaks and lost replicas"
    )
    args = parser.parse_args()
    step = fit(json.loads(args.bench.read_text().splitlines()[-1])["results"])
    parameters = args.for_parameters or args.parameters
    step = step.scaled(parameters / args.parameters)
    print(
        f"a step: {1000 * step.fixed_seconds:.1f} ms and {1000 * step.each_seconds:.2f} ms "
        "for each sequence"
    )
    if not (planned := plan(step, args, parameters)):
        sys.exit("No number of such replicas is fast enough: a token takes longer than allowed")
    print(f"sequences at once: {planned.num_seqs}")
    print(f"tokens per second and replica: {planned.tokens_per_second:.0f}")
    print(f"replicas: {planned.num_replicas}")
    print(f"memory of each: {planned.memory_bytes / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
