"""Facts about a base model: its id on the Hub, its card, its licence."""

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, metadata_load
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError  # type: ignore[import-untyped]

APACHE = {"license": "apache-2.0"}
NVIDIA = {
    "license": "other",
    "license_name": "nvidia-jet-nemotron-models",
    "license_link": "https://github.com/NVlabs/Jet-Nemotron/blob/main/LICENSE/jet_nemotron_models",
}
NVIDIA_LIMIT = (
    "NVIDIA's Jet-Nemotron weights are for **research and evaluation only**, and so is every model made from them."
)
# Where a base's own card cannot be read.
KNOWN_LICENCES = {
    "jet-ai/Jet-Nemotron-2B": NVIDIA,
    "jet-ai/Jet-Nemotron-4B": NVIDIA,
    "ByteDance/Ouro-1.4B": APACHE,
    "ByteDance/Ouro-1.4B-Thinking": APACHE,
    "ByteDance/Ouro-2.6B": APACHE,
    "ByteDance/Ouro-2.6B-Thinking": APACHE,
    "HuggingFaceTB/SmolLM2-135M-Instruct": APACHE,
}


def hub_id(source: str | None) -> str | None:
    """Return `source` where it names a repository of the Hub, and `None` where it is a folder of this machine."""
    if source is None or source.count("/") != 1 or Path(source).exists():
        return None
    try:
        validate_repo_id(source)
    except HFValidationError:
        return None
    return source


def origin_of(folder: str | None) -> str | None:
    """Find the Hub id of what a base in a folder was made from, as the folder's card names it."""
    named = _base_card(folder, None, download=False, token=None).get("base_model")
    return hub_id(named) if isinstance(named, str) else None


def base_licence(source: str | None, download: bool = False, token: str | bool | None = None) -> dict[str, Any]:
    """Read the base's licence from its own card, in its folder or in the Hub's cache; of a few bases it is known.

    Args:
        source: folder or Hub id of the base.
        download: ask the Hub for the card where it is not in the cache.
        token: for the Hub.

    Returns:
        Metadata for a model card; empty where the licence is not known.
    """
    repo_id = hub_id(source)
    card = _base_card(source, repo_id, download, token)
    licence = {key: card[key] for key in ("license", "license_name", "license_link") if card.get(key)}
    if licence.get("license", "unknown") == "unknown":
        return KNOWN_LICENCES.get(repo_id or "", {})
    link = licence.get("license_link", "")
    if link and "://" not in link:
        if repo_id is None:
            del licence["license_link"]
        else:
            licence["license_link"] = f"https://huggingface.co/{repo_id}/blob/main/{link}"
    return licence


def _base_card(source: str | None, repo_id: str | None, download: bool, token: str | bool | None) -> dict[str, Any]:
    path = Path(source or "", "README.md")
    if repo_id is not None:
        try:
            path = Path(hf_hub_download(repo_id, "README.md", token=token, local_files_only=not download))
        except (EntryNotFoundError, HfHubHTTPError):
            return {}
    if source is None or not path.is_file():
        return {}
    try:
        return metadata_load(path) or {}
    except (YAMLError, ValueError):
        # Someone else's card is no reason not to save a model.
        return {}
