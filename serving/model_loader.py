"""Makes backends as the settings say."""

import re
import sys
import time
from collections.abc import Callable
from functools import partial
from logging import getLogger
from typing import Any
from urllib.parse import unquote

import httpx
import torch
from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
from huggingface_hub.utils.tqdm import enable_progress_bars
from pydantic import SecretStr
from transformers.utils.logging import disable_progress_bar

from backends.base import InvalidField
from backends.external import ExternalBackend
from backends.generation_config import AuthorsDefaults, read_generation_config
from backends.local import LocalBackend
from backends.reader import Reader
from backends.upstream import Upstream
from engine import Engine, available_cores, choose_kernel, native_dtype
from serving.chat_templates import EVERY_OTHER, read_chat_templates
from serving.content_filter import ContentFilter
from serving.logs import add_to_log, request_id
from serving.metrics import ModelMetrics
from serving.model_sources import is_external, parse_model_names
from serving.settings import Settings, refuse_setting

logger = getLogger("service")

LoadPipeline = Callable[[str], Any]  # from a folder or id to a text-generation pipeline
CHAT_ONLY = ";chat"  # in the source of a model whose server has no completions


def choose_dtype(settings: Settings) -> torch.dtype:
    """What a model computes in where it is not quantized."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = {"auto": native_dtype(device), "float32": torch.float32, "bfloat16": torch.bfloat16}
    return dtypes[settings.dtype]


def choose_quantization(settings: Settings) -> str | None:
    """As the engine names it."""
    return None if settings.quantization == "none" else settings.quantization


def choose_precision(settings: Settings) -> dict[str, Any]:
    """`dtype` and `device` for a pipeline: float32 where weights may be quantized.

    Ends the process where they cannot be had here.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = choose_dtype(settings)
    try:
        if settings.quantization != "int8":
            choose_kernel(dtype, device, None)
        kernel = choose_kernel(dtype, device, choose_quantization(settings))
    except ValueError as error:
        refuse_setting("QUANTIZATION" if settings.quantization == "int8" else "DTYPE", error)
    return {"dtype": torch.float32 if kernel.is_exact else dtype, "device": device}


def choose_num_threads(settings: Settings) -> int | None:
    """How many threads compute, None for as many as are useful to each model. More than there are
    cores are said to be slow."""
    cores, num_threads = available_cores(), settings.torch_num_threads
    if num_threads and num_threads > cores:
        logger.warning(
            "TORCH_NUM_THREADS is %d, more than the cores that the process may use (%d): threads "
            "that wait for a core make every step slower",
            num_threads,
            cores,
        )
    return num_threads


def read_external_keys(settings: Settings) -> dict[str, SecretStr]:
    """The keys of EXTERNAL_API_KEYS by the name of their model. Ends the process for an entry that
    is no `name=key`, or not of an external model, without repeating it: it may be a key."""
    if settings.external_api_keys is None:
        return {}
    sources = parse_model_names(settings.model_name).sources if settings.model_name else {}
    keys: dict[str, SecretStr] = {}
    entries = settings.external_api_keys.get_secret_value().split(",")
    for place, entry in enumerate(filter(str.strip, entries), start=1):
        name, equals, key = (part.strip() for part in entry.partition("="))
        if not equals or name in keys or not is_external(sources.get(name, "")):
            reason = "is no name=key, the name being that of one external model in MODEL_NAME"
            refuse_setting("EXTERNAL_API_KEYS", f"entry {place} {reason}")
        keys[name] = SecretStr(key)
    return keys


def log_prompts(prompts: str | list[str]) -> None:
    """Puts prompts into the request's log line."""
    add_to_log(prompt=prompts)


def tell_of_defaults(name: str, defaults: AuthorsDefaults) -> None:
    """Logs what a model's generation_config.json changes, and what of it is left out."""
    of_openai = [f"{field}={value}" for field, value in defaults.sampling.items()]
    if defaults.max_new_tokens:
        of_openai.append(f"max_new_tokens={defaults.max_new_tokens} (chat)")
    if of_openai or defaults.rule_names:
        logger.info(
            "generation_config.json of %s: default on /v1: %s; in force on every route: %s; "
            "GENERATION_CONFIG=none turns this off",
            name,
            ", ".join(of_openai) or "nothing",
            ", ".join(defaults.rule_names) or "nothing",
        )
    if defaults.not_applied:
        logger.warning(
            "generation_config.json of %s asks for %s, which is not applied",
            name,
            ", ".join(defaults.not_applied),
        )


def show_only_downloads() -> None:
    """Gives a download a progress bar where standard error is a terminal, and nothing else one."""
    disable_progress_bar()
    if sys.stderr.isatty() and not HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()


class ModelLoader:
    """Makes backends as the settings say, and loads their models again.

    load_pipeline: makes a text-generation pipeline of a folder or id.
    on_model_needed: called with a model's name once a request wants it that is out of memory.
    """

    def __init__(
        self,
        settings: Settings,
        content_filter: ContentFilter,
        load_pipeline: LoadPipeline,
        on_model_needed: Callable[[str], None],
    ):
        self.settings = settings
        self.content_filter = content_filter
        self.load_pipeline = load_pipeline
        self.on_model_needed = on_model_needed
        self.text_filter = content_filter if settings.filter_output else None
        self.log_prompts = log_prompts if settings.log_prompts else None
        self.reader = Reader()
        self.num_threads = choose_num_threads(settings)
        self.external_keys = read_external_keys(settings)
        self.chat_templates = read_chat_templates(settings)

    def load_local(self, name: str, source: str) -> LocalBackend:
        """A model that runs here. Raises what transformers does for one that cannot be loaded."""
        settings, started_seconds = self.settings, time.monotonic()
        generator = self.load_pipeline(source)
        metrics = ModelMetrics(name)
        engine = Engine(
            generator.model,
            generator.tokenizer,
            max_num_seqs=settings.max_num_seqs,
            max_queue_size=settings.max_queue_size,
            max_model_len=settings.max_model_len,
            speculative_tokens=settings.speculative_tokens,
            quantization=choose_quantization(settings),
            dtype=choose_dtype(settings),
            prefix_cache_bytes=settings.prefix_cache_bytes if settings.prefix_caching else 0,
            num_threads=self.num_threads,
            text_filter=self.text_filter,
            on_step=metrics.observe,
            on_model_needed=partial(self.on_model_needed, name),
        )
        defaults = None
        if settings.generation_config == "auto":
            defaults = read_generation_config(generator.model.generation_config, engine.vocab_size)
            tell_of_defaults(name, defaults)
        backend = LocalBackend(
            name,
            generator,
            engine,
            content_filter=self.content_filter,
            request_timeout_seconds=settings.request_timeout_seconds,
            reader=self.reader,
            defaults=defaults,
            log_prompts=self.log_prompts,
        )
        self._set_chat_template(backend)
        metrics.watch(backend)
        self._tell_of_load(backend, started_seconds)
        return backend

    def _set_chat_template(self, backend: LocalBackend) -> None:
        """Gives a model the template that the settings have for it. Ends the process for one that
        does not work."""
        template = self.chat_templates.get(backend.name)
        if template is None and not backend.tokenizer.chat_template:
            template = self.chat_templates.get(EVERY_OTHER)
        if template is not None:
            try:
                backend.set_chat_template(template)
            except InvalidField as error:
                refuse_setting("CHAT_TEMPLATE", f"for {backend.name}: {error.reason}")

    def reload(self, backend: LocalBackend, source: str) -> None:
        """Brings a model back into memory. Raises as `load_local` does."""
        started_seconds = time.monotonic()
        backend.generator.model = self.load_pipeline(source).model
        backend.engine.load(backend.generator.model)
        self._tell_of_load(backend, started_seconds)

    def _tell_of_load(self, backend: LocalBackend, started_seconds: float) -> None:
        seconds = time.monotonic() - started_seconds
        ModelMetrics.LOAD.labels(backend.name).set(seconds)
        description = backend.engine.runner.description
        logger.info("loaded %s (%s) in %.1f s", backend.name, description, seconds)

    def connect_external(self, name: str, source: str) -> ExternalBackend:
        """A model on another server, which need not answer yet. source: the base of its OpenAI
        routes, after a `#` the model's name there if it is another, and `;chat` after either if
        that server has chat only."""
        settings = self.settings
        address, _, upstream_name = source.partition("#")
        has_chat_only = address.endswith(CHAT_ONLY) or upstream_name.endswith(CHAT_ONLY)
        upstream_name = unquote(upstream_name.removesuffix(CHAT_ONLY))
        try:
            url = httpx.URL(address.removesuffix(CHAT_ONLY))
        except httpx.InvalidURL:
            url = httpx.URL()
        is_address = url.scheme in ("http", "https") and url.host and (url.port or 0) < 65536
        is_plain = not (url.userinfo or url.query or ";" in url.path)  # URLs end up in logs
        if not name or not is_address or not is_plain:
            refuse_setting(
                "MODEL_NAME",
                f"{name!r} is to be served from an address that is not https://host/v1; a key "
                "belongs in EXTERNAL_API_KEY or EXTERNAL_API_KEYS",
            )
        secret = self.external_keys.get(name, settings.external_api_key)
        key_setting = "EXTERNAL_API_KEYS" if name in self.external_keys else "EXTERNAL_API_KEY"
        key = secret.get_secret_value() if secret else None
        if key and not re.fullmatch("[!-~]+", key):
            refuse_setting(key_setting, "has other than ASCII letters and signs")
        upstream = Upstream(
            name,
            str(url).rstrip("/"),
            upstream_name=upstream_name or name,
            api_key=key,
            max_num_requests=settings.max_num_seqs + settings.max_queue_size,
            key_setting=key_setting,
            has_chat_only=has_chat_only,
        )
        metrics = ModelMetrics(name)
        backend = ExternalBackend(
            upstream,
            content_filter=self.content_filter,
            text_filter=self.text_filter,
            request_timeout_seconds=settings.request_timeout_seconds,
            reader=self.reader,
            max_num_sequences=settings.max_num_seqs + settings.max_queue_size,
            request_id=request_id.get,
            on_step=metrics.observe,
            log_prompts=self.log_prompts,
        )
        metrics.watch(backend)
        logger.info("%s is on %s", name, upstream.url)
        return backend
