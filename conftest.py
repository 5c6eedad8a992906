"""What every test needs before it is imported."""

import os
from pathlib import Path

os.environ.setdefault("MODEL_NAME", str(Path(__file__).parent / "gpt2-tales"))

import main  # noqa: F401  before torch, which reads once what this sets
