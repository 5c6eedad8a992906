"""Errors become answers here, and are counted here: those of the domain, of FastAPI, all others."""

from traceback import clear_frames
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException

from backends.base import (
    Busy,
    ContextExceeded,
    DeadlineExceeded,
    ForbiddenPrompt,
    InvalidField,
    JobFailed,
    JobRefused,
    MediaQueueFull,
    NoChatTemplate,
    Refused,
    Unreachable,
)
from engine import (
    CANNOT_BE_FOLLOWED,
    ConstraintFailed,
    EngineStoppedError,
    InferenceError,
    QueueFullError,
)
from serving.bodies import TooManyParts
from serving.errors import (
    BUSY,
    FORBIDDEN_PROMPT,
    OVERLOADED,
    REFUSED,
    STOPPING,
    UNEXPECTED,
    UNREACHABLE,
    error_response,
    is_openai_path,
    retry_after,
    route_path,
)
from serving.metrics import FAILED_REQUESTS, FILTER_HITS, QUEUE_REFUSALS
from serving.rate_limits import AboveLimit, LimitReached, limit_refusal
from serving.registry import UnknownModel
from serving.reserved_paths import reserved
from serving.streams import ClientGone

# What may end a text that has begun.
FAILURES = (DeadlineExceeded, InferenceError, EngineStoppedError)


def failure_message(error: Exception) -> str:
    """What a client is told of an error that ended its text; the cause is in the log."""
    if isinstance(error, DeadlineExceeded):
        return f"The request took longer than {error.seconds:g} seconds"
    if isinstance(error, JobFailed):
        return error.reason
    if isinstance(error, ConstraintFailed):
        return str(error)
    return STOPPING if isinstance(error, EngineStoppedError) else "Model inference failed"


def count_failure(error: Exception) -> None:
    """Counts an admitted request that ended with an error, other than in what it asked for."""
    if isinstance(error, JobRefused):
        return
    reasons = {
        DeadlineExceeded: "timeout",
        EngineStoppedError: "stopping",
        ConstraintFailed: "structure",
    }
    FAILED_REQUESTS.labels(reasons.get(type(error), "inference")).inc()


def refuse_fields(http: Request, problems: list[dict[str, Any]]) -> JSONResponse:
    """422, on `/v1` 400, without the input, which may be long, secret, or no valid JSON.

    problems: as FastAPI's RequestValidationError lists them.
    """

    def name(part: str | int) -> str | int:
        return part if isinstance(part, int) else part[:100].encode(errors="replace").decode()

    def place(problem: dict[str, Any]) -> list[str | int]:
        # A validator of a whole object says which field it means.
        meant = [problem["ctx"]["param"]] if "param" in problem.get("ctx", {}) else []
        return [name(part) for part in (*problem["loc"], *meant)]

    told = [
        {"loc": place(each), "msg": each["msg"], "type": each["type"]} for each in problems[:20]
    ]
    if not is_openai_path(route_path(http.scope)):
        return error_response(http.scope, 422, told)
    first = problems[0]
    path = [str(part) for part in told[0]["loc"][1:] if first["type"] != "json_invalid"]
    param = path[0] if path else None
    reason = first["msg"].removeprefix("Value error, ")
    message = f"{'.'.join(path) or 'body'}: {reason}"
    return error_response(http.scope, 400, message, param=param)


def value_error(*loc: str, msg: str) -> dict[str, Any]:
    """A problem as FastAPI lists them."""
    return {"type": "value_error", "loc": loc, "msg": msg}


def input_place(http: Request) -> str:
    """Where a route's fields come from, as FastAPI calls it."""
    return "query" if http.method == "GET" else "body"


async def refuse_invalid(http: Request, error: RequestValidationError) -> JSONResponse:
    problems = list(error.errors())
    # FastAPI's frames hold these errors, and the errors the frames: without this the body would
    # stay until the garbage collector comes that way.
    clear_frames(error.__traceback__)
    for problem in problems:
        cause = problem.get("ctx", {}).get("error")
        if isinstance(cause, Exception):  # what a validator of models.py raised
            cause.__traceback__ = None
    return refuse_fields(http, problems)


async def refuse_many_parts(http: Request, error: TooManyParts) -> JSONResponse:
    return refuse_fields(http, [value_error("body", msg=error.detail)])


async def refuse_field(http: Request, error: InvalidField) -> JSONResponse:
    return refuse_fields(http, [value_error(input_place(http), error.field, msg=error.reason)])


async def refuse_forbidden_prompt(http: Request, error: ForbiddenPrompt) -> JSONResponse:
    FILTER_HITS.labels("prompt").inc()
    return error_response(
        http.scope, 400, FORBIDDEN_PROMPT, param=error.field, code="content_filter"
    )


async def refuse_long_prompt(http: Request, error: ContextExceeded) -> JSONResponse:
    message = (
        f"This model's maximum context length is {error.context_tokens} tokens, and your prompt "
        f"has {error.num_prompt_tokens}: it leaves no room for a completion"
    )
    code = "context_length_exceeded"
    return error_response(http.scope, 400, message, param="prompt", code=code)


async def refuse_chat(http: Request, error: NoChatTemplate) -> JSONResponse:
    message = f"{error.model_name} has no chat template: use /v1/completions, or set CHAT_TEMPLATE"
    return error_response(http.scope, 400, message, param="model")


async def refuse_unknown_model(http: Request, error: UnknownModel) -> JSONResponse:
    served = ", ".join(error.served_names)
    if is_openai_path(route_path(http.scope)):
        message = f"The model does not exist; served: {served}"
        return error_response(http.scope, 404, message, param="model", code="model_not_found")
    return error_response(http.scope, 404, f"No such model; served: {served}")


async def report_refused(http: Request, error: Refused) -> JSONResponse:
    if is_openai_path(route_path(http.scope)):
        return error_response(http.scope, 400, REFUSED, code=error.code)
    return refuse_fields(http, [value_error(input_place(http), msg=REFUSED)])


async def refuse_over_limit(http: Request, error: LimitReached) -> JSONResponse:
    return limit_refusal(http.scope, error)


async def refuse_above_limit(http: Request, error: AboveLimit) -> JSONResponse:
    reason = f"may cost more than the limit of {error.limit} tokens a minute: ask for fewer"
    return refuse_fields(http, [value_error(input_place(http), msg=reason)])


async def refuse_for_now(http: Request, error: Exception) -> JSONResponse:
    details = {
        QueueFullError: OVERLOADED,
        MediaQueueFull: OVERLOADED,
        EngineStoppedError: STOPPING,
        Unreachable: UNREACHABLE,
        Busy: BUSY,
    }
    if isinstance(error, QueueFullError):
        QUEUE_REFUSALS.inc()
    if isinstance(error, Busy | MediaQueueFull):
        headers = retry_after(error.retry_after_seconds)
    else:
        headers = retry_after()
    return error_response(http.scope, 503, details[type(error)], headers)


async def refuse_job(http: Request, error: JobRefused) -> JSONResponse:
    return refuse_fields(http, [value_error(input_place(http), msg=error.reason)])


async def report_failed_inference(http: Request, error: InferenceError) -> JSONResponse:
    count_failure(error)
    return error_response(http.scope, 500, failure_message(error))


async def refuse_constraint(http: Request, error: ConstraintFailed) -> JSONResponse:
    count_failure(error)
    return refuse_fields(http, [value_error("body", error.field, msg=CANNOT_BE_FOLLOWED)])


async def report_timeout(http: Request, error: DeadlineExceeded) -> JSONResponse:
    count_failure(error)
    return error_response(http.scope, 504, failure_message(error))


async def close_for_nobody(_: Request, error: ClientGone) -> Response:
    return Response(status_code=499)


def allowed_methods(app: FastAPI, path: str) -> set[str]:
    """The methods of all routes on this path, not of the first alone; those of a file if none.
    Empty where there is nothing, as on a path that is reserved."""
    routes = [route for route in iter_route_contexts(app.routes) if route.methods]
    first = next((route.path for route in routes if route.path_regex.match(path)), None)
    if first == "/{prompt}" and reserved(path):
        return set()
    methods = {m for route in routes if route.path == first for m in route.methods or ()}
    return methods or {"GET", "HEAD"}


async def report_refusal(http: Request, error: HTTPException) -> Response:
    """What FastAPI and Starlette raise."""
    if error.status_code == 400:  # which only FastAPI raises, for a body that it cannot read
        return refuse_fields(http, [value_error("body", msg="not valid JSON")])
    path = route_path(http.scope)
    allowed = allowed_methods(http.app, path) if error.status_code == 405 else set()
    if error.status_code in (404, 405) and not allowed and (reason := reserved(path)):
        return error_response(http.scope, 404, reason)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(sorted(allowed))
        if http.method == "OPTIONS":
            return Response(status_code=204, headers=headers)
    return error_response(http.scope, error.status_code, error.detail, headers)


async def report_unexpected(http: Request, error: Exception) -> JSONResponse:
    """500 for an error of the middleware itself, from outside of it, so it brings the id along."""
    headers = {"X-Request-ID": http.scope["request_id"]}
    return error_response(http.scope, 500, UNEXPECTED, headers)


HANDLERS: dict[type[Exception], Any] = {
    RequestValidationError: refuse_invalid,
    TooManyParts: refuse_many_parts,
    InvalidField: refuse_field,
    ForbiddenPrompt: refuse_forbidden_prompt,
    ContextExceeded: refuse_long_prompt,
    NoChatTemplate: refuse_chat,
    UnknownModel: refuse_unknown_model,
    LimitReached: refuse_over_limit,
    AboveLimit: refuse_above_limit,
    Refused: report_refused,
    QueueFullError: refuse_for_now,
    EngineStoppedError: refuse_for_now,
    Unreachable: refuse_for_now,
    Busy: refuse_for_now,
    JobRefused: refuse_job,
    InferenceError: report_failed_inference,
    ConstraintFailed: refuse_constraint,
    DeadlineExceeded: report_timeout,
    ClientGone: close_for_nobody,
    HTTPException: report_refusal,
    Exception: report_unexpected,
}


def add_error_handlers(app: FastAPI) -> None:
    for error, handler in HANDLERS.items():
        app.add_exception_handler(error, handler)
