"""What the routes for sounds, pictures, videos and shapes do around the models."""

import asyncio
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, HTTPException, Request

import models
from backends.base import Client, InvalidField, JobRefused
from serving.error_handlers import count_failure
from serving.media_answers import GLB, PLY, shape_type
from serving.media_routes import media_routes
from serving.metrics import FAILED_REQUESTS
from serving.openai.media_routes import generate_images

KINDS: tuple[Any, ...] = ("audio", "image", "video", "3d")


def test_routes_and_their_document_are_made_without_a_warning() -> None:
    """pydantic's, of FastAPI's own aliases, stood between the lines of the log."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        app = FastAPI()
        app.include_router(media_routes(dict.fromkeys(KINDS)))
        document = app.openapi()
    assert [str(each.message) for each in caught] == []
    assert "/generate/3d" in document["paths"]


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("*/*", GLB),
        ("model/*", GLB),
        ("application/*", PLY),
        (f"{GLB};q=0.5, {PLY}", PLY),
        (f"{GLB};q=0, */*", PLY),
        (f"{PLY};q=0, model/*", GLB),
    ],
)
def test_shape_comes_as_accept_says(accept: str, media_type: str) -> None:
    assert shape_type(asking(accept)) == media_type


@pytest.mark.parametrize("accept", ["text/html", f"{PLY};q=0", f"{GLB};q=0, {PLY};q=0, */*"])
def test_shape_that_accept_leaves_no_form_for_is_refused(accept: str) -> None:
    with pytest.raises(HTTPException) as refused:
        shape_type(asking(accept))
    assert refused.value.status_code == 406


def asking(accept: str) -> Request:
    return Request({"type": "http", "headers": [(b"accept", accept.encode())]})


def test_more_pictures_than_may_ever_wait_are_refused_for_good() -> None:
    """They were answered 503, to be tried again, each time."""
    backend = SimpleNamespace(name="image", worker=SimpleNamespace(max_queue_size=2))
    service: Any = SimpleNamespace(registry=SimpleNamespace(media={"image": backend}))
    body = models.ImageGenerationRequest(prompt="a fox", n=3)
    with pytest.raises(InvalidField) as refused:
        asyncio.run(generate_images(asking("*/*"), body, Client("a"), service))
    assert (refused.value.field, refused.value.reason) == ("n", "at most 2 here")


def test_fields_that_a_model_refuses_are_no_failure() -> None:
    """They were counted as failed inference where they came in a stream."""
    failed = FAILED_REQUESTS.labels("inference")
    before = failed._value.get()
    count_failure(JobRefused("it takes no such size"))
    assert failed._value.get() == before
