"""What the pipelines of diffusers have in common."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from diffusers.utils.logging import disable_progress_bar

from media.loading import pick_device
from media.messages import Loaded, OnStep, RefusedFields

disable_progress_bar()

# Our fields, and what diffusers calls them.
NAMES = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "num_frames": "num_frames",
}


class ProgressBar:
    """Stands in for the bar that pipelines draw, all of them, whether or not they have a callback:
    each step is told."""

    def __init__(self, on_step: Callable[[int, int], None], iterable: Iterable[Any], of: int):
        self.on_step = on_step
        self.iterable = iterable
        self.of = of
        self.step = 0

    def __iter__(self) -> Iterator[Any]:
        for each in self.iterable:
            yield each
            self.update()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, num_steps: int = 1) -> None:
        self.step += num_steps
        self.on_step(self.step, self.of)

    def set_description(self, *_: object) -> None:
        pass

    def close(self) -> None:
        pass


class DiffusionMaker:
    """A pipeline of diffusers, ready to be asked."""

    def __init__(self, pipeline: Any):
        self.device = pick_device()[0]
        self.pipeline = pipeline.to(self.device)
        self.parameters = inspect.signature(pipeline.__call__).parameters
        self.loaded = self.look_at_pipeline()

    def look_at_pipeline(self) -> Loaded:
        """Which fields it takes, with what defaults, as far as they can be known."""
        takes = {ours for ours, theirs in NAMES.items() if theirs in self.parameters}
        defaults = {ours: self.parameters[NAMES[ours]].default for ours in takes}
        if "width" in self.parameters:
            takes.add("size")
            defaults["size"] = self.default_size()
        # A transformer takes latents in pairs.
        multiple = self.latent_pixels * (2 if hasattr(self.pipeline, "transformer") else 1)
        known = {name: value for name, value in defaults.items() if value is not None}
        return Loaded(frozenset(takes), known, multiple, self.device)

    def default_size(self) -> tuple[int, int] | None:
        sides = tuple(self.parameters[name].default for name in ("width", "height"))
        if all(sides):
            return sides
        model = getattr(self.pipeline, "unet", None) or getattr(self.pipeline, "transformer", None)
        latents = getattr(model.config, "sample_size", None) if model else None
        return (latents * self.latent_pixels,) * 2 if isinstance(latents, int) else None

    @property
    def latent_pixels(self) -> int:
        """Pixels a side that one number of the latents stands for."""
        names = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
        known = (getattr(self.pipeline, name) for name in names if hasattr(self.pipeline, name))
        return next(known, 8)

    def run(self, fields: dict[str, Any], on_step: OnStep, **options: Any) -> Any:
        """What the pipeline gives. Raises RefusedFields for what it does not take."""
        latents: list[Any] = []  # of the last step, where the pipeline tells them
        has_begun = False

        def tell(step: int, of: int) -> None:
            nonlocal has_begun
            has_begun = True
            on_step(step, of, (lambda: self.preview(latents[0])) if latents else None)

        def keep(_pipeline: Any, _step: int, _time: Any, made: dict[str, Any]) -> dict[str, Any]:
            latents[:] = [made["latents"]]
            return {}

        def bar(iterable: Any = None, total: int = 0, **_: Any) -> ProgressBar:
            return ProgressBar(tell, iterable, total if iterable is None else len(iterable))

        self.pipeline.progress_bar = bar
        if "callback_on_step_end" in self.parameters:
            options["callback_on_step_end"] = keep
        options |= {theirs: fields[ours] for ours, theirs in NAMES.items() if ours in fields}
        if "size" in fields:
            options["width"], options["height"] = fields["size"]
        # On the CPU also for a GPU, so that a seed draws the same noise on both.
        generator = torch.Generator("cpu").manual_seed(fields["seed"])
        try:
            return self.pipeline(fields["prompt"], generator=generator, **options)
        except ValueError as error:
            if has_begun:
                raise
            reason = "The model does not take these fields together; try another size"
            raise RefusedFields(reason) from error

    def preview(self, latents: Any) -> bytes | None:
        """A JPEG; None where there is nothing to be seen."""
        return None
