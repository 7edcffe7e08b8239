"""Jet-Nemotron's config: read and written in the form of its published checkpoints."""

import re
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, configuration_utils

from ...checks import is_whole, reject
from ..upstream import UpstreamConfig

LAYER_TYPES = {"jet": "linear_attention", "attn": "full_attention", "swa": "sliding_attention"}
UPSTREAM_TYPES = {ours: upstream for upstream, ours in LAYER_TYPES.items()}
LAYERS_2B = ("jet",) * 14 + ("attn",) + ("jet",) * 4 + ("attn", "swa", "swa") + ("jet",) * 6
JET_2B = {"num_heads": 12, "head_dim": 96, "expand_v": 2.6666666667}
SWA_2B = {"window_size": 1152}
JET_COMMON = {"conv_size": 4, "dconv_generator_reduction": 8, "norm_eps": 1e-5}


def _reject(field: str, value: object, what_works: str) -> ValueError:
    return reject(f"JetNemotronConfig.{field}", value, what_works)


@strict
class JetNemotronConfig(UpstreamConfig):
    """Config of Jet-Nemotron. The defaults are the 2B model's.

    Reads the upstream config.json, and writes that form back. In memory `layer_types` has the names that transformers
    knows: `linear_attention`, `full_attention` and `sliding_attention`.

    Args:
        layer_types: one of `jet`, `attn` and `swa` (or transformers' names) per layer: a list, or a string with these
            names in order, written as JSON, as Python or with commas. `None`: the 2B model's.
        efficient_attention_config: of the Jet layers, in `"jet"`: `num_heads` (H), `head_dim` (K), `expand_v` (V / K),
            and if they differ from the published models' `conv_size` (4 tokens), `dconv_generator_reduction` (value
            width over the tap generator's width, 8) and `norm_eps` (1e-5; may be a string). Of the sliding layers, in
            `"swa"`: `window_size`, the tokens that a token sees, itself included. `None`: the 2B model's.
        rope_parameters: RoPE; the upstream names `rope_theta` and `rope_scaling` are read too.

    The other fields are Qwen2's.

    Raises:
        ValueError: naming the field, what it got and what would work.

    Source: Gu et al. 2025 (arXiv 2508.15884).
    """

    model_type = "jet_nemotron"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    default_theta = 1_000_000.0

    vocab_size: int = 151936
    hidden_size: int = 1536
    intermediate_size: int = 8960
    num_hidden_layers: int = 28
    num_attention_heads: int = 12
    num_key_value_heads: int = 2
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    attention_dropout: float | int = 0.0
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151643
    rope_parameters: dict | None = None
    layer_types: Any = None
    efficient_attention_config: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        efficient = self.efficient_attention_config or {"jet": JET_2B, "swa": SWA_2B}
        self.efficient_attention_config = {name: dict(values) for name, values in efficient.items()}
        if "jet" in efficient:
            self.efficient_attention_config["jet"] = JET_COMMON | efficient["jet"]
        self.layer_types = LAYERS_2B if self.layer_types is None else self.layer_types
        self._check(kwargs.pop("head_dim", None))
        kwargs.pop("sliding_window", None)  # Qwen2's, which this model does not read: see `sliding_window`
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        # Overrides of from_pretrained come this way too.
        if name == "layer_types" and value is not None:
            names = re.findall(r"\w+", value) if isinstance(value, str) else list(value)
            value = [LAYER_TYPES.get(name, name) for name in names]
        elif name == "head_dim":
            raise _reject(name, value, "it is hidden_size / num_attention_heads: set those")
        elif name == "sliding_window":
            raise _reject(name, value, "set efficient_attention_config, whose swa.window_size it is")
        super().__setattr__(name, value)

    def _check(self, head_dim: int | None) -> None:
        types, depth, heads = self.layer_types, self.num_hidden_layers, self.num_attention_heads
        if unknown := [name for name in types if name not in UPSTREAM_TYPES]:
            raise _reject("layer_types", unknown[0], f"every layer must be one of {', '.join(LAYER_TYPES)}")
        if len(types) != depth:
            raise _reject("layer_types", types, f"it names {len(types)} layers, num_hidden_layers is {depth}")
        if set(types) <= {"linear_attention"}:
            raise _reject("layer_types", types, "at least one layer must be attn or swa")
        if self.hidden_size % heads:
            raise _reject("num_attention_heads", heads, f"it must divide hidden_size={self.hidden_size}")
        if head_dim not in (None, self.head_dim):
            raise _reject("head_dim", head_dim, f"it is hidden_size / num_attention_heads = {self.head_dim}")
        if "linear_attention" in types:
            jet = self.efficient_attention_config.get("jet", {})
            for name in ("num_heads", "head_dim", "conv_size", "dconv_generator_reduction"):
                if not isinstance(jet.get(name), int) or jet[name] < 1:
                    field = f"efficient_attention_config.jet.{name}"
                    raise _reject(field, jet.get(name), "jet layers need a whole number of at least 1")
            ratio = jet.get("expand_v")
            if not isinstance(ratio, int | float) or not is_whole(jet["head_dim"] * ratio):
                what_works = f"times head_dim={jet['head_dim']} it must be a whole number"
                raise _reject("efficient_attention_config.jet.expand_v", ratio, what_works)
        window = self.sliding_window
        if "sliding_attention" in types and (not isinstance(window, int) or window < 2):
            field = "efficient_attention_config.swa.window_size"
            raise _reject(field, window, "swa layers need a whole number of tokens, at least 2")

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def sliding_window(self) -> int | None:
        """Tokens that a token sees in sliding layers, itself included; `None` where there are no such layers."""
        if "sliding_attention" not in self.layer_types:
            return None
        return self.efficient_attention_config.get("swa", {}).get("window_size")

    def to_dict(self) -> dict[str, Any]:
        """The upstream form, JSON-ready."""
        output = super().to_dict()
        output["layer_types"] = [UPSTREAM_TYPES.get(name, name) for name in self.layer_types]
        return output


# Trainer reads a checkpoint's config.json with the base class, which must know the upstream names that stand in it.
configuration_utils.ALLOWED_ATTN_LAYER_TYPES += tuple(LAYER_TYPES)
AutoConfig.register("jet_nemotron", JetNemotronConfig, exist_ok=True)
