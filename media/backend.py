"""What a route knows of a model that makes sounds, pictures, videos or shapes."""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from backends.base import Client, Deadline, ForbiddenPrompt, InvalidField, holds_forbidden_word
from engine import TextFilter
from media.job import Job
from media.worker import Worker

DEFAULT_SECONDS = 10.0  # of a sound whose request names no length
# Fields that not every model takes.
MODELS_OWN = frozenset({"steps", "guidance", "size", "num_frames", "seconds", "grid_size"})


@dataclass(frozen=True)
class Bounds:
    """The most that a request may ask for, by field; of a size it is the longer side."""

    steps: int
    size: int
    seconds: float
    num_frames: int
    grid_size: int


class MediaBackend:
    """One model and the worker that it runs in. log_prompt: called with each prompt."""

    def __init__(
        self,
        name: str,
        worker: Worker,
        content_filter: TextFilter,
        bounds: Bounds,
        timeout_seconds: float,
        log_prompt: Callable[[str], None],
    ):
        self.name = name
        self.worker = worker
        self.content_filter = content_filter
        self.bounds = bounds
        self.timeout_seconds = timeout_seconds
        self.log_prompt = log_prompt

    def submit(
        self,
        prompt: str,
        fields: dict[str, Any],
        *,
        client: Client,
        field: str = "prompt",
        wants_steps: bool = False,
    ) -> Job:
        """A job in the queue. fields: those of models.py, None where they were left out, with the
        `media_type` that is wanted where there are several; field: what the prompt came in.

        Raises ForbiddenPrompt, InvalidField, MediaQueueFull, EngineStoppedError."""
        deadline = Deadline(time.monotonic(), self.timeout_seconds)
        self.log_prompt(prompt)
        if holds_forbidden_word(self.content_filter, prompt):
            raise ForbiddenPrompt(field)
        complete = self.complete(fields) | {"prompt": prompt}
        job = Job(self.name, complete, client, deadline, wants_steps)
        self.worker.submit(job)
        return job

    def complete(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields as the model is to have them: defaults filled in, within bounds. Raises
        InvalidField for one that it does not take, or that is out of bounds."""
        loaded = self.worker.loaded
        assert loaded
        asked = {name: value for name, value in fields.items() if value is not None}
        if unknown := asked.keys() & MODELS_OWN - loaded.takes:
            raise InvalidField(min(unknown), "the model takes none")
        if "size" in asked:
            asked["size"] = read_size(asked["size"], loaded.multiple)
        for name, bound in vars(self.bounds).items():
            if name in asked and largest(asked[name]) > bound:
                raise InvalidField(name, f"at most {bound:g} here")
        defaults = {"seconds": DEFAULT_SECONDS} | loaded.defaults
        for name in loaded.takes & defaults.keys() - asked.keys():
            asked[name] = lower(defaults[name], getattr(self.bounds, name, None), loaded.multiple)
        return {"seed": secrets.randbelow(2**32), **asked}


def read_size(size: str, multiple: int) -> tuple[int, int]:
    """Width and height. Raises InvalidField for sides that are no multiples."""
    width, height = map(int, size.split("x"))
    if width % multiple or height % multiple:
        raise InvalidField("size", f"this model takes multiples of {multiple}")
    return width, height


def largest(value: Any) -> float:
    return max(value) if isinstance(value, tuple) else value


def lower(default: Any, bound: float | None, multiple: int) -> Any:
    """A model's default, or the bound if that is less; of a size its sides are cut to multiples."""
    if bound is None or largest(default) <= bound:
        return default
    if isinstance(default, tuple):
        return tuple(min(side, int(bound) // multiple * multiple) for side in default)
    return type(default)(bound)
