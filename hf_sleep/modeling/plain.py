"""What can be retrofitted: a causal LM as it was loaded, and nothing that stands around one."""

import sys
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .pretrained import SleepPreTrainedModel


def plain_base(base: Any) -> PreTrainedModel:
    """The causal LM that is to be retrofitted; of a compiled one what was compiled.

    Raises:
        ValueError: something else, with what works.
    """
    base = getattr(base, "_orig_mod", base)
    kind = type(base).__name__
    if isinstance(base, SleepPreTrainedModel):
        raise ValueError(
            f"base is a {kind}, which sleeps already: load it with sleep=… to change its settings, or retrofit its lm"
        )
    if hasattr(base, "get_base_model"):
        raise ValueError(
            f"base is a {kind}, which stands around a model: pass what its merge_and_unload() returns, or retrofit "
            "first and put the adapter on the result"
        )
    if not isinstance(base, PreTrainedModel) or not base.can_generate():
        raise ValueError(
            f"base is a {kind}: it must be a causal LM with its head, as AutoModelForCausalLM.from_pretrained loads it"
        )
    return base


def source_of(name: str | None) -> str | None:
    """Where a base came from: a Hub id, or a folder, by a name that no Hub id has, wherever it is looked for."""
    is_here = name and Path(name).is_dir() and not Path(name).is_absolute() and not name.startswith((".", "~"))
    return f"./{name}" if is_here else name or None


def has_adapter(model: Any) -> bool:
    """Tell whether PEFT's layers are among a model's."""
    peft = sys.modules.get("peft.tuners.tuners_utils")  # whoever put them there has imported it
    return peft is not None and any(isinstance(module, peft.BaseTunerLayer) for module in model.modules())
