"""The service in replicas behind Ray Serve's proxy, each with a model of its own.

    python ray_serve.py         # on this machine; SIGTERM lets what runs end
    serve deploy serve.yaml     # on a cluster

serve.yaml has the numbers. Ray imports this module in two kinds of processes: in the replicas,
which import main.py, and in the proxies, which do not and only keep to its contract where Ray
answers in its place (`RaysAnswers`).
"""

import json
import logging
import os
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Read when ray is imported, and handed down to all its processes. On a cluster they are set there.
os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "ray_serve:proxy_middleware")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # the log has every line
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import yaml
from fastapi import HTTPException
from prometheus_client import Metric, generate_latest
from ray import serve
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import OVERLOADED, UNEXPECTED, error_body

CONFIG = Path(__file__).parent / "serve.yaml"
OBJECT_STORE_BYTES = 100_000_000  # nothing is kept there; without a limit it takes 30 % of memory
SCRAPE_TIMEOUT_SECONDS = 5.0

# --- A replica ----------------------------------------------------------------------------------


def build_app() -> ASGIApp:
    """main.py's app, with as many threads as the replica has cores."""
    cores = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    os.environ["TORCH_NUM_THREADS"] = str(max(1, int(cores)))
    try:
        import main
    except SystemExit as error:  # which Ray would not show
        raise RuntimeError(str(error)) from None

    tag = serve.get_replica_context().replica_tag

    def add_replica(record: logging.LogRecord) -> bool:
        record.replica = tag
        return True

    for handler in logging.getLogger("service").handlers:  # the engine's are the same
        handler.addFilter(add_replica)
    main.app.state.service.render_metrics = render_all_metrics
    return main.app


class Replica:
    def check_health(self) -> None:
        """Raises while an engine keeps failing, which gets the replica replaced. A full queue,
        for which `/ready` says no too, is no reason."""
        import main

        for backend in main.app.state.service.registry.backends.values():
            if not backend.is_healthy:
                raise RuntimeError(f"the engine of {backend.name} keeps failing")

    def families(self) -> list[Metric]:
        """This replica's metrics, labelled with it."""
        from prometheus_client import REGISTRY  # of the replica: it cannot be sent to one

        replica = serve.get_replica_context().replica_tag
        families = list(REGISTRY.collect())
        for family in families:
            family.samples = [
                sample._replace(labels={**sample.labels, "replica": replica})
                for sample in family.samples
            ]
        return families


class Families:
    """The metrics of several replicas; as a registry, so that the client library writes them."""

    def __init__(self) -> None:
        self.by_name: dict[str, Metric] = {}

    def add(self, families: list[Metric]) -> None:
        for family in families:
            known = self.by_name.setdefault(family.name, family)
            if known is not family:
                known.samples += family.samples

    def collect(self) -> Iterator[Metric]:
        yield from self.by_name.values()


async def render_all_metrics() -> bytes:
    """The metrics of all replicas, asked for them now; without those that die meanwhile."""
    context = serve.get_replica_context()
    handle = serve.get_deployment_handle(context.deployment, context.app_name)
    try:
        answers = await handle.broadcast("families").results_async(
            timeout_s=SCRAPE_TIMEOUT_SECONDS, return_exceptions=True
        )
    except TimeoutError:
        raise HTTPException(504, "A replica does not answer") from None
    merged = Families()
    for answer in answers:
        if not isinstance(answer, BaseException):
            merged.add(answer)
    return generate_latest(merged)


deployment = serve.deployment(serve.ingress(build_app)(Replica))
app = deployment.bind()

# --- The proxy ----------------------------------------------------------------------------------

DIED = "The replica that worked on this has died; try again"
# What Ray's proxy answers itself, by its status; none at all when a replica dies.
RAYS_ANSWERS = {
    None: (503, DIED),
    404: (503, "The service is starting or stopping"),  # no such application
    408: (504, "The request took too long"),
    503: (503, OVERLOADED),
}


class RaysAnswers:
    """Pure ASGI middleware around Ray's proxy: gives its own answers the shape of main.py's,
    ends a stream whose replica has died with an error event, and mends what the proxy does to
    the request's id: it appends it to every answer, a second time where main.py has set one."""

    VALID_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
    # A client could have a replica work on for it after it has left.
    NOT_FOR_CLIENTS = (b"x-request-disconnect-disabled", b"x-request-id")

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # Ray's own pages
            return await self.app(scope, receive, send)
        id_ = dict(scope["headers"]).get(b"x-request-id", b"")
        if not self.VALID_ID.fullmatch(id_):
            id_ = uuid.uuid4().hex.encode()
        kept = [each for each in scope["headers"] if each[0] not in self.NOT_FOR_CLIENTS]
        scope["headers"] = [*kept, (b"x-request-id", id_)]
        rays_status = begun = None
        is_complete = False

        async def forward(message: Message) -> None:
            nonlocal rays_status, begun, is_complete
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if len(headers.getlist("X-Request-ID")) == 1:  # only the proxy's
                    rays_status = message["status"]
                    return
                headers["X-Request-ID"] = id_.decode()
                begun = headers
            elif rays_status:
                return
            else:
                is_complete = not message.get("more_body", False)
            await send(message)

        await self.app(scope, receive, forward)
        if begun is None:
            status, detail = RAYS_ANSWERS.get(rays_status, (500, UNEXPECTED))
            headers = {"X-Request-ID": id_.decode()}
            if status == 503:
                headers["Retry-After"] = "1"
            body = error_body(scope["path"], status, detail)
            await JSONResponse(body, status, headers)(scope, receive, send)
        elif not is_complete and begun.get("content-type", "").startswith("text/event-stream"):
            # Any other answer is broken off, which every client notices.
            body = error_body(scope["path"], 503, DIED)
            name = "event: error\n" if "detail" in body else ""
            last = f"\n\n{name}data: {json.dumps(body)}\n\n".encode()
            await send({"type": "http.response.body", "body": last, "more_body": False})


def proxy_middleware() -> list[Middleware]:
    """Called by Ray's proxies, which RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH tells of it."""
    return [Middleware(RaysAnswers)]


# --- On this machine ----------------------------------------------------------------------------


def run(config_file: Path) -> None:
    """Serves what config_file says until SIGTERM or SIGINT; then what runs is finished.

    `serve run` would end it all at once on SIGTERM.
    """
    config = yaml.safe_load(config_file.read_text())
    (application,) = config["applications"]
    (options,) = application["deployments"]
    stopping = threading.Event()

    def stop(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
        stopping.set()

    ray.init("local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES)
    for number in (signal.SIGTERM, signal.SIGINT):  # after ray, which sets its own
        signal.signal(number, stop)
    serve.start(http_options=config["http_options"])
    name = application["name"]
    try:
        serve.run(deployment.options(**options).bind(), name=name, route_prefix="/")
    except RuntimeError as error:  # of which Ray has logged the cause
        sys.exit(str(error))
    stopping.wait()
    serve.delete(name, _blocking=False)  # the proxy stays up meanwhile, unlike with shutdown()
    while name in serve.status().applications:
        time.sleep(0.1)
    serve.shutdown()


if __name__ == "__main__":
    run(Path(sys.argv[1]) if len(sys.argv) > 1 else CONFIG)
