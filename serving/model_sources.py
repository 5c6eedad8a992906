"""Where models are to be had: folders, the hub's local cache, the hub, other servers."""

import re
from pathlib import Path
from typing import NamedTuple

import httpx
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from serving.settings import refuse_setting

BUNDLED_MODEL = Path(__file__).parent.parent / "gpt2-tales"
HUB_PROBE_SECONDS = 3.0
EXTERNAL = re.compile(r"([^=]*?)\s*=\s*(\w+://.*)")
ALIAS = re.compile(r"([^=]+?)\s*=\s*(.+)")  # of a folder or an id


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


class ModelNames(NamedTuple):
    """What MODEL_NAME names."""

    # The folder, id or URL to load, by the name that the model goes by. The first is the default.
    sources: dict[str, str]
    # For each further name of a model, the one that it goes by.
    aliases: dict[str, str]
    # The same for names that only folders and ids have of themselves.
    own_names: dict[str, str]


def parse_model_names(model_name: str) -> ModelNames:
    """The models to serve and their names.

    Ends the process where a name comes twice, or none at all.
    """
    sources: dict[str, str] = {}
    aliases: dict[str, str] = {}
    own_names: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in model_name.split(","))):
        name, own_name, source = _read_entry(entry)
        if name in sources or name in aliases:
            refuse_setting("MODEL_NAME", f"names {name!r} twice")
        known = None if is_external(source) else find_name(sources, source)
        if known is None:
            sources[name] = source
        else:
            aliases[name] = known
        if own_name:
            own_names.setdefault(own_name, known or name)
    if not sources:
        refuse_setting("MODEL_NAME", "names no model")
    given = sources.keys() | aliases.keys()
    unused = {name: of for name, of in own_names.items() if name not in given}
    return ModelNames(sources, aliases, unused)


def _read_entry(entry: str) -> tuple[str, str | None, str]:
    """(the name that an entry gives, the one that a local model has of itself, where it is)."""
    if external := EXTERNAL.fullmatch(entry):
        return external[1], None, external[2]
    alias = None
    if not Path(entry).is_dir() and (aliased := ALIAS.fullmatch(entry)):
        alias, entry = aliased[1], aliased[2]
    if Path(entry).is_dir():
        name, source = Path(entry).resolve().name, entry
    else:
        name, source = entry, cached_folder(entry) or entry
    return alias or name, name, source


def find_name(sources: dict[str, str], source: str) -> str | None:
    """The name of the model that is loaded from there, if one is."""

    def place(of: str) -> str | Path:
        return Path(of).resolve() if Path(of).is_dir() else of

    return next((name for name, each in sources.items() if place(each) == place(source)), None)


def is_external(source: str) -> bool:
    """Whether a source is the address of another server."""
    return "://" in source
