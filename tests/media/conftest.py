"""The server that tests marked `media` share: all kinds, by tiny models, behind a key."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support import ROOT, Served, served


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of each kind."""
    folder = tmp_path_factory.mktemp("tiny")
    script = ROOT / "scripts" / "make_tiny_media.py"
    subprocess.run([sys.executable, script, folder], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def service(tiny: Path) -> Iterator[Served]:
    models = {"AUDIO_MODEL": "audio", "IMAGE_MODEL": "image", "VIDEO_MODEL": "video"}
    settings = {name: str(tiny / kind) for name, kind in models.items()}
    settings |= {"SHAPE_MODEL": str(tiny / "3d"), "USAGE_LOG": str(tiny / "usage.csv")}
    with served(ready_seconds=300, API_KEYS="secret", **settings) as service:
        yield service


@pytest.fixture(scope="session")
def http(service: Served) -> Iterator[httpx.Client]:
    """A client with the key."""
    with service.client(Authorization="Bearer secret") as client:
        yield client
