"""What an answer says of the service itself."""

import pytest

import main
from serving.openai import responses


def test_fingerprint_tells_kernels_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """It held `auto`, whatever that had come to: int8 on one processor, bfloat16 on another."""
    backend, settings = main.registry.default, main.settings
    here = responses.system_fingerprint(backend, settings)
    assert responses.system_fingerprint(backend, settings) == here
    monkeypatch.setattr(backend, "about", backend.about._replace(kernel="another"))
    assert responses.system_fingerprint(backend, settings) != here
