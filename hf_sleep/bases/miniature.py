"""A small random copy of a model's class, in which short attention windows can be read past."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

WINDOW = 8
MAX_PARAMETERS = 50_000_000
WIDTHS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
"""What is made small where a config has it and it is larger, the first that works: all of it, or nothing."""


def miniature(
    lm: PreTrainedModel, layer_kinds: Callable[[PreTrainedConfig], list[str]]
) -> tuple[PreTrainedModel | None, str]:
    """A random model of the class of `lm`, in its dtype, on its device, with all of its kinds of layers.

    Args:
        lm: it is left as it is, and so is torch's generator.
        layer_kinds: of its adapter.

    Returns:
        The model, or `None`; and in words what it is, or why there is none.
    """
    reason = ""
    for widths in (WIDTHS, {}):
        try:
            config = _shrunk(lm.config, layer_kinds(lm.config), widths)
            with torch.device("meta"):
                size = sum(p.numel() for p in type(lm)(copy.deepcopy(config)).parameters())
            if size > MAX_PARAMETERS:
                reason = reason or f"it would have {size:,} parameters"
                continue
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                small = type(lm)(config)
        except Exception as error:  # whatever a class makes of a config that nobody meant for it
            reason = reason or f"{type(error).__name__}: {error}"
            continue
        return small.to(lm.device, lm.dtype), _in_words(lm.config, config)
    return None, reason


def _shrunk(config: PreTrainedConfig, kinds: list[str], widths: dict[str, int]) -> PreTrainedConfig:
    """A copy of `config` with few layers, of all kinds, a small vocabulary and short windows."""
    small: Any = copy.deepcopy(config)
    depth = config.num_hidden_layers
    keep = min(depth, max(2, 1 + max(kinds.index(kind) for kind in set(kinds))))
    values = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    for name, value in values.items():
        if isinstance(value, list) and len(value) == depth and depth > keep:
            setattr(small, name, value[:keep])
        elif "window" in name and type(value) is int and value > WINDOW and not name.endswith("layers"):
            setattr(small, name, WINDOW)
    small.num_hidden_layers, small.vocab_size = keep, min(config.vocab_size, 97)
    for name, width in widths.items():
        value = getattr(config, name, None)
        if type(value) is int and value > width:
            multi_head = name == "num_key_value_heads" and value == config.num_attention_heads
            setattr(small, name, WIDTHS["num_attention_heads"] if multi_head else width)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(small, name, None)
    if hasattr(small, "quantization_config"):
        del small.quantization_config
    small._attn_implementation = config._attn_implementation
    small._experts_implementation = config._experts_implementation
    return small


def _in_words(config: PreTrainedConfig, small: Any) -> str:
    """List what differs: `"2 of 32 layers, sliding_window=8 instead of 4096"`."""
    names = [name for name, value in vars(config).items() if "window" in name and value != getattr(small, name, value)]
    words = [f"{small.num_hidden_layers} of {config.num_hidden_layers} layers"]
    return ", ".join(words + [f"{name}={getattr(small, name)} instead of {getattr(config, name)}" for name in names])
