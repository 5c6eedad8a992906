"""The settings: read once, from the environment or `.env`."""

import sys
from pathlib import Path
from typing import Literal, NoReturn

from dotenv import load_dotenv
from pydantic import Field, FilePath, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

import models
from serving.counts import Counts, MemoryCounts


class Settings(BaseSettings):
    """Read once, from the environment or `.env`; an empty variable counts as unset."""

    model_config = SettingsConfigDict(env_ignore_empty=True, frozen=True)

    model_name: str | None = Field(
        default=None,
        description="Hugging Face ids or folders, `name=` before one for a name of your own, or "
        "`name=https://host/v1` for a model on another server; comma-separated, the first is the "
        "default. "
        "Unset: `gpt2` from the local cache or the hub, else the bundled `gpt2-tales`.",
    )
    max_loaded_models: int | None = Field(
        default=None,
        ge=1,
        description="Models in memory at the same time; a request for another one swaps it in. "
        "Unset: all.",
    )
    external_api_key: SecretStr | None = Field(
        default=None,
        description="Sent as its bearer token to every external server that has no key of its own "
        "in `EXTERNAL_API_KEYS`.",
    )
    external_api_keys: SecretStr | None = Field(
        default=None,
        description="Comma-separated `name=key`, the names as in `MODEL_NAME`: keys of single "
        "external models; `name=` sends none there.",
    )
    forbidden_words: str = Field(
        default="hate*,violence",
        description="Comma-separated; a trailing `*` matches any ending; a lone comma turns "
        "the filter off.",
    )
    filter_output: bool = Field(
        default=True, description="Whether generated text is filtered as prompts are."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="What is computed in where weights are not quantized; `auto` is bfloat16 where "
        "the processor computes in it natively.",
    )
    quantization: Literal["auto", "none", "int8"] = Field(
        default="auto",
        description="`int8` packs weights to 8 bits (CPU only). `auto` does so where it is the "
        "fastest and the loaded model loses less than 1% by it. `none`: as `DTYPE` says.",
    )
    prefix_caching: bool = Field(
        default=True,
        description="Whether prompts that begin as recent ones did take their keys and values, "
        "where that changes no bit of a text, which is so for GPT-2 in int8.",
    )
    prefix_cache_bytes: int = Field(
        default=256 << 20,
        ge=1 << 20,
        description="Memory for these, of each model; taken as it is needed and then kept.",
    )
    generation_config: Literal["auto", "none"] = Field(
        default="auto",
        description="`auto` takes what a model's `generation_config.json` asks for; `none` nothing "
        "of it but which tokens end a text.",
    )
    chat_template: str | None = Field(
        default=None,
        description="How models without a chat template of their own read a conversation: `plain`, "
        "a file or a text in Jinja. With `name=` before it, of one model, whatever it has; "
        "comma-separated, unless it is a text.",
    )
    torch_num_threads: int | None = Field(
        default=None,
        ge=1,
        description="Unset: the cores that the process may use, or 1 for a model of fewer than "
        "20 million weights.",
    )
    max_num_seqs: int = Field(
        default=64, ge=1, le=1024, description="Sequences that are generated at the same time."
    )
    max_queue_size: int = Field(
        default=256,
        ge=1,
        description="Sequences of one client that may wait, and twice as many of all clients; one "
        "more is answered 503.",
    )
    max_model_len: int | None = Field(
        default=None,
        ge=16,
        description="Tokens of prompt and text together. Unset: the model's context.",
    )
    speculative_tokens: int = Field(
        default=15,
        ge=0,
        le=15,
        description="Tokens that may be drafted for a sequence in one step, for texts that repeat "
        "themselves, while few run. No text changes by it. 0: none.",
    )
    request_timeout_seconds: float = Field(
        default=120, gt=0, description="A request that takes longer is answered 504."
    )
    max_body_bytes: int = Field(
        default=1_000_000, ge=1024, description="A larger request body is answered 413."
    )
    drain_timeout_seconds: float = Field(
        default=20,
        ge=0,
        description="After SIGTERM, requests that still run then are ended with an error.",
    )
    head_timeout_seconds: float = Field(
        default=10,
        gt=0,
        description="URL and headers of a request that take longer to arrive are answered 408.",
    )
    body_timeout_seconds: float = Field(
        default=30, gt=0, description="A body that takes longer to arrive is answered 408."
    )
    write_timeout_seconds: float = Field(
        default=30,
        gt=0,
        description="A connection whose client takes nothing of its answer for so long is closed.",
    )
    max_connections: int = Field(
        default=4096,
        ge=1,
        description="Half of the files that the process may open, if that is less. When there "
        "are as many, idle ones make room.",
    )
    api_keys: SecretStr | None = Field(
        default=None,
        description="Comma-separated `key` or `name:key`; unset: open to everybody.",
    )
    api_keys_file: FilePath | None = Field(
        default=None, description="A file with one such key a line, besides `API_KEYS`."
    )
    metrics_need_key: bool = Field(
        default=True, description="Whether `/metrics` needs a key where there are keys."
    )
    docs_need_key: bool = Field(
        default=False,
        description="Whether `/docs`, `/redoc` and `/openapi.json` need a key where there are "
        "keys; of this very service they tell the default model's name and vocabulary size.",
    )
    rate_limit: int | None = Field(
        default=None, ge=1, description="Requests a minute by key, else by client address."
    )
    token_rate_limit: int | None = Field(
        default=None, ge=1, description="Tokens a minute, of prompts and texts, the same way."
    )
    rate_limit_prompts: bool = Field(
        default=True, description="Whether `TOKEN_RATE_LIMIT` counts the tokens of prompts."
    )
    rate_limit_storage: SecretStr = Field(
        default=SecretStr("memory://"),
        description="Where limits are counted: `redis://host:6379` for all replicas together.",
    )
    cors_origins: str = Field(
        default="", description="Comma-separated origins whose pages may call the API, or `*`."
    )
    allowed_hosts: str = Field(
        default="",
        description="Comma-separated host names under which the service may be asked, "
        "`*.example.com` and `*` too. Unset: all, but without keys on a loopback address "
        "only `localhost` and loopback addresses.",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="Of the service's own log."
    )
    log_format: Literal["json", "text"] = Field(
        default="json", description="Of the service's own log, on standard output."
    )
    log_prompts: bool = Field(default=False, description="Whether prompts are in the log.")
    usage_log: Path | None = Field(
        default=None, description="A CSV file that gets a row for each request that generates."
    )
    usage_log_max_bytes: int = Field(
        default=10_000_000, ge=1000, description="It is rotated at this size; five old ones stay."
    )
    audio_model: str | None = Field(
        default=None,
        description="Hugging Face id or folder of a text-to-speech or text-to-audio model, served "
        "at `/generate/audio`; this and the following need what `requirements-media.txt` installs.",
    )
    image_model: str | None = Field(
        default=None,
        description="Of a text-to-image pipeline of diffusers, served at `/generate/image`.",
    )
    video_model: str | None = Field(
        default=None,
        description="Of a text-to-video pipeline of diffusers, served at `/generate/video`.",
    )
    shape_model: str | None = Field(
        default=None, description="Of a Shap-E pipeline of diffusers, served at `/generate/3d`."
    )
    image_lora: str | None = Field(
        default=None,
        description="Hugging Face id, folder or `.safetensors` file of LoRA weights that are "
        "fused into `IMAGE_MODEL`.",
    )
    media_queue_size: int = Field(
        default=8,
        ge=1,
        description="Sounds, pictures, videos or shapes of one client that may wait for their "
        "model, and twice as many of all clients; one more is answered 503.",
    )
    media_timeout_seconds: float = Field(
        default=600,
        gt=0,
        description="What `REQUEST_TIMEOUT_SECONDS` is for text, for sounds, pictures, videos and "
        "shapes.",
    )
    max_media_steps: int = Field(
        default=models.MAX_STEPS,
        ge=1,
        le=models.MAX_STEPS,
        description="The most `steps` that a picture, video or shape may ask for.",
    )
    max_side_pixels: int = Field(
        default=models.MAX_SIDE_PIXELS,
        ge=models.MIN_SIDE_PIXELS,
        le=models.MAX_SIDE_PIXELS,
        description="The longest side of a picture or video.",
    )
    max_audio_seconds: float = Field(
        default=models.MAX_AUDIO_SECONDS,
        gt=0,
        le=models.MAX_AUDIO_SECONDS,
        description="The longest sound.",
    )
    max_video_frames: int = Field(
        default=models.MAX_VIDEO_FRAMES,
        ge=1,
        le=models.MAX_VIDEO_FRAMES,
        description="The longest video.",
    )
    max_grid_size: int = Field(
        default=models.MAX_GRID_SIZE,
        ge=models.MIN_GRID_SIZE,
        le=models.MAX_GRID_SIZE,
        description="The finest grid for the surface of a shape, points a side.",
    )

    @field_validator("rate_limit_storage")
    @classmethod
    def can_be_opened(cls, address: SecretStr) -> SecretStr:
        open_counts(address)
        return address


def open_counts(address: SecretStr) -> Counts:
    """The counts there; a connection is made with the first of them. Raises ValueError, which does
    not repeat the address."""
    scheme = address.get_secret_value().partition("://")[0]
    if scheme == "memory":
        return MemoryCounts()
    if scheme not in ("redis", "rediss"):
        raise ValueError("is neither memory:// nor redis://host:6379")
    try:
        from serving.redis_counts import RedisCounts
    except ModuleNotFoundError:
        raise ValueError("redis:// needs what requirements-ray.txt installs") from None
    return RedisCounts(address.get_secret_value())


def read_settings() -> Settings:
    """The settings. Ends the process with a line for each variable that is not allowed."""
    load_dotenv()  # into the environment, so that HF_TOKEN and the like may stand there too
    try:
        return Settings()
    except ValidationError as invalid:
        problems = (f"{'.'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in invalid.errors())
        sys.exit("Invalid settings. " + "; ".join(problems))


def refuse_setting(variable: str, reason: object) -> NoReturn:
    """Ends the process with one line that names the variable."""
    sys.exit(f"Invalid settings. {variable}: {reason}")
