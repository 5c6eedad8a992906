"""What routes say of themselves in the OpenAPI document."""

from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel

import models
from serving.errors import FORBIDDEN_PROMPT, is_openai_path
from serving.middleware import is_open
from serving.registry import ModelRegistry
from serving.settings import Settings

Responses = dict[int | str, dict[str, Any]]

ERRORS: Responses = {
    400: {"model": models.Error, "description": FORBIDDEN_PROMPT},
    404: {"model": models.Error, "description": "No such model"},
    413: {"model": models.Error, "description": "Request body too large"},
    415: {"model": models.Error, "description": "The body is not JSON, or is compressed"},
    422: {"model": models.ValidationErrors, "description": "Invalid request"},
    500: {"model": models.Error, "description": "Model inference failed"},
    503: {"model": models.Error, "description": "Overloaded or stopping; see Retry-After"},
    504: {"model": models.Error, "description": "The request took too long"},
}
# Of what generates nothing: no forbidden prompt, no model that fails.
TOKEN_ERRORS: Responses = {
    400: {"model": models.Error, "description": "The model has no chat template"},
    **{status: ERRORS[status] for status in (404, 413, 415, 422, 503, 504)},
}
TOKENIZER_ERRORS: Responses = {status: ERRORS[status] for status in (404, 422)}
EVENTS: Responses = {
    200: {
        "content": {
            "text/event-stream": {
                "schema": {"type": "string"},
                "example": 'data: {"text": " there was a king"}\n\n'
                'data: {"generated_text": "Once upon a time there was a king", '
                '"model_name": "gpt2"}\n\n',
            }
        }
    }
}
PLAIN_TEXT: Responses = {
    200: {
        "description": "The generated text, sent as it is made",
        "content": {"text/plain": {"schema": {"type": "string"}, "example": " there was a king"}},
    }
}
NOT_READY: Responses = {
    503: {"model": models.Readiness, "description": "A request would be refused"}
}
NO_CHAT = (
    "No model that is served here has a chat template, which CHAT_TEMPLATE can give it: every "
    "request is answered 400."
)
OPENAI_REFUSALS: dict[int | str, str] = {
    400: "Invalid, forbidden (`content_filter`) or too long (`context_length_exceeded`)",
    404: "No such model (`model_not_found`)",
    413: "Request body too large",
    415: "The body is not JSON, or is compressed",
    "4XX": "Any other refusal",  # and no 422, which FastAPI would put here by itself
    500: "Model inference failed",
    503: "Overloaded or stopping; see Retry-After",
    504: "The request took too long",
}
OPENAI_ERRORS: Responses = {
    status: {"model": models.OpenAIError, "description": description}
    for status, description in OPENAI_REFUSALS.items()
}


def or_chunks(chunk: type[BaseModel], example: str) -> Responses:
    """200 of a `/v1` route: with `"stream": true`, chunks as server-sent events."""
    described = f"Chunks, ended by `data: [DONE]`; each is `data:` and a `{chunk.__name__}`"
    events = {"schema": {"type": "string", "description": described}, "example": example}
    return {200: {"content": {"text/event-stream": events}}}


COMPLETION_CHUNKS = or_chunks(
    models.Completion,
    'data: {"id": "cmpl-1", "object": "text_completion", "created": 1700000000, "model": '
    '"gpt2", "choices": [{"index": 0, "text": " there", "logprobs": null, '
    '"finish_reason": null}], "usage": null}\n\ndata: [DONE]\n\n',
)
CHAT_CHUNKS = or_chunks(
    models.ChatCompletionChunk,
    'data: {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1700000000, '
    '"model": "gpt2", "choices": [{"index": 0, "delta": {"content": " there"}, "logprobs": '
    'null, "finish_reason": null}], "usage": null}\n\ndata: [DONE]\n\n',
)


def operation_id(route: APIRoute) -> str:
    """The name of a method in generated clients: the function's, wherever its path may move to."""
    return route.name


def document_app(
    app: FastAPI, registry: ModelRegistry, settings: Settings, needs_key: bool
) -> None:
    """Adds to the app's document what its routes do not know: the models that are served, and what
    the middleware asks for."""

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            document = FastAPI.openapi(app)
            document_models(document, registry)
            document_chat(document, registry)
            document_media(document, registry, settings)
            document_refusals(document, settings, needs_key)
        return app.openapi_schema or {}

    # As FastAPI's own documentation has it (Advanced: Extending OpenAPI).
    app.openapi = openapi  # type: ignore[method-assign]


def described_fields(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The schemas of all fields by name, for each body and each query."""
    fields = [s.get("properties", {}) for s in document["components"]["schemas"].values()]
    for operations in document["paths"].values():
        for operation in operations.values():
            parameters = operation.get("parameters", ())
            fields.append({each["name"]: each["schema"] for each in parameters})
    return fields


def document_models(document: dict[str, Any], registry: ModelRegistry) -> None:
    """Ends `top_k` at the vocabulary, as it does in fact, and asks for a model that is served in
    the examples."""
    sizes = [each.vocab_size for each in registry.backends.values() if each.vocab_size]
    for each in described_fields(document):
        for name in each.keys() & {"model", "model_id"}:
            each[name]["examples"] = [registry.default.name]
        if "top_k" in each and sizes:
            each["top_k"]["maximum"] = min(sizes)
    # Swagger fills in what stands beside a parameter's schema, not the examples within it.
    for operations in document["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                if parameter["required"]:
                    parameter["example"] = parameter["schema"]["examples"][0]


def document_chat(document: dict[str, Any], registry: ModelRegistry) -> None:
    """Asks for a model that takes conversations in the example of a chat, or says that there is
    none: GPT-2 has no chat template, and the example would be answered 400 without a reason."""
    names = [each.name for each in registry.backends.values() if each.takes_chat]
    if not names:
        operation = document["paths"]["/v1/chat/completions"]["post"]
        operation["description"] += f"\n\n**{NO_CHAT}**"
        return
    schema = document["components"]["schemas"]["ChatCompletionRequest"]
    schema["properties"]["model"] = schema["properties"]["model"] | {"examples": names[:1]}
    if names[0] != registry.default.name:
        schema["examples"] = [each | {"model": names[0]} for each in schema["examples"]]


def document_media(document: dict[str, Any], registry: ModelRegistry, settings: Settings) -> None:
    """Ends the fields of sounds, pictures, videos and shapes where the settings end them, and asks
    for the models that make them."""
    bounds = {
        "steps": settings.max_media_steps,
        "seconds": settings.max_audio_seconds,
        "num_frames": settings.max_video_frames,
        "grid_size": settings.max_grid_size,
    }
    for fields in described_fields(document):
        for name in fields.keys() & bounds.keys():
            field, bound = fields[name], bounds[name]
            field["maximum"] = bound
            if "examples" in field:
                field["examples"] = [min(each, bound) for each in field["examples"]]
        if "size" in fields:
            fields["size"]["description"] += f" No side is longer than {settings.max_side_pixels}."
    schemas = document["components"]["schemas"]
    for kind, name in {"image": "ImageGenerationRequest", "audio": "SpeechRequest"}.items():
        if kind in registry.media:
            schemas[name]["properties"]["model"]["examples"] = [registry.media[kind].name]


def document_refusals(document: dict[str, Any], settings: Settings, needs_key: bool) -> None:
    """Adds the keys that routes need, and what the middleware refuses."""
    refusals = {503: "Overloaded or stopping; see Retry-After"}
    if needs_key:
        refusals[401] = "No API key, or one that is not known"
        document["components"]["securitySchemes"] = {
            "Bearer": {"type": "http", "scheme": "bearer"},
            "X-API-Key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
    if settings.rate_limit or settings.token_rate_limit:
        refusals[429] = "Over a limit; see Retry-After"
    for path, operations in document["paths"].items():
        for operation in operations.values():
            add_refusals(path, operation, refusals, settings)


def add_refusals(
    path: str, operation: dict[str, Any], refusals: dict[int, str], settings: Settings
) -> None:
    """Adds to an operation those that it can meet, and what it takes to pass."""
    responses = operation["responses"]
    if "requestBody" not in operation:
        responses.pop("415", None)
    if is_open(path):
        return
    is_metrics = path == "/metrics"
    error = models.OpenAIError if is_openai_path(path) else models.Error
    schema = {"$ref": f"#/components/schemas/{error.__name__}"}
    for status, description in refusals.items():
        is_met = {401: not is_metrics or settings.metrics_need_key}.get(status, not is_metrics)
        if is_met:
            content = {"application/json": {"schema": schema}}
            responses.setdefault(str(status), {"description": description, "content": content})
            if status == 401:
                operation["security"] = [{"Bearer": []}, {"X-API-Key": []}]
