"""What the routes stand on."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from backends.base import Backend, Client, reserve_nothing
from serving.bodies import BodyTurns
from serving.content_filter import ContentFilter
from serving.metrics import render_metrics
from serving.registry import ModelRegistry
from serving.settings import Settings
from serving.shutdown import GracefulShutdown


@dataclass
class Service:
    """Made once in main.py, kept on `app.state.service`, handed to routes as a dependency."""

    settings: Settings
    content_filter: ContentFilter
    registry: ModelRegistry
    shutdown: GracefulShutdown
    # What `/metrics` shows; ray_serve.py puts that of all replicas in its place.
    render_metrics: Callable[[], Awaitable[bytes]] = render_metrics
    body_turns: BodyTurns = field(default_factory=BodyTurns)

    def backend(self, name: str | None) -> Backend:
        """The model of that name, the default one for None or "". Raises UnknownModel."""
        return self.registry.get(name)


async def get_service(http: Request) -> Service:
    """The app's own; a coroutine, since FastAPI would call a function in a thread."""
    service: Service = http.app.state.service
    return service


async def get_client(http: Request) -> Client:
    """Whom the request is from, as ApiKeyMiddleware and RateLimitMiddleware have found."""
    scope = http.scope
    reserve = scope.get("reserve_tokens", reserve_nothing)
    return Client(scope["client_identity"], reserve, scope.get("key_name", ""))


CurrentService = Annotated[Service, Depends(get_service)]
CurrentClient = Annotated[Client, Depends(get_client)]
