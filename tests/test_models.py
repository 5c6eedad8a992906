"""What the schemas refuse, on the native routes, and that a refusal names a field without its
value."""

from typing import Any

import pytest

import models
from tests.support import new_client, refused_fields

client = new_client()
SECRET = "Sesame42"


def post_raw(content: str | bytes) -> Any:
    return client.post("/generate", content=content, headers={"Content-Type": "application/json"})


def test_schemas_describe_every_sampling_parameter() -> None:
    fields = models.SamplingFields.model_fields | models.LengthFields.model_fields
    assert [name for name, field in fields.items() if not field.description] == []


@pytest.mark.contract
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", None), ("prompt", 5), ("prompt", [SECRET]), ("prompt", f"{SECRET}\0"),
        ("prompt", SECRET * 70), ("max_length", True), ("max_length", "30"), ("max_length", 30.0),
        ("max_new_tokens", 0), ("max_new_tokens", 201),
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", "1"), ("temperature", True),
        ("top_p", -0.1), ("top_p", 1.1), ("top_k", -2), ("top_k", 8193), ("top_k", 1.0),
        ("seed", -(2**63) - 1), ("seed", 2**64), ("seed", "1"), ("stop", ["a"] * 5), ("stop", [""]),
        ("stop", [1]), ("stop", {"a": 1}), ("model", 1), ("stream", 1), ("stream", "true"),
        ("unknown", SECRET),
    ],
)  # fmt: skip
def test_invalid_field_is_named_and_never_repeated(field: str, value: Any) -> None:
    response = client.post("/generate", json={"prompt": f"{SECRET} ", field: value})
    locations = refused_fields(response)
    assert all(location[:2] == ["body", field] for location in locations)
    assert SECRET not in response.text


@pytest.mark.contract
def test_null_counts_as_left_out() -> None:
    """A client that sends every field of its form was refused for those that were empty."""
    names = ["max_length", "max_new_tokens", "temperature", "top_p", "top_k", "stop", "model",
             "stream"]  # fmt: skip
    body = {"prompt": "A", "seed": 3}
    answers = [client.post("/generate", json=each) for each in (body, body | dict.fromkeys(names))]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json() == answers[1].json()
    assert refused_fields(client.post("/generate", json={"prompt": None})) == [["body", "prompt"]]


@pytest.mark.contract
@pytest.mark.parametrize(
    "fields",
    [{"seed": seed} for seed in (-(2**63), -2, -1, 2**63, 2**64 - 1)]
    + [{"top_k": -1}, {"top_p": 0}, {"model": ""}, {"stop": "<|endoftext|>"}],
)
def test_ranges_of_other_servers_are_taken(fields: dict[str, Any]) -> None:
    body = {"prompt": "A", "max_new_tokens": 2, **fields}
    assert client.post("/generate", json=body).status_code == 200
    answer = client.get("/generate/text", params=body)
    assert (answer.status_code, bool(answer.text)) == (200, True)


@pytest.mark.contract
@pytest.mark.parametrize(
    "content",
    [
        '{"prompt": "a", "temperature": NaN}',
        '{"prompt": "a", "temperature": 1e999}',
        '{"prompt": "a", "temperature": -Infinity}',
        '{"prompt": "\\ud800"}',
        '{"prompt": "a", "\\ud800": 1}',
        '{"prompt": "a", "stop": "\\udfff"}',
        '{"prompt": "a\\u0000b"}',
        '{"prompt": "a", "' + "k" * 10_000 + '": 1}',
        '{"prompt": "' + "a" * 500_000 + '"}',
        "",
        "null",
        "[]",
        '"prompt"',
        "{",
        '{"prompt": "a",}',
        b"\xff\xfe",
        b'{"prompt": "\xff"}',
    ],
)
def test_invalid_body_is_refused_in_few_words(content: str | bytes) -> None:
    """Default FastAPI answers 500 to some of these, and repeats half a megabyte of another."""
    response = post_raw(content)
    assert response.status_code == 422
    assert response.json()["detail"]
    assert len(response.content) < 1000


@pytest.mark.contract
@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 100_000, '{"prompt": "a", "seed": ' + "9" * 5000 + "}"]
)
def test_invalid_nesting_and_huge_numbers_are_refused(content: str) -> None:
    response = post_raw(content)
    assert response.status_code == 422
    assert len(response.content) < 1000


@pytest.mark.contract
def test_invalid_content_type_is_refused() -> None:
    response = client.post("/generate", content=b'{"prompt": "a"}')
    assert response.status_code == 415
    assert "application/json" in response.json()["detail"]


@pytest.mark.contract
@pytest.mark.parametrize(
    "query",
    ["max_new_tokens=3.0", "max_new_tokens=true", "max_new_tokens=%C2%B2", "max_new_tokens=-1",
     "max_new_tokens=", "temperature=nan", "temperature=inf", "top_p=x", "seed=1e3", "unknown=1",
     "max_length=9"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/generate/text?prompt=One+day&", "/One%20day?"])
def test_invalid_query_is_refused(path: str, query: str) -> None:
    locations = refused_fields(client.get(path + query))
    assert locations == [["query", query.split("=")[0]]]
