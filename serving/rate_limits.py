"""Requests and tokens a minute, for each client.

Requests count as they come. The tokens that a request may cost at most are reserved before it is
queued, and what it did not take is given back at its end: so requests at the same time do not pass
the limit together.
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from logging import getLogger

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.counts import Count, StorageError
from serving.errors import error_response, retry_after, route_path
from serving.logs import first_line, request_generations
from serving.metrics import RATE_LIMIT_REFUSALS
from serving.middleware import is_open
from serving.settings import Settings, open_counts

logger = getLogger("service")

STORAGE_TIMEOUT_SECONDS = 1.0  # for the counts that a request's limits look up
STORAGE_PAUSE_SECONDS = 10.0  # for which nothing is limited, after the storage has failed


class LimitReached(Exception):
    """There is no room in the limit until its window ends. Recoverable."""

    def __init__(self, name: str, limit: int, wait_seconds: int):
        super().__init__(name)
        self.name, self.limit, self.wait_seconds = name, limit, wait_seconds


class AboveLimit(Exception):
    """The request may cost more tokens than the limit allows in a whole minute. Unrecoverable."""

    def __init__(self, limit: int):
        super().__init__(limit)
        self.limit = limit


def limit_refusal(scope: Scope, error: LimitReached) -> JSONResponse:
    """The 429, counted."""
    RATE_LIMIT_REFUSALS.labels(error.name).inc()
    detail = f"Over the limit of {error.limit} {error.name} a minute"
    headers = retry_after(error.wait_seconds)
    return error_response(scope, 429, detail, headers, code="rate_limit_exceeded")


class RateLimits:
    """The limits of every client, and where they are counted."""

    def __init__(self, settings: Settings):
        amounts = {"requests": settings.rate_limit, "tokens": settings.token_rate_limit}
        self.amounts = {name: amount for name, amount in amounts.items() if amount}
        self.count_prompts = settings.rate_limit_prompts
        self.counts = open_counts(settings.rate_limit_storage)
        self.paused_until_seconds = 0.0

    @property
    def is_paused(self) -> bool:
        return time.monotonic() < self.paused_until_seconds

    @asynccontextmanager
    async def counting(self) -> AsyncGenerator[None]:
        """Around look-ups of counts. Fail open: while their storage is down, nothing is limited;
        and it is not asked again for every request."""
        try:
            async with asyncio.timeout(STORAGE_TIMEOUT_SECONDS):
                yield
        except (StorageError, TimeoutError) as error:
            if not self.is_paused:
                pause = STORAGE_PAUSE_SECONDS
                logger.error("no rate limits for %g s: %s", pause, first_line(error))
            self.paused_until_seconds = time.monotonic() + STORAGE_PAUSE_SECONDS


class Allowance:
    """What one request takes of its client's limits, and the headers that tell of them."""

    def __init__(self, limits: RateLimits, identity: str):
        self.limits = limits
        self.identity = identity
        self.headers: dict[str, str] = {}
        self._num_reserved_tokens = 0
        self._num_reserved_prompt_tokens = 0
        # The last window that some were reserved in, and how many; nothing can be given back to
        # one before it.
        self._window, self._num_in_window = "", 0

    async def admit(self) -> None:
        """Counts the request. Raises LimitReached, also when no tokens are left at all."""
        reached = None
        async with self.limits.counting():
            for name, limit in self.limits.amounts.items():
                count = await self._count(name, 1 if name == "requests" else 0)
                has_room = count.is_within if name == "requests" else count.amount < limit
                if not has_room and not reached:
                    reached = self._reached(name, count)
        if reached:
            raise reached

    async def reserve(self, num_prompt_tokens: int, num_new_tokens: int) -> None:
        """Counts what the request may cost, for one model more. Raises LimitReached, AboveLimit."""
        limit = self.limits.amounts.get("tokens")
        if not limit or self.limits.is_paused:
            return
        if not self.limits.count_prompts:
            num_prompt_tokens = 0
        num_tokens = num_prompt_tokens + num_new_tokens
        if self._num_reserved_tokens + num_tokens > limit:
            raise AboveLimit(limit)
        async with self.limits.counting():
            count = await self._count("tokens", num_tokens)
            if not count.is_within:
                raise self._reached("tokens", count)
            if count.window != self._window:
                self._window, self._num_in_window = count.window, 0
            self._num_in_window += num_tokens
            self._num_reserved_tokens += num_tokens
            self._num_reserved_prompt_tokens += num_prompt_tokens

    async def settle(self) -> None:
        """Gives back what was reserved and not taken, the first time that it is called."""
        window, self._window = self._window, ""
        if not window or self.limits.is_paused:
            return
        unused = min(self._num_reserved_tokens - self._num_taken_tokens(), self._num_in_window)
        if unused:  # negative where another server has counted more than was reckoned with
            async with self.limits.counting():
                await self.limits.counts.give_back(f"tokens/{self.identity}", unused, window)

    def _num_taken_tokens(self) -> int:
        generations = request_generations()
        num_taken = sum(each.num_generated_tokens for each in generations)
        if self.limits.count_prompts:
            nums = [each.num_prompt_tokens for each in generations]
            # One that is not known (another server counts it) costs what was reserved for it.
            num_taken += sum(nums) if all(nums) else self._num_reserved_prompt_tokens
        return num_taken

    async def _count(self, name: str, amount: int) -> Count:
        limit = self.limits.amounts[name]
        count = await self.limits.counts.add(f"{name}/{self.identity}", amount, limit)
        remaining = max(0, limit - count.amount)
        self.headers[f"X-RateLimit-Limit-{name.title()}"] = str(limit)
        self.headers[f"X-RateLimit-Remaining-{name.title()}"] = str(remaining)
        self.headers[f"X-RateLimit-Reset-{name.title()}"] = str(wait_seconds(count))
        return count

    def _reached(self, name: str, count: Count) -> LimitReached:
        return LimitReached(name, self.limits.amounts[name], wait_seconds(count))


def wait_seconds(count: Count) -> int:
    """Whole seconds after which the window has ended."""
    return max(1, math.ceil(count.left_seconds))


class RateLimitMiddleware:
    """Refuses requests of a `client_identity` that has used up a limit, and puts into the scope
    with what a backend reserves tokens."""

    def __init__(self, app: ASGIApp, settings: Settings):
        self.app = app
        self.limits = RateLimits(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_limited = scope["type"] == "http" and self.limits.amounts and not self.limits.is_paused
        if not is_limited or is_open(path := route_path(scope)) or path == "/metrics":
            return await self.app(scope, receive, send)
        allowance = Allowance(self.limits, scope["client_identity"])

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(allowance.headers)
            elif message["type"] == "http.response.body" and not message.get("more_body"):
                # Before the client can know that it has all, and asks for more.
                await allowance.settle()
            await send(message)

        try:
            await allowance.admit()
        except LimitReached as error:
            return await limit_refusal(scope, error)(scope, receive, send_with_limits)
        scope["reserve_tokens"] = allowance.reserve
        try:
            await self.app(scope, receive, send_with_limits)
        finally:
            await allowance.settle()
