"""What a model's tokenizer does, in vLLM's shapes: `POST /tokenize`, `POST /detokenize` and
`GET /tokenizer_info`. Nothing is generated, so the content filter has no say here."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

import models
from serving.bodies import BoundedRoute
from serving.documentation import TOKEN_ERRORS, TOKENIZER_ERRORS
from serving.json_pieces import PiecewiseJson, json_pieces
from serving.logs import add_to_log
from serving.service import CurrentClient, CurrentService
from serving.streams import cancel_on_disconnect

token_routes = APIRouter(tags=["tokens"], route_class=BoundedRoute)


@token_routes.post("/tokenize", response_model=models.TokenizeResponse, responses=TOKEN_ERRORS)
async def tokenize(
    http: Request, body: models.TokenizeRequest, client: CurrentClient, service: CurrentService
) -> Any:
    """The token ids of a text, or of a conversation as the model reads it."""
    backend = service.backend(body.model)
    add_to_log(model=backend.name)
    tokens = await cancel_on_disconnect(http, backend.tokenize(body, client=client))
    content = {
        "count": len(tokens.token_ids),
        "max_model_len": backend.max_model_len,
        "tokens": tokens.token_ids,
        "token_strs": tokens.token_strs,
    }
    return PiecewiseJson(await json_pieces(content))


@token_routes.post("/detokenize", response_model=models.DetokenizeResponse, responses=TOKEN_ERRORS)
async def detokenize(
    http: Request, body: models.DetokenizeRequest, client: CurrentClient, service: CurrentService
) -> Any:
    """The text of token ids."""
    backend = service.backend(body.model)
    add_to_log(model=backend.name)
    text = await cancel_on_disconnect(http, backend.detokenize(body, client=client))
    return PiecewiseJson(await json_pieces({"prompt": text}))


@token_routes.head("/tokenizer_info", include_in_schema=False)
@token_routes.get(
    "/tokenizer_info", response_model=models.TokenizerConfig, responses=TOKENIZER_ERRORS
)
async def describe_tokenizer(
    query: Annotated[models.ModelChoice, Query()], service: CurrentService
) -> Any:
    """The special tokens of a model, and its chat template."""
    return service.backend(query.model).tokenizer_config
