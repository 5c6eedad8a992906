"""OpenAI's routes (https://platform.openai.com/docs/api-reference)."""

import time
from typing import Any

from fastapi import APIRouter, Request

import models
from backends.base import Backend, InvalidField
from serving.bodies import BoundedRoute
from serving.documentation import CHAT_CHUNKS, COMPLETION_CHUNKS, OPENAI_ERRORS
from serving.middleware import with_slashes
from serving.openai.responses import ChatBuilder, CompletionBuilder
from serving.service import CurrentClient, CurrentService
from serving.streams import admit

LOADED_AT_SECONDS = int(time.time())

openai_routes = APIRouter(tags=["openai"], route_class=BoundedRoute)


def refuse_in_stream(body: models.OpenAIRequest) -> None:
    """Raises InvalidField for what no chunk has a place for."""
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidField("prompt_logprobs", "cannot be had in a stream")


@openai_routes.post(
    "/v1/completions", response_model=models.Completion, responses=OPENAI_ERRORS | COMPLETION_CHUNKS
)
async def create_completion(
    http: Request, body: models.CompletionRequest, client: CurrentClient, service: CurrentService
) -> Any:
    """OpenAI's completions: continues one or more prompts, given as text or as token ids.

    Where the model's `generation_config.json` has another default for `temperature`, `top_p`,
    `top_k`, `min_p` or `repetition_penalty`, that is taken."""
    if body.num_drawn < body.n:
        raise InvalidField("best_of", "must not be below n")
    if body.num_drawn > body.n and body.stream:
        raise InvalidField("best_of", "must be n in a stream")
    refuse_in_stream(body)
    backend = service.backend(body.model)
    generation = await admit(http, backend.submit_completion(body, client=client))
    return await CompletionBuilder(body, generation, backend, service.settings).respond(http)


@openai_routes.post(
    "/v1/chat/completions",
    response_model=models.ChatCompletion,
    responses=OPENAI_ERRORS | CHAT_CHUNKS,
)
async def create_chat_completion(
    http: Request,
    body: models.ChatCompletionRequest,
    client: CurrentClient,
    service: CurrentService,
) -> Any:
    """OpenAI's chat completions, for models with a chat template.

    Where the model's `generation_config.json` has another default for `temperature`, `top_p`,
    `top_k`, `min_p`, `repetition_penalty` or the length, that is taken."""
    if body.top_logprobs and not body.logprobs:
        raise InvalidField("top_logprobs", "needs logprobs")
    refuse_in_stream(body)
    backend = service.backend(body.model)
    generation = await admit(http, backend.submit_chat(body, client=client))
    return await ChatBuilder(body, generation, backend, service.settings).respond(http)


def describe_model(name: str, backend: Backend) -> dict[str, Any]:
    """A model under one of its names."""
    return {
        "id": name,
        "object": "model",
        "created": LOADED_AT_SECONDS,
        "owned_by": backend.owned_by,
        "max_model_len": backend.max_model_len,
    }


@openai_routes.head("/v1/models", include_in_schema=False)
@openai_routes.get("/v1/models", response_model=models.ModelList)
async def list_models(service: CurrentService) -> Any:
    """The served models, the default one first."""
    names = service.registry.names
    described = [describe_model(name, service.backend(name)) for name in names]
    return {"object": "list", "data": described}


@openai_routes.head("/v1/models/{model_id:path}", include_in_schema=False)
@openai_routes.get(
    "/v1/models/{model_id:path}",
    response_model=models.Model,
    responses={404: OPENAI_ERRORS[404], "4XX": OPENAI_ERRORS["4XX"]},
)
async def retrieve_model(http: Request, model_id: str, service: CurrentService) -> Any:
    """One served model."""
    name = with_slashes(http.scope, model_id)
    backend = service.backend(name)
    return describe_model(name or backend.name, backend)
