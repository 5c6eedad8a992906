"""What clients have taken of their limits: counted in this process, or in Redis (redis_counts.py).

Windows are fixed: one begins with a key's first count, and ends a minute later.
"""

import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

WINDOW_SECONDS = 60
MAX_WINDOWS = 100_000  # in memory, about 30 MB; one more drops the oldest


class StorageError(Exception):
    """The storage of the counts cannot be asked."""


class Count(NamedTuple):
    """How a key stands."""

    is_within: bool  # whether what was to be added is counted
    amount: int  # in the window, with what was added
    left_seconds: float  # until the window ends
    window: str  # its name; empty: none has begun


class Counts(ABC):
    @abstractmethod
    async def add(self, key: str, amount: int, limit: int) -> Count:
        """Counts amount unless the window's count would pass limit; 0 only looks. Raises
        StorageError."""

    @abstractmethod
    async def give_back(self, key: str, amount: int, window: str) -> None:
        """Takes amount back, and nothing once that window has ended. Negative: it was more than
        had been counted. Raises StorageError."""


@dataclass(slots=True)
class Window:
    amount: int
    began_seconds: float  # on time.monotonic: a clock that is set back makes no window longer
    name: str

    def left_seconds(self, now_seconds: float) -> float:
        return WINDOW_SECONDS - (now_seconds - self.began_seconds)


class MemoryCounts(Counts):
    """Counts of this process. No call takes longer for the number of keys."""

    def __init__(self) -> None:
        # All windows are equally long, so the first one ends first. A plain dict would walk past
        # all that were taken out at its front.
        self._windows: OrderedDict[str, Window] = OrderedDict()
        self._num_begun = 0

    def __len__(self) -> int:
        return len(self._windows)

    async def add(self, key: str, amount: int, limit: int) -> Count:
        now_seconds = time.monotonic()
        window = self._window(key, now_seconds)
        is_within = (window.amount if window else 0) + amount <= limit
        if not window:
            if not (amount and is_within):
                return Count(is_within, 0, WINDOW_SECONDS, "")
            window = self._begin(key, now_seconds)
        if is_within:
            window.amount += amount
        return Count(is_within, window.amount, window.left_seconds(now_seconds), window.name)

    async def give_back(self, key: str, amount: int, window: str) -> None:
        counted = self._window(key, time.monotonic())
        if counted and counted.name == window:
            counted.amount -= amount

    def _window(self, key: str, now_seconds: float) -> Window | None:
        window = self._windows.get(key)
        if window and window.left_seconds(now_seconds) <= 0:
            del self._windows[key]
            return None
        return window

    def _begin(self, key: str, now_seconds: float) -> Window:
        """A new window. Two go for it that have ended, or the oldest where there is no room."""
        for _ in range(2):
            oldest = next(iter(self._windows.values()), None)
            is_full = len(self._windows) >= MAX_WINDOWS
            if oldest and (is_full or oldest.left_seconds(now_seconds) <= 0):
                self._windows.popitem(last=False)
        self._num_begun += 1
        window = Window(0, now_seconds, str(self._num_begun))
        self._windows[key] = window
        return window
