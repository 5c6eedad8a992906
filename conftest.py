"""What every test needs before it is imported."""

import logging
import os
from functools import cache
from pathlib import Path

import httpx
import httpx._transports.default as httpx_transports

os.environ["MODEL_NAME"] = str(Path(__file__).parent / "gpt2-tales")
# As main.py has it, which tests import after torch.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
if "PYTEST_XDIST_WORKER" in os.environ:  # `make test`: there is another one beside this
    os.environ.setdefault("TORCH_NUM_THREADS", "1")
# Else each client reads all certificates of the system, which takes longer than most requests.
vars(httpx_transports).update(create_ssl_context=cache(httpx.create_ssl_context))


def pytest_runtest_teardown() -> None:
    """What a test has logged is shown with it: a thread writes it, somewhat later."""
    for handler in logging.getLogger("service").handlers:
        handler.flush()
