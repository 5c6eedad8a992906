"""The routes for sounds, pictures, videos and shapes; where no model is set, a 404 that says so."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

import models
from serving.errors import error_response
from serving.media_loader import KINDS

if TYPE_CHECKING:
    from media.backend import MediaBackend

OPENAI_PATHS = {"audio": "/v1/audio/speech", "image": "/v1/images/generations"}


def media_routes(media: dict[str, "MediaBackend"]) -> APIRouter:
    """A route for each kind, served or not."""
    routes = APIRouter()
    for kind in KINDS.keys() - media.keys():
        refuse = refuse_for_lack_of(KINDS[kind].setting)
        paths = [f"/generate/{kind}", OPENAI_PATHS.get(kind)]
        for path in filter(None, paths):
            methods = ["POST"] if path in OPENAI_PATHS.values() else ["GET", "POST"]
            routes.add_route(path, refuse, methods, include_in_schema=False)
    if media:  # what answers is imported only where there is something to answer with
        models.build_media_schemas()
        from serving.media_answers import native_routes
        from serving.openai.media_routes import OPENAI_ROUTES

        for kind in media:
            routes.include_router(native_routes(kind))
            if kind in OPENAI_ROUTES:
                routes.include_router(OPENAI_ROUTES[kind])
    return routes


def refuse_for_lack_of(setting: str) -> Callable[[Request], Awaitable[Response]]:
    async def refuse(http: Request) -> Response:
        reason = f"Not Found: no {setting} is set, which docs/media.md tells of"
        return error_response(http.scope, 404, reason)

    return refuse
