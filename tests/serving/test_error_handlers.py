"""What an error becomes that no other test file has the route of."""

import pytest

from tests.support import new_client

client = new_client()


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/generate", "POST"),
        ("DELETE", "/generate/text", "GET, HEAD, POST"),
        ("PUT", "/generate-text/", "POST"),
        ("POST", "/some%20prompt", "GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
        ("GET", "/v1/completions", "POST"),
        ("DELETE", "/v1/models/a", "GET, HEAD"),
        ("POST", "/openapi.json", "GET, HEAD"),
    ],
)
def test_405_names_every_method_of_the_path(method: str, path: str, allowed: str) -> None:
    """Was that of a file on every included route, which the app's own list of routes hides; that of
    `/openapi.json` was a 404, as of the bare name of a file."""
    response = client.request(method, path)
    assert (response.status_code, response.headers["Allow"]) == (405, allowed)
    options = client.options(path)
    assert (options.status_code, options.headers["Allow"]) == (204, allowed)
