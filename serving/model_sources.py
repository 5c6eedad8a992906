"""Where models are to be had: folders, the hub's local cache, the hub, other servers."""

import re
from pathlib import Path

import httpx
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from serving.settings import refuse_setting

BUNDLED_MODEL = Path(__file__).parent.parent / "gpt2-tales"
HUB_PROBE_SECONDS = 3.0
EXTERNAL = re.compile(r"([^=]*?)\s*=\s*(\w+://.*)")


def cached_folder(name: str) -> str | None:
    """The folder in the hub's local cache that holds all of model `name`, else None."""

    def cached(*files: str) -> str | None:
        found = (try_to_load_from_cache(name, file) for file in files)
        return next((path for path in found if isinstance(path, str)), None)

    try:
        config = cached("config.json")
    except HFValidationError:  # no name that the hub could know
        return None
    weights = cached("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    tokenizer = cached("tokenizer.json", "vocab.json", "tokenizer.model")
    return str(Path(config).parent) if config and weights and tokenizer else None


def hub_has(name: str) -> bool:
    """Whether the hub answers for model `name` right now; the hub's own client retries for
    23 seconds before it says no."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        url = f"{constants.ENDPOINT}/{name}/resolve/main/config.json"
        response = httpx.head(url, timeout=HUB_PROBE_SECONDS, follow_redirects=True)
        return response.is_success
    except httpx.HTTPError:
        return False


def parse_model_names(model_name: str) -> dict[str, str]:
    """For each model to serve, by the name it is served under, the folder, id or URL to load.

    Ends the process where a name comes twice, or none at all.
    """
    sources = {}
    for entry in filter(None, (part.strip() for part in model_name.split(","))):
        if Path(entry).is_dir():
            name, source = Path(entry).resolve().name, entry
        elif external := EXTERNAL.fullmatch(entry):
            name, source = external[1], external[2]
        else:
            name, source = entry, cached_folder(entry) or entry
        if name in sources:
            refuse_setting("MODEL_NAME", f"names {name!r} twice")
        sources[name] = source
    if not sources:
        refuse_setting("MODEL_NAME", "names no model")
    return sources


def is_external(source: str) -> bool:
    """Whether a source is the address of another server."""
    return "://" in source
