"""What a sleep is (`SleepConfig`) and what a sleeping model is made of (`SleepLMConfig`)."""

import dataclasses
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .version import __version__

EVICTION_STYLES = ("hard", "sliding")
BLOCK_KINDS = ("jet", "gated_delta_net")


def is_whole(width: float) -> bool:
    """Whether `width` is a positive whole number, but for the rounding of a ratio such as 2.6666666667."""
    return math.isfinite(width) and round(width) >= 1 and abs(width - round(width)) < 1e-6 * width


def _reject(field: str, value: object, what_works: str) -> ValueError:
    return ValueError(f"SleepConfig.{field}={value!r} cannot work: {what_works}")


def _require_int(field: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise _reject(field, value, f"it must be an integer of at least {least}")


@dataclass
class SleepConfig:
    """How a model sleeps, and which fast-weight blocks it is given to sleep with.

    Args:
        window_size: L, tokens read between two sleeps.
        sleep_passes: N, passes over a full window before its KV cache is dropped; the ordinary read is the first of
            them, so 1 is the plain windowed hybrid. Can be overridden per call.
        eviction: `"hard"` (the window's KV goes) or `"sliding"` (the last `window_size - 1` tokens' KV stay, and
            attention spans the last `window_size` tokens).
        num_sink_tokens: the first tokens of a sequence whose KV is never evicted. An untrained sliding model needs at
            least one (Xiao et al. 2024, arXiv 2309.17453).
        loop_layers: half-open range `(a, b)` of decoder layers that are run again in sleep. `None`: all of them, or
            what the base's config names as `default_loop_layers` (Jet-Nemotron: the middle half).
        block_kind: `"jet"` or `"gated_delta_net"`.
        num_blocks: how many blocks to inject, evenly spaced. `None`: one per four layers into a base without
            linear-recurrent layers, none into a hybrid.
        block_layers: instead of `num_blocks`, the decoder layers after which a block is injected.
        block_num_heads: H of a block. `None`: as many as fit a third of the hidden size.
        block_head_dim: K, the key width of a head. `None`: the base's own head_dim.
        block_expand_v: V / K, the value width of a head over its key width.
        block_conv_size: W, taps of the short convolutions (tokens).
        version: the hf_sleep version that wrote this config.

    Raises:
        ValueError: naming the field, what it got and what would work.

    Source: Lee et al. 2026 (arXiv 2605.26099), Alg. 1 and §5.
    """

    window_size: int = 512
    sleep_passes: int = 2
    eviction: str = "hard"
    num_sink_tokens: int = 0
    loop_layers: tuple[int, int] | None = None
    block_kind: str = "jet"
    num_blocks: int | None = None
    block_layers: tuple[int, ...] | None = None
    block_num_heads: int | None = None
    block_head_dim: int | None = None
    block_expand_v: float = 2.0
    block_conv_size: int = 4
    version: str = __version__

    def __post_init__(self) -> None:
        _require_int("window_size", self.window_size, 2)
        _require_int("sleep_passes", self.sleep_passes, 1)
        _require_int("num_sink_tokens", self.num_sink_tokens, 0)
        _require_int("block_conv_size", self.block_conv_size, 2)
        if self.eviction not in EVICTION_STYLES:
            raise _reject("eviction", self.eviction, f"it must be one of {', '.join(EVICTION_STYLES)}")
        if self.block_kind not in BLOCK_KINDS:
            raise _reject("block_kind", self.block_kind, f"it must be one of {', '.join(BLOCK_KINDS)}")
        if self.num_sink_tokens >= self.window_size:
            raise _reject(
                "num_sink_tokens", self.num_sink_tokens, f"it must be less than window_size={self.window_size}"
            )
        for field in ("num_blocks", "block_num_heads", "block_head_dim"):
            if getattr(self, field) is not None:
                _require_int(field, getattr(self, field), 0 if field == "num_blocks" else 1)
        expand_v = self.block_expand_v
        if not isinstance(expand_v, int | float) or isinstance(expand_v, bool) or not 0 < expand_v < math.inf:
            raise _reject("block_expand_v", expand_v, "it must be a positive number")
        if self.loop_layers is not None:
            loop = self._int_tuple("loop_layers", self.loop_layers)
            if len(loop) != 2 or not 0 <= loop[0] < loop[1]:
                raise _reject("loop_layers", loop, "it must be (a, b) with 0 <= a < b: layers a to b - 1 loop")
            self.loop_layers = (loop[0], loop[1])
        if self.block_layers is not None:
            self.block_layers = self._int_tuple("block_layers", self.block_layers)
            if list(self.block_layers) != sorted(set(self.block_layers)) or min(self.block_layers, default=0) < 0:
                raise _reject(
                    "block_layers", self.block_layers, "it must list layers from 0 upwards, each once, in order"
                )
            if self.num_blocks not in (None, len(self.block_layers)):
                raise _reject(
                    "num_blocks", self.num_blocks, f"block_layers lists {len(self.block_layers)}: give one of the two"
                )

    @staticmethod
    def _int_tuple(field: str, value: Any) -> tuple[int, ...]:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise _reject(field, value, "it must be a tuple of integers")
        items = tuple(value)
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
            raise _reject(field, items, "it must be a tuple of integers")
        return items

    @property
    def max_position(self) -> int:
        """One more than the largest position number any token is ever given, however long the stream."""
        return self.num_sink_tokens + self.window_size * (2 if self.eviction == "sliding" else 1)

    def resolve(self, text_config: PreTrainedConfig) -> "SleepConfig":
        """Fill what was left open from the base's config and check that the two fit together.

        Args:
            text_config: config of the base decoder.

        Returns:
            A new `SleepConfig` in which `loop_layers`, `block_layers` and the blocks' sizes are numbers.

        Raises:
            ValueError: where the base cannot be run as asked.
        """
        depth = text_config.num_hidden_layers
        layer_types = getattr(text_config, "layer_types", None) or ()
        block_layers = self.block_layers
        if block_layers is None:
            default = 0 if "linear_attention" in layer_types else max(1, depth // 4)
            count = default if self.num_blocks is None else self.num_blocks
            if count > depth:
                raise _reject("num_blocks", count, f"the base has {depth} layers, so at most {depth} blocks fit")
            block_layers = tuple(int((i + 0.5) * depth / count) for i in range(count))
        if block_layers and block_layers[-1] >= depth:
            raise _reject("block_layers", block_layers, f"the base's layers are 0 to {depth - 1}")
        if not block_layers and "linear_attention" not in layer_types:
            field = "num_blocks" if self.block_layers is None else "block_layers"
            raise _reject(
                field,
                getattr(self, field),
                "the base has no linear-recurrent layers, so nothing could remember: inject at least one",
            )
        default_loop: tuple[int, int] = getattr(text_config, "default_loop_layers", (0, depth))
        loop_layers = self.loop_layers or default_loop
        if loop_layers[1] > depth:
            raise _reject("loop_layers", loop_layers, f"the base has {depth} layers, so b is at most {depth}")
        self._check_positions(getattr(text_config, "max_position_embeddings", None))
        heads = getattr(text_config, "num_attention_heads", 1)
        head_dim = self.block_head_dim or getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
        width = head_dim * self.block_expand_v
        if not is_whole(width):
            best = max(1, round(width)) / head_dim
            raise _reject(
                "block_expand_v",
                self.block_expand_v,
                f"times a head_dim of {head_dim} it is {width:g} values a head, which must be a whole number: "
                f"{best:g} works",
            )
        return dataclasses.replace(
            self,
            loop_layers=loop_layers,
            block_layers=block_layers,
            num_blocks=len(block_layers),
            block_head_dim=head_dim,
            block_num_heads=self.block_num_heads or max(1, text_config.hidden_size // (3 * head_dim)),
        )

    def _check_positions(self, addressable: int | None) -> None:
        """Whether the base has a position number for every token of a window and what is retained before it."""
        if addressable is None or self.max_position <= addressable:
            return
        span = 2 if self.eviction == "sliding" else 1
        needs = (
            f"{self.eviction} eviction, a window of {self.window_size} and {self.num_sink_tokens} sink tokens need "
            f"{self.max_position} positions, the base addresses {addressable}"
        )
        if (most := (addressable - self.num_sink_tokens) // span) > self.num_sink_tokens:
            raise _reject("window_size", self.window_size, f"{needs}: use at most {most}")
        raise _reject(
            "num_sink_tokens", self.num_sink_tokens, f"{needs}: use at most {(addressable - span) // (span + 1)}"
        )

    def changed(self, asked: "SleepConfig | dict[str, Any]") -> "SleepConfig":
        """A checkpoint's settings with those that were asked for; its blocks are what they are.

        Args:
            asked: a dictionary sets just those fields; of a `SleepConfig` the blocks' fields count only where they are
                not the defaults.

        Raises:
            ValueError: other blocks than the checkpoint's.
        """
        if isinstance(asked, SleepConfig):
            default = SleepConfig()
            values = {field.name: getattr(asked, field.name) for field in dataclasses.fields(SleepConfig)}
            asked = {k: v for k, v in values.items() if k not in BLOCK_FIELDS or v != getattr(default, k)}
        for name in BLOCK_FIELDS:
            if name in asked and asked[name] != getattr(self, name):
                raise ValueError(
                    f"SleepConfig.{name}={asked[name]!r} cannot work: the checkpoint's blocks have "
                    f"{name}={getattr(self, name)!r}. Leave it out"
                )
        return dataclasses.replace(self, **asked)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_dict` reads it back."""
        plain = {**dataclasses.asdict(self), "version": __version__}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SleepConfig":
        """Read what `to_dict` wrote; fields of a newer hf_sleep are named in a warning and left out."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            written_by = values.get("version", "unknown")
            warnings.warn(
                f"SleepConfig: unknown fields {unknown} (written by hf_sleep {written_by}, this is "
                f"{__version__}) are ignored",
                stacklevel=2,
            )
        return cls(**{key: value for key, value in values.items() if key in known})


BLOCK_FIELDS = [
    f.name for f in dataclasses.fields(SleepConfig) if f.name.startswith("block_") or f.name == "num_blocks"
]


def check_model_type(model_type: str | None, source: Any) -> None:
    """Raise `ValueError` unless `model_type` is a sleeping model's; `source` is where it was found."""
    if model_type != SleepLMConfig.model_type:
        raise ValueError(
            f"{source} has model_type={model_type!r}, so it is no checkpoint of a sleeping model. To retrofit a base "
            "model, use AutoModelForSleepLM.from_pretrained(name_or_path, sleep=SleepConfig(...))"
        )


def check_keywords(kwargs: Mapping[str, Any], text: PreTrainedConfig) -> None:
    """Raise `TypeError` where a keyword of from_pretrained is a setting of the sleep, and no field of the base's."""
    for field in dataclasses.fields(SleepConfig):
        if field.name in kwargs and not hasattr(text, field.name):
            raise TypeError(
                f"{field.name} is a setting of the sleep: pass sleep={{{field.name!r}: {kwargs[field.name]!r}}}"
            )


class SleepLMConfig(PreTrainedConfig):
    """Config of a `SleepForCausalLM`: a base decoder's config and how it sleeps.

    Args:
        text_config: the base decoder's config, or its dictionary.
        sleep: `SleepConfig`, or its dictionary; resolved against `text_config`.
        base_model_name_or_path: where the base came from, for cards and for reloading a checkpoint of new weights
            only.
        only_sleep: the checkpoint holds the fast-weight blocks alone, the base is loaded from
            `base_model_name_or_path`.
        use_cache: whether a forward returns a cache where it is not said.
    """

    model_type = "sleep_lm"
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    text_config: Any = None
    sleep: Any = None
    base_model_name_or_path: str | None = None
    base_fingerprint: str | None = None
    only_sleep: bool = False
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.text_config is None:
            # PreTrainedConfig compares itself with a default instance when it writes its JSON.
            self.text_config = CONFIG_MAPPING["llama"]()
        if isinstance(self.text_config, dict):
            fields = dict(self.text_config)
            model_type = fields.pop("model_type", None)
            if model_type not in CONFIG_MAPPING:
                raise ValueError(
                    f"SleepLMConfig.text_config has model_type={model_type!r}, which this transformers does not know; "
                    "it must be the config of a decoder, with its model_type"
                )
            self.text_config = CONFIG_MAPPING[model_type](**fields)
        if not isinstance(self.sleep, SleepConfig):
            self.sleep = SleepConfig.from_dict(self.sleep or {})
        self.sleep = self.sleep.resolve(self.text_config)
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if kwargs.get(token) is None:
                kwargs[token] = getattr(self.text_config, token, None)
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """A checkpoint's config.json as a dictionary, and the keywords left over.

        Raises:
            ValueError: the config of another kind of model.
        """
        values, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        check_model_type(values.get("model_type"), pretrained_model_name_or_path)
        return values, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read what `to_dict` wrote; a keyword sets a field, `sleep` and `text_config` just what they name of it."""
        asked = kwargs.pop("sleep", None) or {}
        choices = {f"_{key}": kwargs[key] for key in ("attn_implementation", "experts_implementation") if key in kwargs}
        made = super().from_dict(config_dict, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        for name, choice in choices.items():
            setattr(config, name, choice)  # again, for a text_config that came after it
        config.sleep = config.sleep.changed(asked).resolve(config.text_config)
        return made

    def to_dict(self) -> dict[str, Any]:
        """The dictionary written to config.json, with `sleep` as plain values."""
        output = super().to_dict()
        output["sleep"] = self.sleep.to_dict()
        return output
