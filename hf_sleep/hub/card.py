"""A model card that writes itself."""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..files import write_file
from ..lm_config import SleepLMConfig
from ..version import __version__
from .base import NVIDIA_LIMIT, base_licence, hub_id, origin_of

TEMPLATE = Path(__file__).with_name("model_card.md")
METRIC_KEYS = ("task", "difficulty", "N", "accuracy", "chance", "n")


@dataclass
class CardFacts:
    """Facts for a model card that the model itself does not know: assign them to `model.card`.

    Args:
        data: what the model was trained on, a sentence or two of Markdown.
        metrics: a dictionary per measured number, with `task`, `difficulty`, `N` (sleep passes), `accuracy` and
            `chance` (both from 0 to 1) and `n` (examples).
        usage: Python that uses `model`, for a model that reads no text. By default it continues a text.

    Raises:
        ValueError: a metric with other keys, or a share that is not from 0 to 1.
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


def model_card(
    model: Any,
    name: str,
    *,
    untrained: bool = False,
    tags: Iterable[str] = (),
    download: bool = False,
    token: str | bool | None = None,
) -> ModelCard:
    """Make the card of a sleeping model, from its config, its size and `model.card`.

    Args:
        model: a `SleepForCausalLM`.
        name: the repository or folder that it is loaded from.
        untrained: say that its blocks add nothing yet.
        tags: to add to the model's own.
        download: ask the Hub for the base's licence where it is not known.
        token: for the Hub.
    """
    config: SleepLMConfig = model.config
    facts: CardFacts = model.card
    source = config.base_model_name_or_path
    repo_id = hub_id(source)
    licence = base_licence(source, download, token)
    origin = repo_id or origin_of(source)
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
        imports=config.imports(),
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


def _base_text(config: SleepLMConfig, repo_id: str | None, origin: str | None) -> str:
    if repo_id is not None:
        return f"[{repo_id}](https://huggingface.co/{repo_id})"
    made = "" if origin is None else f", made from [{origin}](https://huggingface.co/{origin}),"
    return f"A {config.text_config.model_type} language model{made}"


def _settings(model: Any) -> dict[str, Any]:
    """Rows of the card's table."""
    sleep = model.config.sleep
    first, end = sleep.loop_layers
    base, added = (
        model.lm.num_parameters(),
        sum(p.numel() for part in (model.fast_weights, model.between) for p in part.parameters()),
    )
    settings = {
        "window L (tokens between sleeps)": sleep.window_size,
        "sleep passes N": sleep.sleep_passes,
        "eviction": sleep.eviction,
        "sink tokens": sleep.num_sink_tokens,
        "looped decoder layers": f"{first} to {end - 1} of {model.config.text_config.num_hidden_layers}",
    }
    if sleep.between != "none":
        settings["between passes"] = sleep.between
    if sleep.block_layers:
        settings |= {
            "fast-weight blocks": f"{sleep.block_kind}, after decoder layers {', '.join(map(str, sleep.block_layers))}",
            "heads × key width × value width": f"{sleep.block_num_heads} × {sleep.block_head_dim} × "
            f"{round(sleep.block_head_dim * sleep.block_expand_v)}",
        }
    else:
        settings["fast-weight blocks"] = "the base's own recurrent layers"
    if base:
        # Where weights are sharded, this process may hold none of them.
        settings["parameters added"] = f"{added:,} ({100 * added / base:.2f} % of the base's {base:,})"
    return settings


def is_untrained(weights: Mapping[str, torch.Tensor]) -> bool:
    """Tell whether a state dict's blocks are known to add nothing. Sharded and offloaded weights are not looked at."""
    outputs = [t for name, t in weights.items() if re.fullmatch(r"fast_weights\.\d+\.mixer\.o_proj\.weight", name)]
    if not all(type(t) in (torch.Tensor, torch.nn.Parameter) and t.numel() and not t.is_meta for t in outputs):
        return False
    return bool(outputs) and not any(bool(t.any()) for t in outputs)


def _licence_text(config: SleepLMConfig, licence: Mapping[str, Any]) -> str:
    if config.base_model_name_or_path is None:
        text = "None is stated here: the model was built from scratch, so it is for those who share it to choose one."
    elif "license" not in licence:
        text = (
            "None is stated here, as the base model's licence is not known to the program that wrote this card. "
            "It binds this model too: look it up before you use or share it."
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
    """Tell whether a README is a card that this package wrote and nobody has changed."""
    text = text.replace("\r\n", "\n")
    mark = MARK_PATTERN.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start()])


def write_model_card(model: Any, folder: str | os.PathLike, name: str | None = None, **kwargs: Any) -> bool:
    """Write a checkpoint's README.md. One that a person wrote or changed stays.

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
