"""How a model sleeps. Nothing here needs torch or transformers, so that a command's help can be made of it."""

import dataclasses
import math
import warnings
from bisect import bisect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .bases.decoder import adapter_of
from .checks import is_whole, reject, require_int, require_int_tuple
from .registry import BETWEEN, BLOCKS, EVICTIONS
from .version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .engine import Eviction


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
            what the base's family loops (Jet-Nemotron: the middle half).
        between: what happens between two passes: `"none"`, as in the paper, or a registered name.
        block_kind: `"jet"`, `"gated_delta_net"`, or the name of a registered block.
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
    between: str = "none"
    block_kind: str = "jet"
    num_blocks: int | None = None
    block_layers: tuple[int, ...] | None = None
    block_num_heads: int | None = None
    block_head_dim: int | None = None
    block_expand_v: float = 2.0
    block_conv_size: int = 4
    version: str = __version__

    def __post_init__(self) -> None:
        require_int("SleepConfig.window_size", self.window_size, 2)
        require_int("SleepConfig.sleep_passes", self.sleep_passes, 1)
        require_int("SleepConfig.num_sink_tokens", self.num_sink_tokens, 0)
        require_int("SleepConfig.block_conv_size", self.block_conv_size, 2)
        if self.eviction not in EVICTIONS:
            raise reject("SleepConfig.eviction", self.eviction, EVICTIONS.what_works())
        if self.between not in BETWEEN:
            raise reject("SleepConfig.between", self.between, BETWEEN.what_works())
        if self.block_kind not in BLOCKS:
            raise reject("SleepConfig.block_kind", self.block_kind, BLOCKS.what_works())
        if self.num_sink_tokens >= self.window_size:
            raise reject(
                "SleepConfig.num_sink_tokens",
                self.num_sink_tokens,
                f"it must be less than window_size={self.window_size}",
            )
        for field in ("num_blocks", "block_num_heads", "block_head_dim"):
            if getattr(self, field) is not None:
                require_int(f"SleepConfig.{field}", getattr(self, field), 0 if field == "num_blocks" else 1)
        expand_v = self.block_expand_v
        if not isinstance(expand_v, int | float) or isinstance(expand_v, bool) or not 0 < expand_v < math.inf:
            raise reject("SleepConfig.block_expand_v", expand_v, "it must be a positive number")
        if self.loop_layers is not None:
            loop = require_int_tuple("SleepConfig.loop_layers", self.loop_layers)
            if len(loop) != 2 or not 0 <= loop[0] < loop[1]:
                raise reject(
                    "SleepConfig.loop_layers", loop, "it must be (a, b) with 0 <= a < b: layers a to b - 1 loop"
                )
            self.loop_layers = (loop[0], loop[1])
        if self.block_layers is not None:
            self.block_layers = require_int_tuple("SleepConfig.block_layers", self.block_layers)
            if list(self.block_layers) != sorted(set(self.block_layers)) or min(self.block_layers, default=0) < 0:
                raise reject(
                    "SleepConfig.block_layers",
                    self.block_layers,
                    "it must list layers from 0 upwards, each once, in order",
                )
            if self.num_blocks not in (None, len(self.block_layers)):
                raise reject(
                    "SleepConfig.num_blocks",
                    self.num_blocks,
                    f"block_layers lists {len(self.block_layers)}: give one of the two",
                )

    def make_eviction(self) -> "Eviction":
        """The eviction that these settings name."""
        return EVICTIONS[self.eviction](self.window_size, self.num_sink_tokens)

    @property
    def max_position(self) -> int:
        """One more than the largest position number any token is ever given, however long the stream."""
        return self.make_eviction().max_position

    def resolve(self, text_config: "PreTrainedConfig") -> "SleepConfig":
        """Fill what was left open from the base's config and check that the two fit together.

        Args:
            text_config: config of the base decoder.

        Returns:
            A new `SleepConfig` in which `loop_layers`, `block_layers` and the blocks' sizes are numbers.

        Raises:
            ValueError: where the base cannot be run as asked.
        """
        depth = text_config.num_hidden_layers
        adapter = adapter_of(text_config)
        has_fast_weights = adapter.has_fast_weights(text_config)
        block_layers = self.block_layers
        if block_layers is None:
            default = 0 if has_fast_weights else max(1, depth // 4)
            count = default if self.num_blocks is None else self.num_blocks
            if count > depth:
                raise reject(
                    "SleepConfig.num_blocks", count, f"the base has {depth} layers, so at most {depth} blocks fit"
                )
            block_layers = tuple(int((i + 0.5) * depth / count) for i in range(count))
        if block_layers and block_layers[-1] >= depth:
            raise reject("SleepConfig.block_layers", block_layers, f"the base's layers are 0 to {depth - 1}")
        if not block_layers and not has_fast_weights:
            field = "num_blocks" if self.block_layers is None else "block_layers"
            raise reject(
                f"SleepConfig.{field}",
                getattr(self, field),
                "the base has no linear-recurrent layers, so nothing could remember: inject at least one",
            )
        loop_layers = self.loop_layers or adapter.default_loop_layers(text_config)
        if loop_layers[1] > depth:
            raise reject(
                "SleepConfig.loop_layers", loop_layers, f"the base has {depth} layers, so b is at most {depth}"
            )
        self._check_positions(getattr(text_config, "max_position_embeddings", None))
        heads = getattr(text_config, "num_attention_heads", 1)
        head_dim = self.block_head_dim or getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
        width = head_dim * self.block_expand_v
        if not is_whole(width):
            best = max(1, round(width)) / head_dim
            raise reject(
                "SleepConfig.block_expand_v",
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
        needs = (
            f"{self.eviction} eviction, a window of {self.window_size} and {self.num_sink_tokens} sink tokens need "
            f"{self.max_position} positions, the base addresses {addressable}"
        )

        def too_many(window_size: int, num_sink_tokens: int) -> bool:
            return EVICTIONS[self.eviction](window_size, num_sink_tokens).max_position > addressable

        sizes = range(self.num_sink_tokens + 1, self.window_size)
        if fitting := bisect(sizes, False, key=lambda size: too_many(size, self.num_sink_tokens)):
            raise reject("SleepConfig.window_size", self.window_size, f"{needs}: use at most {sizes[fitting - 1]}")
        most = bisect(range(self.num_sink_tokens), False, key=lambda sinks: too_many(sinks + 1, sinks)) - 1
        raise reject("SleepConfig.num_sink_tokens", self.num_sink_tokens, f"{needs}: use at most {most}")

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
