"""Videos, by any pipeline of diffusers that makes them from text."""

from fractions import Fraction
from io import BytesIO
from typing import Any

import av
import numpy as np
from diffusers import DiffusionPipeline

from media.diffusion import DiffusionMaker
from media.loading import from_cache_or_hub, pick_device
from media.messages import Made, OnStep


class VideoMaker(DiffusionMaker):
    """source: a folder or a Hugging Face id. Raises ValueError for a pipeline of another kind."""

    def __init__(self, source: str):
        dtype = pick_device()[1]
        pipeline = from_cache_or_hub(DiffusionPipeline.from_pretrained, source, dtype=dtype)
        if not hasattr(pipeline, "video_processor"):
            raise ValueError(f"{type(pipeline).__name__} makes no videos")
        super().__init__(pipeline)

    def make(self, fields: dict[str, Any], on_step: OnStep) -> Made:
        """An MP4."""
        frames = self.run(fields, on_step, output_type="np").frames[0]
        return Made(encode_mp4(frames, fields["frames_per_second"]), "video/mp4")


def encode_mp4(frames: np.ndarray, frames_per_second: int) -> bytes:
    """H.264 as browsers play it.

    frames: (num_frames, height, width, 3), from 0 to 1."""
    content = BytesIO()
    with av.open(content, "w", format="mp4") as container:
        # With B-frames x264 now and then gives other bytes of the same frames.
        options = {"bf": "0"}
        stream = container.add_stream("libx264", Fraction(frames_per_second), options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in np.ascontiguousarray((frames * 255).round().clip(0, 255), np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    return content.getvalue()
