"""Text generation with GPT-2-class models behind an HTTP API.

    uvicorn main:app            # then open http://localhost:8000; python main.py --help

Routes: `POST /generate` (JSON, or server-sent events with `"stream": true`), which is in this
file; `POST /generate-text/`, `GET|POST /generate/text` (plain text as it is generated),
`GET /{prompt}`, `GET /health`, `/ready`, `/metrics`, `/docs`, and `/`, the page
(serving/routes.py); OpenAI's `POST /v1/completions`, `POST /v1/chat/completions` and
`GET /v1/models` (serving/openai/).

The life of a request:
 1. It gets an id and, at its end, a line in the log, whatever becomes of it.
 2. The middleware asks for its API key, and counts it against its client's limits.
 3. Its body is checked against a schema in models.py; what does not fit is a 422.
 4. The route picks the model's backend: one that runs here, or one on another server.
 5. The backend takes a place in the engine's queue, or refuses at once when the client has no
    room there. Then it turns the prompt into token ids, and refuses a forbidden one.
 6. The engine's thread makes one token for every running sequence in each step, and takes back
    tokens that would spell a forbidden word.
 7. The route waits for the text, or streams it as it comes, and listens for its client to leave.
 8. An error on the way becomes an answer in one place, serving/error_handlers.py; a stream that
    has begun ends with an error event.
"""

if __name__ == "__main__":  # `python main.py --help`; what serves is imported as `main`
    from serving.command import run_command

    run_command("main:app")

import gc
import os

# What is loaded from here on stays. Looking through it for garbage makes the start a fifth longer,
# and holds everybody up for a fifth of a second each time later on.
gc.disable()
# Else `encode_batch` starts a thread for each core beside the engine's.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Idle OpenMP threads busy-wait. The default makes a step ten times slower when another process
# wants a core; 10,000 spins avoid that and cost nothing. torch reads this when it is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from asyncio import create_task
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from logging import getLogger
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware
from transformers import pipeline

import models
from serving.bodies import BoundedRoute
from serving.browsers import (
    BrowserMiddleware,
    cors_options,
    read_allowed_hosts,
    read_cors_origins,
)
from serving.checkpoint import load_tokenizer, load_weights
from serving.content_filter import ContentFilter
from serving.documentation import ERRORS, EVENTS, document_app, operation_id
from serving.error_handlers import add_error_handlers
from serving.http_protocol import OpenConnections
from serving.logs import set_up_logging
from serving.media_routes import media_routes
from serving.metrics import tell_version
from serving.middleware import (
    ApiKeyMiddleware,
    BodyLimitMiddleware,
    HeadLimitMiddleware,
    RequestContextMiddleware,
    ShutdownMiddleware,
    UnexpectedErrorMiddleware,
    read_api_keys,
)
from serving.model_loader import choose_precision, show_only_downloads
from serving.openai.routes import openai_routes
from serving.pacing import pace_event_loop
from serving.rate_limits import RateLimitMiddleware
from serving.registry import load_models
from serving.routes import PageFiles, native_events, prompt_route, service_routes, text_routes
from serving.service import CurrentClient, CurrentService, Service
from serving.settings import read_settings, refuse_setting
from serving.shutdown import GracefulShutdown, running_server
from serving.streams import GenerationStream, admit, finish
from serving.token_routes import token_routes

gc.freeze()
gc.enable()

VERSION = "0.1.0"

settings = read_settings()
set_up_logging(settings)
tell_version(VERSION)

try:
    content_filter = ContentFilter(settings.forbidden_words)
except ValueError as invalid_word:
    refuse_setting("FORBIDDEN_WORDS", invalid_word)

# --- The model: loaded here, at import ----------------------------------------------------------

torch.set_num_threads(1)  # of this thread, which only loads: the engine's thread has the cores
show_only_downloads()
precision = choose_precision(settings)


def load_pipeline(source: str) -> Any:
    """A text-generation pipeline from a folder or a Hugging Face id."""
    model, tokenizer = load_weights(source, precision["dtype"]), load_tokenizer(source)
    device = precision["device"]
    return pipeline("text-generation", model=model, tokenizer=tokenizer, device=device)


registry = load_models(settings, content_filter, load_pipeline)
# Of the default model; None where that is on another server.
generator, engine = registry.default.generator, registry.default.engine
service = Service(
    settings, content_filter, registry, GracefulShutdown(registry, settings.drain_timeout_seconds)
)
# Not before what they say of models has been checked: a URL may hold a password.
getLogger("service").info("settings: %s", settings.model_dump(mode="json"))

# --- The app ------------------------------------------------------------------------------------


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    if server := running_server():
        service.shutdown.listen(server)
        OpenConnections(settings).watch(server)
    registry.start()
    pacing = create_task(pace_event_loop(lambda: registry.is_computing))
    yield
    pacing.cancel()
    await registry.stop()


app = FastAPIOffline(
    docs_url=None,  # serving/routes.py has both
    redoc_url=None,
    title="GPT-2 text generation",
    version=VERSION,
    description="Text generation with GPT-2-class language models. "
    "Generated text can be wrong or offensive; check it before you use it.",
    lifespan=lifespan,
    generate_unique_id_function=operation_id,
    # A redirect would repeat the path, which may be a prompt.
    redirect_slashes=False,
)
app.state.service = service
app.router.route_class = BoundedRoute
key_names = read_api_keys(settings)
document_app(app, registry, settings, needs_key=bool(key_names))
add_error_handlers(app)

# From the inside out: the last one added is the first that a request meets.
app.add_middleware(BodyLimitMiddleware, max_body_bytes=settings.max_body_bytes)
app.add_middleware(UnexpectedErrorMiddleware)
app.add_middleware(RateLimitMiddleware, settings=settings)
app.add_middleware(ShutdownMiddleware, shutdown=service.shutdown)
app.add_middleware(
    ApiKeyMiddleware,
    key_names=key_names,
    metrics_need_key=settings.metrics_need_key,
    docs_need_key=settings.docs_need_key,
)
app.add_middleware(
    BrowserMiddleware,
    allowed_hosts=read_allowed_hosts(settings),
    cors_origins=read_cors_origins(settings),
    needs_key=bool(key_names),
)
app.add_middleware(HeadLimitMiddleware)
if settings.cors_origins:
    app.add_middleware(CORSMiddleware, **cors_options(settings))
app.add_middleware(RequestContextMiddleware)

app.mount("/static", PageFiles())
app.include_router(service_routes)


@app.post(
    "/generate",
    response_model=models.GenerateResponse,
    responses=ERRORS | EVENTS,
    tags=["generation"],
)
async def generate(
    http: Request, body: models.GenerateRequest, client: CurrentClient, service: CurrentService
) -> Any:
    """Continues a prompt. With `"stream": true` the text comes as server-sent events:
    `{"text": delta}` as it is made, then one with the whole response."""
    backend = service.backend(body.model)
    submitting = backend.submit_text(body.prompt, body, client=client, streams=body.stream)
    generation = await admit(http, submitting)  # which meanwhile listens for the client to leave
    if body.stream:
        return GenerationStream(native_events(body.prompt, generation), generation)
    ((delta,),) = await finish(http, generation)
    return {"generated_text": body.prompt + delta.text, "model_name": backend.name}


app.include_router(text_routes)
app.include_router(openai_routes)
app.include_router(token_routes)
app.include_router(media_routes(registry.media))
app.include_router(prompt_route)  # last: it takes any path
