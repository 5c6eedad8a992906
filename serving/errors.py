"""How errors are worded, in the words of either family of routes.

Knows no torch: the proxies of ray_serve.py word their own errors with it.
"""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Scope

RETRY_AFTER_SECONDS = 1
OVERLOADED = "Too many requests are waiting; try again shortly"
UNEXPECTED = "Internal server error"
STOPPING = "The service is stopping"
FORBIDDEN_PROMPT = "Prompt contains inappropriate content"
UNREACHABLE = "The external model cannot be reached; try again shortly"
BUSY = "The external model takes no more requests; try again shortly"
REFUSED = "The external model refused the request"


def route_path(scope: Scope) -> str:
    """The path as routes have it, without the prefix that a proxy has stripped and uvicorn's
    `--root-path` has put back. Starlette's routes go by the same."""
    # Starlette keeps the root path here once it has come to mounted files.
    prefix: str = scope.get("app_root_path", scope.get("root_path", ""))
    path: str = scope["path"]
    return path.removeprefix(prefix) if prefix else path


def is_openai_path(path: str) -> bool:
    return path.startswith("/v1/") or path == "/v1"


def openai_error(
    status: int, message: Any, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """https://platform.openai.com/docs/guides/error-codes"""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_body(
    path: str, status: int, detail: Any, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error in the words of the path's family; param and code: of OpenAI's."""
    if is_openai_path(path):
        return openai_error(status, detail, param=param, code=code)
    return {"detail": detail}


def error_response(
    scope: Scope,
    status: int,
    detail: Any,
    headers: Mapping[str, str] | None = None,
    *,
    param: str | None = None,
    code: str | None = None,
) -> JSONResponse:
    """An answer with that body."""
    body = error_body(route_path(scope), status, detail, param=param, code=code)
    return JSONResponse(body, status, headers)


def retry_after(seconds: int = RETRY_AFTER_SECONDS) -> dict[str, str]:
    """The header of an answer that says to come again."""
    return {"Retry-After": str(seconds)}
