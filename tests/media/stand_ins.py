"""Makers that make nothing, for tests of what is around them: they need none of the libraries, and
do what the prompt says."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from media.messages import Loaded, Made, OnStep, RefusedFields

STEP_SECONDS = 0.02


class StandIn:
    """marks: a folder in which each step leaves a file, so that a test sees what is being done."""

    def __init__(self, marks: Path):
        self.marks = marks
        self.loaded = Loaded(frozenset({"steps"}), {"steps": 3})

    def make(self, fields: dict[str, Any], on_step: OnStep) -> Made:
        """The prompt in capitals."""
        of = fields["steps"]
        for step in range(1, of + 1):
            time.sleep(STEP_SECONDS)
            (self.marks / f"{fields['prompt']}-{step}").touch()
            self.act(fields["prompt"])
            on_step(step, of, lambda: b"a preview")
        return Made(fields["prompt"].upper().encode(), "text/plain")

    def act(self, prompt: str) -> None:
        if prompt == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt == "hang":
            time.sleep(600)
        if prompt == "lack memory":
            raise MemoryError
        if prompt == "fail":
            raise RuntimeError("injected")
        if prompt == "refuse":
            raise RefusedFields("it takes no such thing")


class Unloadable:
    def __init__(self, marks: Path):
        raise OSError("no such model\nin this folder")


class DiesLoading:
    def __init__(self, marks: Path):
        os._exit(3)
