"""The native routes for sounds, pictures, videos and shapes."""

import re
from base64 import b64encode
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, HTTPException, Query, Request, Response

import models
from backends.base import Client
from media.job import Job
from media.messages import Step
from serving.bodies import BoundedRoute
from serving.documentation import ERRORS, Responses
from serving.error_handlers import FAILURES, count_failure, failure_message
from serving.logs import add_generation_to_log
from serving.service import CurrentClient, CurrentService, Service
from serving.streams import GenerationStream, event, finish

GLB, PLY = "model/gltf-binary", "application/x-ply"
# What `Accept` may say, and what is then sent: the first that it does not refuse.
SHAPE_TYPES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(["model/*", "*/*"], (GLB, PLY)),
    **dict.fromkeys([GLB, "application/octet-stream", "text/event-stream"], (GLB,)),
    **dict.fromkeys([PLY, "application/ply", "model/ply", "application/*"], (PLY,)),
}
WEIGHT = re.compile(r"[01](\.[0-9]{0,3})?")  # RFC 9110, 12.4.2


class Form(NamedTuple):
    """How a kind is asked for, and what comes of it, the first one if nobody says which."""

    query: type[models.MediaFields]
    body: type[models.MediaFields]
    media_types: tuple[str, ...]


FORMS = {
    "audio": Form(models.AudioQuery, models.AudioRequest, ("audio/wav",)),
    "image": Form(models.ImageQuery, models.ImageRequest, ("image/png",)),
    "video": Form(models.VideoQuery, models.VideoRequest, ("video/mp4",)),
    "3d": Form(models.ShapeQuery, models.ShapeRequest, (GLB, PLY)),
}
STEPS_EXAMPLE = (
    'data: {"step": 7, "of": 25}\n\ndata: {"media_type": "image/png", "content": "iVBORw0K…", '
    '"seed": 42, "model_name": "stable-diffusion"}\n\n'
)


def documented(media_types: tuple[str, ...]) -> Responses:
    """200 of a route, with its events, and the errors that every route has."""
    content: dict[str, Any] = {
        each: {"schema": {"type": "string", "format": "binary"}} for each in media_types
    }
    events = {"schema": {"type": "string"}, "example": STEPS_EXAMPLE}
    header = {"description": "The seed that gives the same again", "schema": {"type": "integer"}}
    made = {"content": content | {"text/event-stream": events}, "headers": {"X-Seed": header}}
    return ERRORS | {200: made}


def native_routes(kind: str) -> APIRouter:
    """GET, HEAD and POST of one kind."""
    form, path = FORMS[kind], f"/generate/{kind}"
    name = {"3d": "shape"}.get(kind, kind)
    routes = APIRouter(tags=["media"], route_class=BoundedRoute)

    async def begin(query: Annotated[form.query, Query()]) -> Response:  # type: ignore[name-defined]
        """Whether a GET would be valid."""
        response = Response(media_type=form.media_types[0], headers={"Cache-Control": "no-store"})
        del response.headers["Content-Length"]
        return response

    async def make_from_query(
        http: Request,
        query: Annotated[form.query, Query()],  # type: ignore[name-defined]
        client: CurrentClient,
        service: CurrentService,
    ) -> Response:
        return await answer(http, kind, query, client, service)

    async def make(
        http: Request,
        body: form.body,  # type: ignore[name-defined]
        client: CurrentClient,
        service: CurrentService,
    ) -> Response:
        return await answer(http, kind, body, client, service)

    options: dict[str, Any] = {
        "responses": documented(form.media_types),
        "response_class": Response,
    }
    routes.add_api_route(path, begin, methods=["HEAD"], include_in_schema=False)
    routes.add_api_route(
        path, make_from_query, methods=["GET"], name=f"make_{name}_from_query", **options
    )
    routes.add_api_route(path, make, methods=["POST"], name=f"make_{name}", **options)
    return routes


async def answer(
    http: Request, kind: str, fields: models.MediaFields, client: Client, service: Service
) -> Response:
    """The result; or its steps and then the result, as events."""
    media_type = shape_type(http) if kind == "3d" else FORMS[kind].media_types[0]
    streams: bool = getattr(fields, "stream", False)
    asked = fields.model_dump(exclude={"prompt", "stream"}) | {"media_type": media_type}
    backend = service.registry.media[kind]
    job = backend.submit(fields.prompt, asked, client=client, wants_steps=streams)
    add_generation_to_log(job)
    if streams:
        return GenerationStream(step_events(job), job)
    (made,) = await finish(http, job)
    headers = {"Cache-Control": "no-store", "X-Seed": str(job.fields["seed"])}
    if kind == "3d":
        headers["Vary"] = "Accept"
    return Response(made.content, headers=headers, media_type=made.media_type)


def shape_type(http: Request) -> str:
    """What `Accept` asks for, by its weights and then by its order; 406 if that cannot be had."""
    weighed = []
    for part in http.headers.get("accept", "*/*").split(","):
        name, _, parameters = part.strip().lower().partition(";")
        said = parameters.replace(" ", "").rpartition("q=")[2]
        weighed.append((float(said) if WEIGHT.fullmatch(said) else 1.0, name.strip()))
    refused = {name for weight, name in weighed if weight == 0}
    for weight, name in sorted(weighed, key=lambda each: -each[0]):
        for media_type in SHAPE_TYPES.get(name, ()):
            if weight > 0 and media_type not in refused:
                return media_type
    raise HTTPException(406, f"Not Acceptable: there are {GLB} and {PLY}")


async def step_events(job: Job) -> AsyncGenerator[str]:
    """Each step that is told, some with a preview, a JPEG in base64; then the result."""
    try:
        async with aclosing(job.updates()) as updates:
            async for update in updates:
                if isinstance(update, Step):
                    told: dict[str, Any] = {"step": update.step, "of": update.of}
                    if update.preview:
                        told["preview"] = b64encode(update.preview).decode()
                else:
                    told = {
                        "media_type": update.media_type,
                        "content": b64encode(update.content).decode(),
                        "seed": job.fields["seed"],
                        "model_name": job.model_name,
                    }
                yield event(told)
    except FAILURES as error:
        count_failure(error)
        yield event({"detail": failure_message(error)}, name="error")
