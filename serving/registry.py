"""The served models by name."""

import asyncio
import sys
from logging import getLogger

from backends.base import Backend
from backends.local import LocalBackend
from serving.content_filter import ContentFilter
from serving.logs import first_line
from serving.model_loader import LoadPipeline, ModelLoader
from serving.model_sources import (
    BUNDLED_MODEL,
    cached_folder,
    hub_has,
    is_external,
    parse_model_names,
)
from serving.model_swapper import ModelSwapper
from serving.settings import Settings

logger = getLogger("service")


class UnknownModel(Exception):
    """No model is served under the name that was asked for."""

    def __init__(self, served_names: list[str]):
        super().__init__()
        self.served_names = served_names


class ModelRegistry:
    """The served models by name, the default one first.

    aliases, own_names: further names of these models; own_names are not listed.
    """

    def __init__(
        self,
        backends: dict[str, Backend],
        swapper: ModelSwapper | None = None,
        aliases: dict[str, str] | None = None,
        own_names: dict[str, str] | None = None,
    ):
        self.backends = backends
        self.swapper = swapper or ModelSwapper()
        self.aliases = aliases or {}
        self.own_names = own_names or {}

    @property
    def default(self) -> Backend:
        return next(iter(self.backends.values()))

    @property
    def names(self) -> list[str]:
        return [*self.backends, *self.aliases]

    @property
    def loaded_names(self) -> list[str]:
        """The models that are in this process's memory."""
        return [name for name, backend in self.backends.items() if backend.is_loaded]

    @property
    def num_unfinished(self) -> int:
        """Sequences that run or wait."""
        return sum(each.num_running + each.num_waiting for each in self.backends.values())

    @property
    def is_computing(self) -> bool:
        """Whether a model that runs here has a sequence that runs or waits."""
        return any(
            each.engine and each.num_running + each.num_waiting for each in self.backends.values()
        )

    def get(self, name: str | None) -> Backend:
        """The model of that name, the default one for None. Raises UnknownModel."""
        if not name:
            return self.default
        name = self.aliases.get(name) or self.own_names.get(name, name)
        if name not in self.backends:
            raise UnknownModel(self.names)
        return self.backends[name]

    def start(self) -> None:
        """Takes requests, again after `stop`. To be called on the event loop."""
        for backend in self.backends.values():
            backend.start()
        self.swapper.start()

    async def stop(self) -> None:
        await self.stop_backends()
        await asyncio.to_thread(self.swapper.stop)

    async def stop_backends(self) -> None:
        """Whatever they still hold ends with EngineStoppedError."""
        backends = self.backends.values()
        await asyncio.gather(*(asyncio.to_thread(backend.stop) for backend in backends))


def load_models(
    settings: Settings, content_filter: ContentFilter, load_pipeline: LoadPipeline
) -> ModelRegistry:
    """The models of MODEL_NAME, loaded.

    A named model that cannot be loaded ends the process with one line. Without a name it is
    `gpt2` where that can be had within seconds, else the bundled model, with a warning.
    """
    swapper = ModelSwapper()
    loader = ModelLoader(settings, content_filter, load_pipeline, swapper.needed.put)
    if settings.model_name is None:
        backend = load_default(loader)
        return ModelRegistry({backend.name: backend}, swapper)
    names = parse_model_names(settings.model_name)
    sources = names.sources
    backends: dict[str, Backend] = {
        name: loader.connect_external(name, source)
        for name, source in sources.items()
        if is_external(source)
    }
    local_names = [name for name in sources if name not in backends]
    most = settings.max_loaded_models or len(local_names)
    local = load_named(loader, {name: sources[name] for name in local_names}, most)
    backends |= {backend.name: backend for backend in local}
    if most < len(local):
        swapper.take_charge(local, most, lambda each: loader.reload(each, sources[each.name]))
    backends = {name: backends[name] for name in sources}
    return ModelRegistry(backends, swapper, names.aliases, names.own_names)


def load_default(loader: ModelLoader) -> LocalBackend:
    """`gpt2` from the local cache or the hub, else the bundled model."""
    try:
        if (folder := cached_folder("gpt2")) or hub_has("gpt2"):
            return loader.load_local("gpt2", folder or "gpt2")
        reason = "neither in the local cache nor to be had from the hub"
    except Exception as error:  # whatever is wrong with it, there is another
        reason = f"not to be loaded ({first_line(error)})"
    name = BUNDLED_MODEL.name
    logger.warning("gpt2 is %s: serving %s, the small bundled model", reason, name)
    return loader.load_local(name, str(BUNDLED_MODEL))


def load_named(loader: ModelLoader, sources: dict[str, str], max_loaded: int) -> list[LocalBackend]:
    """Each model, loaded once to see that it can be; only the first so many stay in memory."""
    backends: list[LocalBackend] = []
    # From the last to the first: what leaves memory does so before what stays is loaded.
    for name in reversed(sources):
        try:
            backend = loader.load_local(name, sources[name])
            if len(sources) - len(backends) > max_loaded:
                backend.unload()
        except Exception as error:  # of many libraries, each with errors of its own
            logger.debug("cannot load %s", name, exc_info=True)
            sys.exit(f"MODEL_NAME: cannot load {name!r}: {first_line(error)}")
        backends.append(backend)
    return backends[::-1]
