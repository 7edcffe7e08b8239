"""What a checkpoint needs on the Hub: a card that writes itself, a file that points to this package, and the push."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, EvalResult, HfApi, ModelCard, ModelCardData, hf_hub_download, metadata_load
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError  # type: ignore[import-untyped]

from .config import SleepLMConfig
from .files import write_file
from .version import __version__

TAGS = ("hf_sleep", "sleep", "fast-weights", "long-context")
TEMPLATE = Path(__file__).with_name("model_card.md")
METRIC_KEYS = ("task", "difficulty", "N", "accuracy", "chance", "n")
WEIGHT_FILES = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]

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
        "Run `pip install hf-sleep` and load the model again."
    ) from error

__all__ = ["SleepForCausalLM", "SleepLMConfig"]
'''

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


@dataclass
class CardFacts:
    """What a model card says that the model itself does not know: assign it to `model.card`.

    Args:
        data: what the model was trained on, a sentence or two of Markdown.
        metrics: a dictionary per measured number, with `task`, `difficulty`, `N` (sleep passes), `accuracy` and
            `chance` (both from 0 to 1) and `n` (examples).
        usage: Python that uses `model`, for one that reads no text; by default it continues a text.

    Raises:
        ValueError: a metric that lacks something, or a share that is none.
    """

    data: str = ""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    usage: str = ""

    def __post_init__(self) -> None:
        for i, metric in enumerate(self.metrics):
            if set(metric) != set(METRIC_KEYS):
                raise ValueError(f"CardFacts.metrics[{i}] has {sorted(metric)}: it must have {sorted(METRIC_KEYS)}")
            for key in ("accuracy", "chance"):
                if not 0 <= metric[key] <= 1:
                    raise ValueError(f"CardFacts.metrics[{i}][{key!r}]={metric[key]!r}: it must be from 0 to 1")
        self.metrics = [
            {**m, "accuracy": float(m["accuracy"]), "chance": float(m["chance"]), "N": int(m["N"]), "n": int(m["n"])}
            for m in self.metrics
        ]


def hub_id(source: str | None) -> str | None:
    """`source` where it names a repository of the Hub, and not a folder of this machine."""
    if source is None or source.count("/") != 1 or Path(source).exists():
        return None
    try:
        validate_repo_id(source)
    except HFValidationError:
        return None
    return source


def base_licence(source: str | None, download: bool = False, token: str | bool | None = None) -> dict[str, Any]:
    """The base's licence as model card metadata; empty where it is not known.

    Read from the base's own card, in its folder or in the Hub's cache, else from what is known of a few bases.

    Args:
        source: folder or Hub id of the base.
        download: ask the Hub for the card where it is not in the cache.
        token: for the Hub.
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


def model_card(
    model: Any,
    name: str,
    *,
    untrained: bool = False,
    tags: Iterable[str] = (),
    download: bool = False,
    token: str | bool | None = None,
) -> ModelCard:
    """The card of a sleeping model, from its config, its size and `model.card`.

    Args:
        model: a `SleepForCausalLM`.
        name: the repository or folder that it is loaded from.
        untrained: say that its blocks add nothing yet.
        tags: besides the model's own.
        download: ask the Hub for the base's licence where it is not known.
        token: for the Hub.
    """
    config: SleepLMConfig = model.config
    facts: CardFacts = model.card
    source = config.base_model_name_or_path
    repo_id = hub_id(source)
    licence = base_licence(source, download, token)
    origin = repo_id or _origin(source)
    data = ModelCardData(
        library_name="hf_sleep",
        pipeline_tag="text-generation",
        base_model=origin,
        base_model_relation=None if origin is None else "adapter" if config.only_sleep else "finetune",
        tags=[*model.model_tags, *tags],
        model_name=name.rsplit("/", 1)[-1] if facts.metrics else None,
        eval_results=[_eval_result(metric) for metric in facts.metrics] or None,
        **licence,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        base_text=_base_text(config, repo_id, origin),
        tokenizer=repo_id or name,
        usage=facts.usage.strip(),
        version=__version__,
        sleep=config.sleep,
        only_sleep=config.only_sleep,
        untrained=untrained,
        settings=_settings(model),
        data=facts.data,
        metrics=facts.metrics,
        licence_text=_licence_text(config, licence),
    )


def _eval_result(metric: Mapping[str, Any]) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=re.sub(r"[^a-z0-9]+", "-", metric["task"].lower()).strip("-"),
        dataset_name=metric["task"],
        dataset_config=f"difficulty={metric['difficulty']}, sleep_passes={metric['N']}",
        metric_type="accuracy",
        metric_value=metric["accuracy"],
        metric_name=f"accuracy (chance {metric['chance']:.3g})",
        metric_args={"chance": metric["chance"], "n": metric["n"]},
    )


def _origin(folder: str | None) -> str | None:
    """The Hub id of what a base in a folder was made from, by its own card."""
    named = _base_card(folder, None, download=False, token=None).get("base_model")
    return hub_id(named) if isinstance(named, str) else None


def _base_text(config: SleepLMConfig, repo_id: str | None, origin: str | None) -> str:
    if repo_id is not None:
        return f"[{repo_id}](https://huggingface.co/{repo_id})"
    made = "" if origin is None else f", made from [{origin}](https://huggingface.co/{origin}),"
    return f"A {config.text_config.model_type} language model{made}"


def _settings(model: Any) -> dict[str, Any]:
    """What the card's table shows."""
    sleep = model.config.sleep
    first, end = sleep.loop_layers
    base, added = model.lm.num_parameters(), sum(p.numel() for p in model.fast_weights.parameters())
    settings = {
        "window L (tokens between sleeps)": sleep.window_size,
        "sleep passes N": sleep.sleep_passes,
        "eviction": sleep.eviction,
        "sink tokens": sleep.num_sink_tokens,
        "looped decoder layers": f"{first} to {end - 1} of {model.config.text_config.num_hidden_layers}",
    }
    if sleep.block_layers:
        settings |= {
            "fast-weight blocks": f"{sleep.block_kind}, after decoder layers {', '.join(map(str, sleep.block_layers))}",
            "heads × key width × value width": f"{sleep.block_num_heads} × {sleep.block_head_dim} × "
            f"{round(sleep.block_head_dim * sleep.block_expand_v)}",
        }
    else:
        settings["fast-weight blocks"] = "the base's own recurrent layers"
    if base:
        # Of weights that are sharded elsewhere there may be none here.
        settings["parameters added"] = f"{added:,} ({100 * added / base:.2f} % of the base's {base:,})"
    return settings


def is_untrained(weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether a state dict's blocks are known to add nothing. Sharded and offloaded weights are not looked at."""
    outputs = [t for name, t in weights.items() if re.fullmatch(r"fast_weights\.\d+\.mixer\.o_proj\.weight", name)]
    if not all(type(t) in (torch.Tensor, torch.nn.Parameter) and t.numel() and not t.is_meta for t in outputs):
        return False
    return bool(outputs) and not any(bool(t.any()) for t in outputs)


def _licence_text(config: SleepLMConfig, licence: Mapping[str, Any]) -> str:
    if config.base_model_name_or_path is None:
        text = "None is stated here: the model was built from scratch, so it is for those who share it to choose one."
    elif "license" not in licence:
        text = (
            "None is stated here, as the base model's licence is not known to the program that wrote this card. It "
            "binds this model too: look it up before you use or share it."
        )
    else:
        known = licence.get("license_name") or licence["license"]
        linked = f"[{known}]({licence['license_link']})" if "license_link" in licence else known
        text = f"That of the base model: {linked}."
    return f"{text} {NVIDIA_LIMIT}" if config.text_config.model_type == "jet_nemotron" else text


# The card's last line tells a card that nobody has touched from one that a person wrote or changed.
MARK = "<!-- hf_sleep wrote this card ({digest}): saving the model again replaces it, unless it was changed. -->"
MARK_PATTERN = re.compile(re.escape(MARK).replace(r"\{digest\}", "([0-9a-f]{16})") + r"\s*\Z")


def _digest(text: str) -> str:
    return hashlib.sha256(text.rstrip().encode()).hexdigest()[:16]


def is_our_card(text: str) -> bool:
    """Whether a README is a card of ours that nobody has changed."""
    text = text.replace("\r\n", "\n")
    mark = MARK_PATTERN.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start()])


def write_model_card(model: Any, folder: str | os.PathLike, name: str | None = None, **kwargs: Any) -> bool:
    """Write a checkpoint's README.md, unless there is one that a person wrote or changed.

    Args:
        model: a `SleepForCausalLM`.
        folder: of the checkpoint.
        name: the repository or folder that it is loaded from; by default `folder`'s name.
        kwargs: as in `model_card`.

    Returns:
        Whether it was written.
    """
    path = Path(folder, "README.md")
    if path.exists() and not is_our_card(path.read_text(encoding="utf-8", errors="replace")):
        return False
    text = str(model_card(model, name or path.resolve().parent.name, **kwargs)).rstrip() + "\n\n"
    write_file(path, text + MARK.format(digest=_digest(text)) + "\n")
    return True


def write_remote_code(folder: str | os.PathLike) -> None:
    """Write the file that `AUTO_MAP` points to; makes the folder where it is missing."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_file(Path(folder, REMOTE_CODE_FILE), REMOTE_CODE)


def forget_folders(folder: str | os.PathLike) -> None:
    """Leave folders of this machine out of a checkpoint's config.json: they mean nothing elsewhere."""
    path = Path(folder, "config.json")
    if not path.exists():
        return  # an adapter alone
    config = json.loads(path.read_text(encoding="utf-8"))
    if hub_id(config.get("base_model_name_or_path")) is None:
        config["base_model_name_or_path"] = None
    if hub_id(config["text_config"].get("_name_or_path")) is None:
        config["text_config"].pop("_name_or_path", None)
    write_file(path, json.dumps(config, indent=2) + "\n")


class Repository:
    """A model repository on the Hub, made where there is none.

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

    def push(self, folder: str | os.PathLike, message: str | None = None, description: str | None = None) -> CommitInfo:
        """Upload a checkpoint; weight files of an earlier one go, a card that a person wrote stays.

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
            delete_patterns=WEIGHT_FILES,
        )
