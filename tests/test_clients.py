"""Other people's clients, as they are installed, against a service; `make test-clients` runs these.

They need a network, node, npm, a JDK and Chromium. scripts/clients.py has more of them, which take
longer to install.
"""

import os
import shutil
from collections.abc import Iterator

import pytest

from scripts.clients import Service, service, try_client

pytestmark = pytest.mark.clients
NEEDED = {"openai-node": "npm", "openai-chromium": "npm", "jdk": "javac"}


@pytest.fixture(scope="module")
def running() -> Iterator[Service]:
    with service() as made:
        yield made


@pytest.mark.parametrize(
    "name",
    ["openai", "openai-node", "openai-chromium", "jdk", "langchain-openai",
     "openapi-generator-python", "openapi-python-client"],
)  # fmt: skip
def test_client_works(name: str, running: Service) -> None:
    """A stock Java client could not post, OpenAI's JavaScript client was blocked in browsers, and
    what generators made of the document did not compile."""
    program = NEEDED.get(name, "java" if "generator" in name else "python3")
    if not shutil.which(program) and not os.environ.get("CI"):
        pytest.skip(f"{program} is not installed")
    assert try_client(name, running)
