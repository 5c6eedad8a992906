"""What a worker and its process say to each other."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

# Worker to process


@dataclass(frozen=True)
class Order:
    """To make one thing. fields: as `Maker.make` takes them."""

    number: int
    fields: dict[str, Any]
    wants_steps: bool  # whether somebody is to be told of each


@dataclass(frozen=True)
class Cancel:
    """Nobody wants what that order is for any more."""

    number: int


# Process to worker


@dataclass(frozen=True)
class Loaded:
    """The model is there. takes: the fields that it knows; defaults: of some that may be left out;
    multiple: of how many pixels the sides of its pictures are."""

    takes: frozenset[str]
    defaults: dict[str, Any] = field(default_factory=dict)
    multiple: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class Unloadable:
    """The model cannot be loaded; the process ends."""

    reason: str


@dataclass(frozen=True)
class Step:
    """So many steps of an order are done. of: how many there will be at most, where that is known;
    preview: a JPEG."""

    step: int
    of: int | None
    preview: bytes | None = None


@dataclass(frozen=True)
class Made:
    """What was ordered."""

    content: bytes
    media_type: str


@dataclass(frozen=True)
class Failed:
    """Why an order came to nothing. is_refused: the model takes no such fields; log: what only
    the service's log may tell."""

    reason: str
    log: str = ""
    is_refused: bool = False


@dataclass(frozen=True)
class Cancelled:
    """The answer to Cancel, unless it came too late."""


# Within the process


class OnStep(Protocol):
    """To be called after each step: takes how many are done, of how many, and what makes a
    preview. Raises what ends the order when nobody wants it any more."""

    def __call__(
        self, step: int, of: int | None, preview: Callable[[], bytes | None] | None = None
    ) -> None: ...


class Maker(Protocol):
    """A loaded model; made of `options`, as `serve` in process.py says."""

    loaded: Loaded

    def make(self, fields: dict[str, Any], on_step: OnStep) -> Made:
        """What is ordered. fields: `prompt`, `seed`, and those of `Loaded.takes` that were asked
        for. Raises RefusedFields."""


class RefusedFields(Exception):
    """The model does not take the fields as they are; the message says why, without a value."""
