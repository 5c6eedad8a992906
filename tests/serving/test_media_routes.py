"""The routes for sounds, pictures, videos and shapes while no model is set for them, as here."""

import pytest

from tests.support import new_client

client = new_client()


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("audio", "AUDIO_MODEL"),
        ("image", "IMAGE_MODEL"),
        ("video", "VIDEO_MODEL"),
        ("3d", "SHAPE_MODEL"),
    ],
)
def test_kind_without_a_model_names_its_setting(kind: str, setting: str) -> None:
    told = {"detail": f"Not Found: no {setting} is set, which docs/media.md tells of"}
    path = f"/generate/{kind}"
    for answer in (
        client.get(path, params={"prompt": "a"}),
        client.post(path, json={"prompt": "a"}),
    ):
        assert (answer.status_code, answer.json()) == (404, told)


@pytest.mark.parametrize(
    ("path", "setting"),
    [("/v1/audio/speech", "AUDIO_MODEL"), ("/v1/images/generations", "IMAGE_MODEL")],
)
def test_openai_route_without_a_model_names_its_setting(path: str, setting: str) -> None:
    answer = client.post(path, json={"input": "a", "prompt": "a"})
    error = answer.json()["error"]
    assert answer.status_code == 404
    assert error["message"] == f"Not Found: no {setting} is set, which docs/media.md tells of"
    assert error["type"] == "invalid_request_error"


def test_document_of_a_service_that_makes_text_has_nothing_else() -> None:
    document = client.get("/openapi.json").json()
    assert not [path for path in document["paths"] if path.startswith("/v1/images")]
    assert not [name for name in document["components"]["schemas"] if "Image" in name]
