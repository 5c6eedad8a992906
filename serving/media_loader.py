"""How the models of media/ are made, where settings name one. Nobody else imports media/."""

import sys
from functools import partial
from importlib.util import find_spec
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from engine import available_cores
from serving.content_filter import ContentFilter
from serving.logs import add_to_log
from serving.settings import Settings, refuse_setting

if TYPE_CHECKING:
    from media.backend import MediaBackend

logger = getLogger("service")

REQUIREMENTS = ("diffusers", "accelerate", "peft", "av", "PIL")


class Kind(NamedTuple):
    """What a kind of result needs: the setting that names its model, and what loads that."""

    setting: str
    maker: str


KINDS = {  # as paths have them
    "audio": Kind("AUDIO_MODEL", "media.audio:AudioMaker"),
    "image": Kind("IMAGE_MODEL", "media.image:ImageMaker"),
    "video": Kind("VIDEO_MODEL", "media.video:VideoMaker"),
    "3d": Kind("SHAPE_MODEL", "media.shape:ShapeMaker"),
}


def begin_media(settings: Settings, content_filter: ContentFilter) -> dict[str, "MediaBackend"]:
    """The models that settings name, by kind; each has begun to load in a process of its own.

    Ends the process where requirements-media.txt has not been installed."""
    if settings.image_lora and not settings.image_model:
        refuse_setting("IMAGE_LORA", "needs an IMAGE_MODEL")
    sources = {kind: getattr(settings, KINDS[kind].setting.lower()) for kind in KINDS}
    named = {kind: source for kind, source in sources.items() if source}
    if named and not all(map(find_spec, REQUIREMENTS)):
        setting = KINDS[next(iter(named))].setting
        refuse_setting(setting, "needs what requirements-media.txt installs")
    return {kind: begin_model(kind, named[kind], settings, content_filter) for kind in named}


def begin_model(
    kind: str, source: str, settings: Settings, content_filter: ContentFilter
) -> "MediaBackend":
    from media.backend import Bounds, MediaBackend
    from media.worker import Worker
    from serving.media_metrics import MediaMetrics

    name = Path(source).resolve().name if Path(source).is_dir() else source
    options = {"source": source}
    if kind == "image" and settings.image_lora:
        options["lora"] = settings.image_lora
    metrics = MediaMetrics(kind, name)
    worker = Worker(
        name=name,
        maker=KINDS[kind].maker,
        options=options,
        num_threads=settings.torch_num_threads or available_cores(),
        max_queue_size=settings.media_queue_size,
        on_end=metrics.observe,
    )
    metrics.watch(worker)
    worker.begin_loading()
    bounds = Bounds(
        steps=settings.max_media_steps,
        size=settings.max_side_pixels,
        seconds=settings.max_audio_seconds,
        num_frames=settings.max_video_frames,
        grid_size=settings.max_grid_size,
    )
    log_prompt = partial(add_prompt_to_log, settings.log_prompts)
    return MediaBackend(
        name, worker, content_filter, bounds, settings.media_timeout_seconds, log_prompt
    )


def add_prompt_to_log(is_wanted: bool, prompt: str) -> None:
    if is_wanted:
        add_to_log(prompt=prompt)


def finish_media(media: dict[str, "MediaBackend"]) -> None:
    """Waits until they are loaded. Ends the process with a line for one that cannot be."""
    if not media:
        return
    from media.worker import CannotLoad

    for kind, backend in media.items():
        try:
            backend.worker.finish_loading()
        except CannotLoad as error:
            sys.exit(f"{KINDS[kind].setting}: cannot load {backend.name!r}: {error}")
        logger.info("loaded %s for /generate/%s", backend.name, kind)
        backend.worker.start()
