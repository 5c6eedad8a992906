"""Sounds, by any model of transformers that makes them from text."""

from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from huggingface_hub import snapshot_download
from transformers import pipeline

from media.loading import from_cache_or_hub, pick_device
from media.messages import Loaded, Made, OnStep, RefusedFields


class Format(NamedTuple):
    """How FFmpeg calls a container and a codec; rate: samples a second, if not the model's."""

    container: str
    codec: str
    rate: int | None = None


FORMATS = {  # by `media_type` of the fields
    "audio/wav": Format("wav", "pcm_s16le"),
    "audio/mpeg": Format("mp3", "libmp3lame"),
    "audio/ogg": Format("ogg", "libopus", 48_000),
    "audio/aac": Format("adts", "aac"),
    "audio/flac": Format("flac", "flac"),
    "audio/pcm": Format("s16le", "pcm_s16le", 24_000),  # as OpenAI has it
}
COARSE_TOKENS_PER_SECOND = 150  # of Bark, two for each of the codec's 75 frames


class AudioMaker:
    """source: a folder or a Hugging Face id."""

    def __init__(self, source: str):
        device, dtype = pick_device()
        self.pipeline = load(source, device, dtype)
        self.model = self.pipeline.model
        self.is_bark = self.model.config.model_type == "bark"
        takes = frozenset({"seconds"} if self.tokens_per_second else ())
        self.loaded = Loaded(takes, device=device)

    @property
    def tokens_per_second(self) -> float | None:
        """Of the model that decides on the length; None where that cannot be told it."""
        if self.is_bark:
            rate: float = self.model.generation_config.semantic_config["semantic_rate_hz"]
            return rate
        codec = getattr(self.model, "audio_encoder", None) or getattr(
            self.model, "codec_model", None
        )
        return getattr(getattr(codec, "config", None), "frame_rate", None)

    def make(self, fields: dict[str, Any], on_step: OnStep) -> Made:
        """A sound in the `media_type` of the fields. Raises RefusedFields for a text that is longer
        than what the model reads."""
        self.check_length(fields["prompt"])
        options, of = self.length_options(fields.get("seconds"))
        step = 0

        def tell(*_: Any) -> None:
            nonlocal step
            step += 1
            on_step(step, of)

        # Bark is several models in a row, of which these two take the time.
        parts = [self.model.semantic, self.model.coarse_acoustics] if self.is_bark else [self.model]
        hooks = [part.register_forward_hook(tell) for part in parts]
        torch.manual_seed(fields["seed"])
        try:
            made = self.pipeline(fields["prompt"], forward_params=options)
        finally:
            for hook in hooks:
                hook.remove()
        sound = np.atleast_2d(np.asarray(made["audio"], np.float32))
        content = encode(sound, made["sampling_rate"], FORMATS[fields["media_type"]])
        return Made(content, fields["media_type"])

    def check_length(self, prompt: str) -> None:
        if not self.is_bark:
            return
        most = self.model.generation_config.semantic_config["max_input_semantic_length"]
        if len(self.pipeline.tokenizer(prompt, add_special_tokens=False).input_ids) > most:
            raise RefusedFields(f"The text is longer than the {most} tokens that the model reads")

    def length_options(self, seconds: float | None) -> tuple[dict[str, int], int | None]:
        """What tells the model of a length, and how many steps that is at most."""
        if seconds is None or not self.tokens_per_second:
            return {}, None
        num_tokens = max(1, round(seconds * self.tokens_per_second))
        if not self.is_bark:
            return {"max_new_tokens": num_tokens}, num_tokens
        num_coarse = round(seconds * COARSE_TOKENS_PER_SECOND)
        return {"semantic_max_new_tokens": num_tokens}, num_tokens + num_coarse


def load(source: str, device: str, dtype: torch.dtype) -> Any:
    def from_source(source: str, local_files_only: bool = False) -> Any:
        if local_files_only and not Path(source).is_dir():
            source = snapshot_download(source, local_files_only=True)
        return pipeline("text-to-audio", source, device=device, dtype=dtype)

    return from_cache_or_hub(from_source, source)


def encode(sound: np.ndarray, rate: int, form: Format) -> bytes:
    """sound: (channels, num_samples) float32, from -1 to 1, rate of them a second."""
    samples = (sound.clip(-1, 1) * 32767).round().astype("<i2")
    layout = "mono" if len(samples) == 1 else "stereo"
    frame = av.AudioFrame.from_ndarray(samples.T.reshape(1, -1), "s16", layout)
    frame.sample_rate = rate
    content = BytesIO()
    with av.open(content, "w", format=form.container) as container:
        stream = container.add_stream(form.codec, rate=form.rate or rate, layout=layout)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return content.getvalue()
