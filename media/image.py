"""Pictures, by any pipeline of diffusers that makes them from text."""

from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoPipelineForText2Image

from media.diffusion import DiffusionMaker
from media.loading import from_cache_or_hub, pick_device
from media.messages import Made, OnStep, RefusedFields

PREVIEW_LATENTS = 32  # a side; more would take longer than a picture in passing is worth


class ImageMaker(DiffusionMaker):
    """source: a folder or a Hugging Face id; lora: of weights that are added to the model's own, or
    their file."""

    def __init__(self, source: str, lora: str | None = None):
        dtype = pick_device()[1]
        pipeline = from_cache_or_hub(AutoPipelineForText2Image.from_pretrained, source, dtype=dtype)
        if lora:
            try:
                add_lora(pipeline, lora)
            except Exception as error:  # of many libraries, each with errors of its own
                raise ValueError(f"the weights of IMAGE_LORA: {error}") from error
        super().__init__(pipeline)

    def make(self, fields: dict[str, Any], on_step: OnStep) -> Made:
        """A PNG. Raises RefusedFields for a picture that the model's own checker withholds."""
        made = self.run(fields, on_step)
        if any(getattr(made, "nsfw_content_detected", None) or []):
            raise RefusedFields("The model's safety checker withheld what came of this prompt")
        content = BytesIO()
        made.images[0].save(content, "PNG")
        return Made(content.getvalue(), "image/png")

    def preview(self, latents: torch.Tensor) -> bytes | None:
        """The latents, made smaller, decoded as the picture will be."""
        vae: Any = getattr(self.pipeline, "vae", None)
        config = getattr(vae, "config", {})
        if latents.dim() != 4 or latents.shape[1] != config.get("latent_channels"):
            return None  # some pipelines pack them
        excess = -(-max(latents.shape[2:]) // PREVIEW_LATENTS)
        small = torch.nn.functional.avg_pool2d(latents, excess)
        shift = config.get("shift_factor") or 0
        with torch.inference_mode():
            decoded = vae.decode(small / config["scaling_factor"] + shift).sample
        content = BytesIO()
        self.pipeline.image_processor.postprocess(decoded)[0].save(content, "JPEG")
        return content.getvalue()


def add_lora(pipeline: Any, source: str) -> None:
    """Adds them for good: a step then takes no longer than without. Raises ValueError for a folder
    with several files."""
    if Path(source).is_dir():
        files = list(Path(source).glob("*.safetensors"))
        if len(files) != 1:
            raise ValueError("there is to be one .safetensors file in that folder: name a file")
        source = str(files[0])
    from_cache_or_hub(pipeline.load_lora_weights, source)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
