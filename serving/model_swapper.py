"""Brings models into memory that are asked for, in place of others."""

import queue
import threading
import time
from collections.abc import Callable, Iterable
from logging import getLogger

import torch

from backends.local import LocalBackend

logger = getLogger("service")

RELOAD_PAUSE_SECONDS = 5.0  # after a model could not be swapped in


class ModelSwapper:
    """Loads a model that is needed in place of an idle one, or if none is idle of the one that
    was asked for least recently, which first answers what came before.

    Requests wait meanwhile in their engine's queue, under its limit and their own deadlines.
    """

    def __init__(self) -> None:
        self.needed: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # names; None: stop
        self.loading: str | None = None
        self.max_loaded: int | None = None  # None: all of them
        self.backends: dict[str, LocalBackend] = {}
        self.reload: Callable[[LocalBackend], None]
        self.thread: threading.Thread | None = None
        self.retry_at_seconds: dict[str, float] = {}  # of models that could not be loaded

    def take_charge(
        self,
        backends: Iterable[LocalBackend],
        max_loaded: int | None,
        reload: Callable[[LocalBackend], None],
    ) -> None:
        """Keeps so many of these models in memory. reload: brings one back, or raises."""
        self.backends = {backend.name: backend for backend in backends}
        self.max_loaded, self.reload = max_loaded, reload
        self.start()

    @property
    def loaded(self) -> list[LocalBackend]:
        """Those in memory."""
        return [backend for backend in self.backends.values() if backend.is_loaded]

    def start(self) -> None:
        """Begins to swap, or does so again after `stop`, if there is anything to swap."""
        if self.max_loaded and not (self.thread and self.thread.is_alive()):
            self.thread = threading.Thread(target=self._run, name="swap", daemon=True)
            self.thread.start()

    def stop(self) -> None:
        """Waits for a load under way: a process that ends in the middle of one crashes."""
        if self.thread and self.thread.is_alive():
            self.needed.put(None)
            self.thread.join()

    def _run(self) -> None:
        # This thread computes alone; `engine.threads.computing_thread` tells why.
        torch.set_num_threads(1)
        while name := self.needed.get():
            self.loading = name
            self._swap_in(self.backends[name])
            self.loading = None

    def _swap_in(self, needed: LocalBackend) -> None:
        if needed.is_loaded or not needed.num_waiting:
            return  # it was swapped in for another request, or nobody waits any more
        if time.monotonic() < self.retry_at_seconds.get(needed.name, 0):
            needed.engine.fail_waiting()  # trying again would cost another model its place
            return
        try:
            while self.max_loaded and len(self.loaded) >= self.max_loaded:
                oldest = min(self.loaded, key=last_use)
                oldest.unload()
                logger.info("unloaded %s", oldest.name)
            if needed.num_waiting:  # they may have left meanwhile
                self.reload(needed)
        except Exception:
            logger.exception("cannot load %s", needed.name)
            needed.generator.model = None
            self.retry_at_seconds[needed.name] = time.monotonic() + RELOAD_PAUSE_SECONDS
            needed.engine.fail_waiting()


def last_use(backend: LocalBackend) -> tuple[bool, int]:
    """Lowest for the model that can best be done without."""
    is_busy = backend.num_running + backend.num_waiting > 0
    return is_busy, backend.engine.last_request_id
