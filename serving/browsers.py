"""What a page of somebody else may make a browser send here.

Whoever can reach a service without keys may use it, and every page that is open in a browser on its
machine can reach it, though it cannot read the answers:

- A page under a name that its owner then points at a loopback address (DNS rebinding) counts as one
  of the service's own, and reads them too. Its requests bring that name as their `Host`.
- An image or a script whose address is here makes the browser ask for it. Browsers say so
  (https://www.w3.org/TR/fetch-metadata/), but only to loopback addresses and over https.

JSON that a page posts without being asked about CORS comes under another content type, which
BoundedRoute refuses.
"""

import re
from ipaddress import ip_address
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.errors import error_response, route_path
from serving.middleware import PROBES, is_open
from serving.settings import Settings, refuse_setting

HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::\d*)?", re.IGNORECASE)
ALLOWED_HOST = re.compile(r"\*|(\*\.)?[a-z0-9._-]+|\[[0-9a-f:.]+\]")


def read_allowed_hosts(settings: Settings) -> list[str]:
    """The entries of ALLOWED_HOSTS, in small letters."""
    hosts = [host.strip().lower() for host in settings.allowed_hosts.split(",") if host.strip()]
    for host in hosts:
        if not ALLOWED_HOST.fullmatch(host):
            reason = "is to have names like example.com, *.example.com or [::1], without ports"
            refuse_setting("ALLOWED_HOSTS", reason)
    return hosts


def read_cors_origins(settings: Settings) -> list[str]:
    """The entries of CORS_ORIGINS."""
    return [origin.strip() for origin in settings.cors_origins.split(",") if origin.strip()]


def cors_options(settings: Settings) -> dict[str, Any]:
    """What Starlette's CORSMiddleware is to allow."""
    told = [
        f"X-RateLimit-{what}-{of}"
        for what in ("Limit", "Remaining", "Reset")
        for of in ("Requests", "Tokens")
    ]
    return {
        "allow_origins": read_cors_origins(settings),
        "allow_methods": ["GET", "HEAD", "POST"],
        # Clients add headers of their own (`x-stainless-…`, `traceparent`), and none does harm.
        "allow_headers": ["*"],
        # Chrome asks for this where a public page calls a private address.
        "allow_private_network": True,
        "expose_headers": ["X-Request-ID", "X-Seed", "Retry-After", *told],
    }


class BrowserMiddleware:
    """Refuses what a page of another site makes a browser send, and hosts that are not ours.

    allowed_hosts: none for those that need no setting.
    cors_origins: of pages that may ask for everything.
    needs_key: whether there are keys, which a page of another site does not have.
    """

    def __init__(
        self, app: ASGIApp, allowed_hosts: list[str], cors_origins: list[str], needs_key: bool
    ):
        self.app = app
        self.allowed_hosts = allowed_hosts
        self.cors_origins = cors_origins
        self.needs_key = needs_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if route_path(scope) not in PROBES and not self.is_asked_under_our_name(scope):
                # RFC 9110, 7.4: for another origin than those that the server answers for.
                detail = "Not served under this Host: ask for localhost, or add it to ALLOWED_HOSTS"
                return await error_response(scope, 421, detail)(scope, receive, send)
            if not is_open(route_path(scope)) and self.comes_from_another_site(
                Headers(scope=scope)
            ):
                detail = "A page of an origin that is not in CORS_ORIGINS may not ask for this"
                return await error_response(scope, 403, detail)(scope, receive, send)
        await self.app(scope, receive, send)

    def is_asked_under_our_name(self, scope: Scope) -> bool:
        hosts = [host_name(value) for name, value in scope["headers"] if name == b"host"]
        if self.allowed_hosts:
            return all(
                any(host_matches(host, allowed) for allowed in self.allowed_hosts) for host in hosts
            )
        server = scope.get("server")
        if self.needs_key or not server or not is_loopback(server[0]):
            return True
        return all(map(is_loopback, hosts))

    def comes_from_another_site(self, headers: Headers) -> bool:
        """Whether a page of another origin asks, and nobody has clicked on a link there."""
        if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
            return False
        if self.cors_origins == ["*"] or headers.get("origin") in self.cors_origins:
            return False
        clicked = {"mode": "navigate", "dest": "document", "user": "?1"}
        return any(headers.get(f"sec-fetch-{name}") != said for name, said in clicked.items())


def host_name(header: bytes) -> str:
    """In small letters without its port; empty if it is none."""
    match = HOST.fullmatch(header.decode("latin-1"))
    return match[1].lower().rstrip(".") if match else ""


def host_matches(name: str, pattern: str) -> bool:
    """Whether it is the pattern, which may be `*` or `*.example.com`."""
    return pattern in ("*", name) or (pattern[:2] == "*." and name.endswith(pattern[1:]))


def is_loopback(name: str) -> bool:
    """Whether a name or address leads to the machine itself whatever a name server says."""
    try:
        address = ip_address(name.strip("[]"))
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
