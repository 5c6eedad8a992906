"""OpenAI's routes for pictures and speech."""

import secrets
import time
from base64 import b64encode
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

import models
from backends.base import InvalidField
from serving.bodies import BoundedRoute
from serving.documentation import OPENAI_ERRORS
from serving.logs import add_generation_to_log
from serving.registry import UnknownModel
from serving.service import CurrentClient, CurrentService, Service
from serving.streams import finish

if TYPE_CHECKING:
    from media.backend import MediaBackend
    from media.job import Job

SPEECH_TYPES = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "aac": "audio/aac",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}
SPOKEN = {
    each: {"schema": {"type": "string", "format": "binary"}} for each in SPEECH_TYPES.values()
}

image_routes = APIRouter(tags=["openai"], route_class=BoundedRoute)
audio_routes = APIRouter(tags=["openai"], route_class=BoundedRoute)
OPENAI_ROUTES = {"image": image_routes, "audio": audio_routes}


def served(service: Service, kind: str, name: str | None) -> "MediaBackend":
    """The model of that kind. Raises UnknownModel if it has another name than the one asked for."""
    backend = service.registry.media[kind]
    if name and name != backend.name:
        raise UnknownModel([backend.name])
    return backend


@image_routes.post(
    "/v1/images/generations", response_model=models.GeneratedImages, responses=OPENAI_ERRORS
)
async def generate_images(
    http: Request,
    body: models.ImageGenerationRequest,
    client: CurrentClient,
    service: CurrentService,
) -> Any:
    """OpenAI's images: PNGs in base64; `n` of them have consecutive seeds."""
    backend = served(service, "image", body.model)
    if body.n > (most := backend.worker.max_queue_size):
        raise InvalidField("n", f"at most {most} here")
    first_seed = secrets.randbelow(2**32) if body.seed is None else body.seed
    asked = body.model_dump(include={"steps", "guidance", "size"})
    jobs: list[Job] = []
    try:
        for number in range(body.n):
            seed = min(first_seed + number, models.MAX_SEED)
            jobs.append(backend.submit(body.prompt, asked | {"seed": seed}, client=client))
            add_generation_to_log(jobs[-1])
        images = await finish(http, *jobs)
    finally:
        for job in jobs:
            job.abort()
    return {
        "created": int(time.time()),
        "data": [
            {"b64_json": b64encode(made.content).decode(), "seed": job.fields["seed"]}
            for job, made in zip(jobs, images, strict=True)
        ],
        "output_format": "png",
        "model": backend.name,
    }


@audio_routes.post(
    "/v1/audio/speech",
    responses=OPENAI_ERRORS | {200: {"content": SPOKEN}},
    response_class=Response,
)
async def create_speech(
    http: Request, body: models.SpeechRequest, client: CurrentClient, service: CurrentService
) -> Response:
    """OpenAI's speech. The model has one voice: `alloy` and `default` both stand for it."""
    backend = served(service, "audio", body.model)
    asked = {
        "seed": body.seed,
        "seconds": body.seconds,
        "media_type": SPEECH_TYPES[body.response_format],
    }
    job = backend.submit(body.input, asked, client=client, field="input")
    add_generation_to_log(job)
    (made,) = await finish(http, job)
    headers = {"Cache-Control": "no-store", "X-Seed": str(job.fields["seed"])}
    return Response(made.content, headers=headers, media_type=made.media_type)
