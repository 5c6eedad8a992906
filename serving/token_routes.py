"""What a model's tokenizer does, in vLLM's shapes: `POST /tokenize`, `POST /detokenize` and
`GET /tokenizer_info`. Nothing is generated, so the content filter has no say here."""

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

import models
from serving.bodies import BoundedRoute
from serving.documentation import TOKEN_ERRORS, TOKENIZER_ERRORS
from serving.logs import add_to_log
from serving.openai.responses import in_json
from serving.service import CurrentClient, CurrentService
from serving.streams import cancel_on_disconnect

PIECE_TOKENS = 10_000  # that are written before others have their turn

token_routes = APIRouter(tags=["tokens"], route_class=BoundedRoute)


async def list_in_json(values: Sequence[int | str]) -> bytes:
    """A list that may be long, written piece by piece."""
    pieces = []
    for start in range(0, len(values), PIECE_TOKENS):
        pieces.append(in_json(values[start : start + PIECE_TOKENS])[1:-1])
        await asyncio.sleep(0)
    return b"[%b]" % b",".join(pieces)


@token_routes.post("/tokenize", response_model=models.TokenizeResponse, responses=TOKEN_ERRORS)
async def tokenize(
    http: Request, body: models.TokenizeRequest, client: CurrentClient, service: CurrentService
) -> Any:
    """The token ids of a text, or of a conversation as the model reads it."""
    backend = service.backend(body.model)
    add_to_log(model=backend.name)
    tokens = await cancel_on_disconnect(http, backend.tokenize(body, client=client))
    head = in_json({"count": len(tokens.token_ids), "max_model_len": backend.max_model_len})
    token_ids = await list_in_json(tokens.token_ids)
    token_strs = b"null" if tokens.token_strs is None else await list_in_json(tokens.token_strs)
    content = b'%b,"tokens":%b,"token_strs":%b}' % (head.removesuffix(b"}"), token_ids, token_strs)
    return Response(content, media_type="application/json")


@token_routes.post("/detokenize", response_model=models.DetokenizeResponse, responses=TOKEN_ERRORS)
async def detokenize(
    http: Request, body: models.DetokenizeRequest, client: CurrentClient, service: CurrentService
) -> Any:
    """The text of token ids."""
    backend = service.backend(body.model)
    add_to_log(model=backend.name)
    text = await cancel_on_disconnect(http, backend.detokenize(body, client=client))
    return {"prompt": text}


@token_routes.head("/tokenizer_info", include_in_schema=False)
@token_routes.get(
    "/tokenizer_info", response_model=models.TokenizerConfig, responses=TOKENIZER_ERRORS
)
async def describe_tokenizer(
    query: Annotated[models.ModelChoice, Query()], service: CurrentService
) -> Any:
    """The special tokens of a model, and its chat template."""
    return service.backend(query.model).tokenizer_config
