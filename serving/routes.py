"""The native routes besides `POST /generate`: page, probes, metrics, and three ways to get text."""

import asyncio
import hashlib
import mimetypes
from base64 import b64encode
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from html import escape
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.staticfiles import StaticFiles

import models
from backends.base import Client, Generation
from serving.bodies import BoundedRoute
from serving.documentation import ERRORS, NOT_READY, PLAIN_TEXT
from serving.error_handlers import FAILURES, count_failure, failure_message
from serving.errors import error_response, route_path
from serving.middleware import DOCS_FILES, with_slashes
from serving.reserved_paths import reserved
from serving.service import CurrentClient, CurrentService, Service
from serving.streams import GenerationStream, StreamAborted, admit, event, finish

# --- Page, probes, metrics ----------------------------------------------------------------------

STATIC = Path(__file__).parent.parent / "static"
PAGE = (STATIC / "index.html").read_text(encoding="utf-8")
STYLE = PAGE.partition("<style>")[2].partition("</style>")[0]
# Of the page's header, in front of which the tabs stand if there are any.
DOCUMENTATION_LINKS = '<nav aria-label="Documentation">'
TABS = {"audio": "Sound", "image": "Picture", "video": "Video", "3d": "Shape"}
PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Vary": "Accept",
    # No inline code at all, and no inline style but the page's own.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; img-src 'self'; "
    f"style-src 'sha256-{b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}
# What static/media.html shows comes as bytes in an event.
MEDIA_POLICY = (
    "default-src 'none'; script-src 'self'; img-src 'self' blob:; media-src blob:; "
    "style-src 'self'; connect-src 'self'; base-uri 'self'; form-action 'none'; "
    "frame-ancestors 'none'"
)

service_routes = APIRouter(tags=["service"])


class PageFiles(StaticFiles):
    """Files that a browser keeps, and asks each time whether they have changed."""

    def __init__(self) -> None:
        super().__init__(directory=STATIC)
        mimetypes.add_type("text/javascript", ".js")  # Windows may know it as plain text

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        if response.media_type == "text/html":
            response.headers["Content-Security-Policy"] = MEDIA_POLICY
        return response


def with_tabs(page: str, service: Service) -> str:
    """The page with links to static/media.html, one for each kind that is served."""
    links = (
        f'<a href="static/media.html#{kind}">{TABS[kind]}</a>' for kind in service.registry.media
    )
    tabs = f'<nav aria-label="Kinds"><a aria-current="page">Text</a>{"".join(links)}</nav>'
    return page.replace(DOCUMENTATION_LINKS, tabs + DOCUMENTATION_LINKS, 1)


@service_routes.head("/", include_in_schema=False)
@service_routes.get("/", response_model=models.Health)
async def root(http: Request, service: CurrentService) -> Any:
    """A page for browsers (`Accept: text/html`), `{"health": "ok"}` for everything else."""
    if "text/html" in http.headers.get("accept", ""):
        page = with_tabs(PAGE, service) if service.registry.media else PAGE
        prefix = http.scope.get("root_path", "").rstrip("/")
        # A proxy may have served it without the slash that its own addresses begin at.
        base = f'<base href="{escape(prefix)}/">' if prefix else ""
        headers = dict(PAGE_HEADERS)
        if base:
            policy = headers["Content-Security-Policy"]
            headers["Content-Security-Policy"] = policy.replace(
                "base-uri 'none'", "base-uri 'self'"
            )
        return HTMLResponse(page.replace("<head>", "<head>" + base, 1), headers=headers)
    return JSONResponse({"health": "ok"}, headers={"Vary": "Accept"})


@service_routes.head("/docs", include_in_schema=False)
@service_routes.get("/docs", include_in_schema=False)
async def docs(http: Request) -> Response:
    """Swagger UI. All addresses are relative, so that it works under a proxy's path."""
    return get_swagger_ui_html(
        openapi_url="openapi.json",
        title=f"{http.app.title} - Swagger UI",
        swagger_js_url=f"{DOCS_FILES[1:]}swagger-ui-bundle.js",
        swagger_css_url=f"{DOCS_FILES[1:]}swagger-ui.css",
        swagger_favicon_url=f"{DOCS_FILES[1:]}favicon.png",
    )


@service_routes.head("/redoc", include_in_schema=False)
@service_routes.get("/redoc", include_in_schema=False)
async def redoc(http: Request) -> Response:
    """ReDoc, the same way."""
    return get_redoc_html(
        openapi_url="openapi.json",
        title=f"{http.app.title} - ReDoc",
        redoc_js_url=f"{DOCS_FILES[1:]}redoc.standalone.js",
        redoc_favicon_url=f"{DOCS_FILES[1:]}favicon.png",
        with_google_fonts=False,
    )


@service_routes.head("/metrics", include_in_schema=False)
@service_routes.get("/metrics", response_class=Response)
async def metrics(service: CurrentService) -> Response:
    """Prometheus text; vLLM's names where it has the same figure."""
    return Response(await service.render_metrics(), media_type=CONTENT_TYPE_LATEST)


# Under the names that Kubernetes, SageMaker and vLLM ask for too.
@service_routes.api_route("/healthz", methods=["GET", "HEAD"], include_in_schema=False)
@service_routes.api_route("/livez", methods=["GET", "HEAD"], include_in_schema=False)
@service_routes.api_route("/ping", methods=["GET", "HEAD"], include_in_schema=False)
@service_routes.head("/health", include_in_schema=False)
@service_routes.get("/health", response_model=models.Health)
async def health() -> Any:
    """Liveness: 200 while the process can answer."""
    return {"health": "ok"}


@service_routes.api_route("/readyz", methods=["GET", "HEAD"], include_in_schema=False)
@service_routes.head("/ready", include_in_schema=False)
@service_routes.get("/ready", response_model=models.Readiness, responses=NOT_READY)
async def ready(service: CurrentService) -> Any:
    """Readiness: 200 once a request would be accepted, else 503 and why not."""
    status = readiness(service)
    content = {
        "status": status,
        "model_names": service.registry.names,
        "loaded_model_names": service.registry.loaded_names,
        "loading_model_name": service.registry.swapper.loading,
    }
    return JSONResponse(content, 200 if status == "ready" else 503)


def readiness(service: Service) -> str:
    """`ready`, or why not."""
    if service.shutdown.has_begun:
        return "draining"
    backends = service.registry.backends.values()
    for backend in backends:
        if problem := backend.problem:
            return problem
    # What runs elsewhere holds up only a service that has nothing else to answer with.
    if not any(backend.is_reachable for backend in backends):
        return "no external model can be reached"
    return "ready"


# --- Text ---------------------------------------------------------------------------------------

text_routes = APIRouter(tags=["generation"], route_class=BoundedRoute)


class PromptRoute(APIRoute):
    """Takes no path that is reserved, whatever its query."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            if reason := reserved(route_path(request.scope)):
                return error_response(request.scope, 404, reason)
            return await handler(request)

        return handle


# To be included last: it takes any path.
prompt_route = APIRouter(tags=["generation"], route_class=PromptRoute)


def without_text(media_type: str) -> Response:
    """What HEAD gets of a text: what GET would begin with. Nothing is generated."""
    response = Response(media_type=media_type, headers={"Cache-Control": "no-store"})
    del response.headers["Content-Length"]  # which only the text would tell
    return response


async def native_events(prompt: str, generation: Generation) -> AsyncGenerator[str]:
    """The deltas of the one text as events, then the whole response as one."""
    text = prompt
    try:
        async with aclosing(generation.deltas()) as deltas:
            async for delta in deltas:
                text += delta.text
                if delta.text:
                    yield event({"text": delta.text})
        yield event({"generated_text": text, "model_name": generation.model_name})
    except FAILURES as error:
        count_failure(error)
        yield event({"detail": failure_message(error)}, name="error")


async def plain_text(generation: Generation) -> AsyncGenerator[str]:
    """The text as it is made. Plain text has no place for an error, so that one is said in
    words and then breaks the response off, which every client notices."""
    try:
        async with aclosing(generation.deltas()) as deltas:
            async for delta in deltas:
                yield delta.text
    except FAILURES as error:
        count_failure(error)
        yield f"\n[{failure_message(error)}]\n"
        raise StreamAborted from error


@text_routes.post("/generate-text", include_in_schema=False)
@text_routes.post("/generate-text/", response_model=models.GenerateTextResponse, responses=ERRORS)
async def generate_texts(
    http: Request, body: models.GenerateTextRequest, client: CurrentClient, service: CurrentService
) -> Any:
    """Every served model continues the same prompt, side by side."""
    admitted = await asyncio.gather(
        *(
            admit(
                http,
                backend.submit_text(
                    body.prompt, body, client=client, num_sequences=body.num_return_sequences
                ),
            )
            for backend in service.registry.backends.values()
        ),
        return_exceptions=True,
    )
    generations = [each for each in admitted if isinstance(each, Generation)]
    for failure in admitted:
        if isinstance(failure, BaseException):
            for generation in generations:
                generation.abort()
            raise failure
    return {
        "generated_texts": {
            generation.model_name: [body.prompt + delta.text for delta in deltas]
            for generation, deltas in zip(
                generations, await finish(http, *generations), strict=True
            )
        }
    }


async def stream_plain(
    http: Request,
    fields: models.TextRequest | models.TextQuery,
    client: Client,
    service: Service,
) -> Response:
    backend = service.backend(fields.model)
    submitting = backend.submit_text(
        fields.prompt, fields, client=client, streams=True, is_chat=True
    )
    generation = await admit(http, submitting)
    return GenerationStream(plain_text(generation), generation, "text/plain")


@text_routes.head("/generate/text", include_in_schema=False)
async def begin_text(query: Annotated[models.TextQuery, Query()]) -> Response:
    """Whether a GET would be valid."""
    return without_text("text/plain")


@text_routes.get("/generate/text", responses=ERRORS | PLAIN_TEXT, response_class=Response)
async def stream_text_from_query(
    http: Request,
    query: Annotated[models.TextQuery, Query()],
    client: CurrentClient,
    service: CurrentService,
) -> Response:
    """The continuation as plain text while it is generated, for `curl -N`."""
    return await stream_plain(http, query, client, service)


@text_routes.post("/generate/text", responses=ERRORS | PLAIN_TEXT, response_class=Response)
async def stream_text(
    http: Request, body: models.TextRequest, client: CurrentClient, service: CurrentService
) -> Response:
    """The same with a JSON body."""
    return await stream_plain(http, body, client, service)


@prompt_route.head("/{prompt}", include_in_schema=False)
async def begin_from_path(
    prompt: Annotated[models.Prompt, PathParameter()],
    query: Annotated[models.PromptQuery, Query()],
) -> Response:
    """Whether a GET would be valid."""
    return without_text("application/json")


@prompt_route.get("/{prompt}", response_model=models.GeneratedSequences, responses=ERRORS)
async def generate_from_path(
    http: Request,
    response: Response,
    prompt: Annotated[models.Prompt, PathParameter()],
    query: Annotated[models.PromptQuery, Query()],
    client: CurrentClient,
    service: CurrentService,
) -> Any:
    """Continues the URL-encoded path: `/Once%20upon%20a%20time?max_new_tokens=50`."""
    prompt = with_slashes(http.scope, prompt)
    backend = service.backend(query.model)
    submitting = backend.submit_text(
        prompt, query, client=client, num_sequences=query.num_return_sequences
    )
    (deltas,) = await finish(http, await admit(http, submitting))
    response.headers["Cache-Control"] = "no-store"
    return {"generated_sequences": [prompt + delta.text for delta in deltas]}
