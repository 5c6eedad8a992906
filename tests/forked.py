"""Python processes of their own that have imported the service's libraries before they begin.

To import them takes most of the time of a start. So one process of each test run imports them, and
the others are forked from it: environment, folder, signals, output and end are their own, and so is
all that `main.py` does. What the libraries themselves read from the environment is not.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MOST_SECONDS = 300
READ_BY_LIBRARIES = ("HF_", "ATEN_", "ONEDNN_", "OMP_", "GOMP_")  # when they are imported

# Elsewhere what libraries do when they are imported may not be forked.
IS_LINUX = sys.platform == "linux"
_context = multiprocessing.get_context("forkserver" if IS_LINUX else "spawn")
LIBRARIES = ["uvicorn.main", "fastapi_offline", "transformers.pipelines.text_generation"]
ROOMS = ["serving.registry", "serving.routes", "serving.openai.routes"]
_context.set_forkserver_preload([*LIBRARIES, *ROOMS, "fastapi.testclient"])


def can_fork(environment: dict[str, str]) -> bool:
    """Whether a process with such changes of the environment may be forked."""
    return IS_LINUX and not any(name.startswith(READ_BY_LIBRARIES) for name in environment)


def _begin(
    arguments: list[str], environment: dict[str, str], stdout: Connection, stderr: Connection | None
) -> None:
    """What Python does with these arguments: `-m` and a module, `-c` and code, or a script."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    os.dup2(stdout.fileno(), 1)
    if stderr:
        os.dup2(stderr.fileno(), 2)
    option, what, *rest = arguments if arguments[0].startswith("-") else ("", *arguments)
    sys.argv = [option if option == "-c" else what, *rest]
    try:
        if option == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        elif option == "-c":
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(what, run_name="__main__")
    finally:
        atexit._run_exitfuncs()


class Forked:
    """As `subprocess.Popen` of this Python with these arguments, text in its pipes."""

    def __init__(
        self, arguments: list[str], env: dict[str, str], pipes_stderr: bool = False
    ) -> None:
        self.args = arguments
        self.stdout, write_end = self._pipe()
        self.stderr, error_end = self._pipe() if pipes_stderr else (None, None)
        self.process = _context.Process(target=_begin, args=(arguments, env, write_end, error_end))
        self.process.start()
        for end in (write_end, error_end):
            if end:
                end.close()

    @staticmethod
    def _pipe() -> tuple[Any, Connection]:
        read_end, write_end = _context.Pipe(duplex=False)
        with read_end:
            return os.fdopen(os.dup(read_end.fileno()), encoding="utf-8"), write_end

    @property
    def pid(self) -> int:
        assert self.process.pid
        return self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` of this Python, with what it writes; the environment is added to. What
    does not end is ended."""
    if not can_fork(environment):
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=MOST_SECONDS,
        )
    process = Forked(list(arguments), os.environ | environment, pipes_stderr=True)
    too_late = threading.Timer(MOST_SECONDS, process.kill)
    too_late.start()
    with ThreadPoolExecutor(2) as pool, process.stdout, process.stderr:
        stdout, stderr = pool.map(lambda pipe: pipe.read(), (process.stdout, process.stderr))
    too_late.cancel()
    return subprocess.CompletedProcess(list(arguments), process.wait(), stdout, stderr)
