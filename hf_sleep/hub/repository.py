"""Pushing a checkpoint to the Hub, with the file that leads a loader to this package."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import EntryNotFoundError

from ..files import write_file
from ..version import __version__
from .base import hub_id
from .card import is_our_card

TAGS = ("hf_sleep", "sleep", "fast-weights", "long-context")

ENTRY = re.compile(
    r"model(?:\.(?P<whole>(?:(?!-of-)[^/])+))?\.safetensors|model\.safetensors\.index(?:\.(?P<index>[^/]+))?\.json"
)
"""Whole weights, or the index of shards, of a variant if there is one."""

ALL_WEIGHTS = ["model*.safetensors", "model.safetensors.index*.json"]
OF_WEIGHTS = ("only_sleep", "model_type", "base_fingerprint", "base_checksum", "text_config")
"""Fields of a config in which variants of one checkpoint agree."""

# Loaded by transformers where a checkpoint is read with trust_remote_code=True.
AUTO_MAP = {
    "AutoConfig": "modeling_hf_sleep.SleepLMConfig",
    "AutoModelForCausalLM": "modeling_hf_sleep.SleepForCausalLM",
}
REMOTE_CODE_FILE = "modeling_hf_sleep.py"
REMOTE_CODE = '''"""Loads this checkpoint with the package hf_sleep, which holds all of its code."""

try:
    from hf_sleep import SleepForCausalLM, SleepLMConfig
except ModuleNotFoundError as error:
    if error.name != "hf_sleep":
        raise
    raise ImportError(
        "This model sleeps, and its code is in the package hf_sleep, which is not installed here. "
        "Install it from a checkout of its repository, with `pip install -e .`, and load the model again."
    ) from error

__all__ = ["SleepForCausalLM", "SleepLMConfig"]
'''


def write_remote_code(folder: str | os.PathLike) -> None:
    """Write the file that `AUTO_MAP` points to; makes the folder where it is missing."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_file(Path(folder, REMOTE_CODE_FILE), REMOTE_CODE)


def forget_folders(folder: str | os.PathLike) -> None:
    """Take folders of this machine out of a checkpoint's config.json: they mean nothing elsewhere."""
    path = Path(folder, "config.json")
    if not path.exists():
        return  # an adapter alone
    config = json.loads(path.read_text(encoding="utf-8"))
    if hub_id(config.get("base_model_name_or_path")) is None:
        config["base_model_name_or_path"] = None
    if hub_id(config["text_config"].get("_name_or_path")) is None:
        config["text_config"].pop("_name_or_path", None)
    if hub_id((config.get("base_source") or {}).get("of")) is None:
        config.pop("base_source", None)
    write_file(path, json.dumps(config, indent=2) + "\n")


def weight_files(folder: str | os.PathLike) -> dict[Path, tuple[str, int]]:
    """What loading looks for first in a checkpoint: of which variant it is, and when it was written, in nanoseconds."""
    found = [(path, ENTRY.fullmatch(path.name)) for path in Path(folder).glob("model.*")]
    return {path: (match["whole"] or match["index"] or "", path.stat().st_mtime_ns) for path, match in found if match}


def files_of(variants: Iterable[str]) -> list[str]:
    """Patterns of all weight files of some variants, `""` for those without one."""
    dotted = [f".{variant}" if variant else "" for variant in sorted(variants)]
    return [
        pattern
        for v in dotted
        for pattern in (
            *(f"model{v}.safetensors", f"model{v}-*-of-*.safetensors"),
            f"model.safetensors.index{v}.json",
        )
    ]


def drop_older_weights(folder: str | os.PathLike, before: dict[Path, tuple[str, int]]) -> None:
    """Delete whole weights that shards were written beside, or the index of shards that are gone.

    transformers leaves them, and loading takes what it finds first.

    Args:
        folder: of a checkpoint that was written just now.
        before: its `weight_files` before that.
    """
    now = weight_files(folder)
    written = {path for path in now if before.get(path) != now[path]}
    variants = {now[path][0] for path in written}
    for path in now.keys() - written:
        if now[path][0] in variants:
            path.unlink()


class Repository:
    """Model repository on the Hub, made where there is none.

    Args:
        repo_id: `"name"` or `"owner/name"`.
        private: whether a new one is private; by default what the owner's account says.
        token: for the Hub; by default the one that is logged in.
        revision: branch to push to, made where there is none; by default the main one.
        create_pr: open a pull request with the push.
    """

    def __init__(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ):
        self.api = HfApi(library_name="hf_sleep", library_version=__version__, token=token)
        self.repo_id: str = self.api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        self.revision, self.create_pr = revision, create_pr
        if revision is not None and not create_pr:
            self.api.create_branch(self.repo_id, branch=revision, exist_ok=True)

    def _has_a_persons_card(self) -> bool:
        try:
            path = self.api.hf_hub_download(self.repo_id, "README.md", revision=self.revision)
        except EntryNotFoundError:
            return False
        return not is_our_card(Path(path).read_text(encoding="utf-8", errors="replace"))

    def _outdated(self, folder: Path) -> list[str]:
        """Patterns of the weights that a checkpoint replaces: of other variants too, where it is of another model."""
        if not (mine := folder / "config.json").is_file():
            return []  # an adapter alone
        try:
            theirs = self.api.hf_hub_download(self.repo_id, "config.json", revision=self.revision)
        except EntryNotFoundError:
            return ALL_WEIGHTS
        one, other = (json.loads(Path(path).read_text(encoding="utf-8")) for path in (mine, theirs))
        if any(one.get(name) != other.get(name) for name in OF_WEIGHTS):
            return ALL_WEIGHTS
        return files_of({variant for variant, _ in weight_files(folder).values()})

    def push(self, folder: str | os.PathLike, message: str | None = None, description: str | None = None) -> CommitInfo:
        """Upload a checkpoint. Weights of an earlier one go, but other variants of it; a person's card stays.

        Args:
            folder: what `save_pretrained` wrote.
            message: of the commit.
            description: of the commit.
        """
        return self.api.upload_folder(
            repo_id=self.repo_id,
            folder_path=Path(folder),
            commit_message=message or "Upload model",
            commit_description=description,
            revision=self.revision,
            create_pr=self.create_pr,
            ignore_patterns=["README.md"] if self._has_a_persons_card() else None,
            delete_patterns=self._outdated(Path(folder)),
        )
