"""Settings of sleep. Nothing here needs torch or transformers, so that a command's help can be made of it."""

import dataclasses
import math
import textwrap
import warnings
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .checks import is_whole, reject, require_int, require_int_tuple, require_range
from .registry import BETWEEN, BLOCKS, EVICTIONS
from .version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .engine import Eviction, PassPolicy

REGISTRIES = {"eviction": EVICTIONS, "between": BETWEEN, "block_kind": BLOCKS}
"""Registries of the fields that name a class."""


def _setting(default: Any, help: str) -> Any:
    """Make a field that carries its help, for the docstring, the command line and the docs."""
    return dataclasses.field(default=default, metadata={"help": help})


BEFORE: dict[str, Any] = {"between": "none", "decay_once": False, "block_half_lives": None}
"""What a config means that was written before a field came whose default is another."""


@dataclass(frozen=True)
class SleepConfig:
    """Settings of a model's sleep, and of the fast-weight blocks that it is given to sleep with.

    A value that never changes: `with model.sleeping(sleep_passes=3):` sleeps with other settings for a while, and
    `dataclasses.replace` makes another config of this one.

    Args:
        {settings}
        version: Release of hf_sleep that wrote this config.

    Raises:
        ValueError: a setting that cannot work, with the field, its value and what would work.

    Source: Lee et al. 2026 (arXiv 2605.26099), Alg. 1 and §5.
    """

    window_size: int = _setting(512, "Tokens read between two sleeps, L.")
    sleep_passes: "int | PassPolicy" = _setting(  # noqa: RUF009 - as those of the other fields
        2,
        "Passes over a full window before its KV cache is dropped, N. The ordinary read is the first of them, so 1 is "
        "the plain windowed hybrid. A registered pass policy decides window by window. Can be set per call.",
    )
    eviction: str = _setting(
        "hard",
        "KV that a sleep drops. hard: all of the window's. sliding: all but that of the last L - 1 "
        "tokens, and attention spans the last L.",
    )
    num_sink_tokens: int = _setting(
        0, "First tokens of a sequence, whose KV is never dropped. An untrained sliding model needs at least one."
    )
    loop_layers: tuple[int, int] | None = _setting(
        None,
        "Range (a, b) of the decoder layers that all passes run, from a to b - 1. By default the middle third, or the "
        "range that the base's family names.",
    )
    between: str | None = _setting(
        None,
        "Step between two passes. gate: a pass reads e + g (z - e), of what pass 1 read, e, and what the last pass "
        "wrote, z; g is trained, one per channel, at first 0. none: it reads z, as in the paper. By default none in "
        "the two models of the paper, and gate in all others.",
    )
    decay_once: bool = _setting(
        False,
        "Let passes 2 to N of a window write without decay, so that more passes do not forget earlier windows faster.",
    )
    block_kind: str = _setting("jet", "Kind of the injected blocks: gated_delta_net or jet.")
    num_blocks: int | None = _setting(
        None,
        "Fast-weight blocks to inject, evenly spaced inside the loop, and those that do not fit there outside it. By "
        "default one per four layers of the base, and none into a base with linear-recurrent layers of its own.",
    )
    block_layers: tuple[int, ...] | None = _setting(
        None, "Instead of num_blocks, the decoder layers after which a block is injected."
    )
    block_num_heads: int | None = _setting(
        None, "Heads of a block, H. By default as many as fit a third of the hidden size."
    )
    block_head_dim: int | None = _setting(None, "Key width of a head, K. By default the base's own head_dim.")
    block_expand_v: float = _setting(2.0, "Value width of a head over its key width, V / K.")
    block_conv_size: int = _setting(4, "Taps of the short convolutions, W, in tokens.")
    block_half_lives: tuple[float, float] | None = _setting(
        (0.25, 16.0),
        "Shortest and longest half-life of a block's heads at first, in windows, the others evenly spaced between them "
        "in the logarithm. None: the kind's own, Mamba's for gated_delta_net and jet.",
    )
    version: str = __version__

    def __post_init__(self) -> None:
        for name, least in (("window_size", 2), ("num_sink_tokens", 0), ("block_conv_size", 2)):
            require_int(f"SleepConfig.{name}", getattr(self, name), least)
        if type(self.sleep_passes) is not int or self.sleep_passes < 1:
            object.__setattr__(self, "sleep_passes", self._registered_policy())
        for name, least in (("num_blocks", 0), ("block_num_heads", 1), ("block_head_dim", 1)):
            if getattr(self, name) is not None:
                require_int(f"SleepConfig.{name}", getattr(self, name), least)
        for name in ("loop_layers", "block_layers"):
            if getattr(self, name) is not None:
                row = require_int_tuple(f"SleepConfig.{name}", getattr(self, name))
                object.__setattr__(self, name, row)  # a frozen dataclass has no other way
        if self.block_half_lives is not None:
            object.__setattr__(
                self, "block_half_lives", require_range("SleepConfig.block_half_lives", self.block_half_lives)
            )
        for name, registry in REGISTRIES.items():
            if (name, getattr(self, name)) == ("between", None):
                continue
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in registry:
                raise self._wrong(name, registry.what_works())
        if not isinstance(self.decay_once, bool):
            raise self._wrong("decay_once", "it must be True or False")
        if self.num_sink_tokens >= self.window_size:
            raise self._wrong("num_sink_tokens", f"it must be less than window_size={self.window_size}")
        expand_v = self.block_expand_v
        if not isinstance(expand_v, int | float) or isinstance(expand_v, bool) or not 0 < expand_v < math.inf:
            raise self._wrong("block_expand_v", "it must be a positive number")
        if (loop := self.loop_layers) is not None and (len(loop) != 2 or not 0 <= loop[0] < loop[1]):
            raise self._wrong("loop_layers", "it must be (a, b) with 0 <= a < b: layers a to b - 1 loop")
        if (layers := self.block_layers) is not None:
            if list(layers) != sorted(set(layers)) or min(layers, default=0) < 0:
                raise self._wrong("block_layers", "it must list layers from 0 upwards, each once, in order")
            if self.num_blocks not in (None, len(layers)):
                raise self._wrong("num_blocks", f"block_layers lists {len(layers)}: give one of the two")

    def _wrong(self, field: str, what_works: str) -> ValueError:
        return reject(f"SleepConfig.{field}", getattr(self, field), what_works)

    def _registered_policy(self) -> "int | PassPolicy":
        """Read `sleep_passes` where it is no number: a policy, or what `to_dict` made of one."""
        from .engine.passes import FixedPasses, pass_policy, policy_fields

        policy = pass_policy(self.sleep_passes, "SleepConfig.sleep_passes")
        policy_fields(policy)
        return policy.passes if isinstance(policy, FixedPasses) else policy

    def make_policy(self) -> "PassPolicy":
        """Make the pass policy that these settings name."""
        from .engine.passes import pass_policy

        return pass_policy(self.sleep_passes)

    def make_eviction(self) -> "Eviction":
        """Make the eviction that these settings name."""
        return EVICTIONS[self.eviction](self.window_size, self.num_sink_tokens)

    @property
    def max_position(self) -> int:
        """One more than the largest position number any token is ever given, however long the stream."""
        return self.make_eviction().max_position

    def resolve(self, text_config: "PreTrainedConfig") -> "SleepConfig":
        """Fill in what was left open, from the base's config, and check that the two fit together.

        Args:
            text_config: config of the base decoder.

        Returns:
            A new `SleepConfig` in which `loop_layers`, `block_layers` and the blocks' sizes are numbers.

        Raises:
            ValueError: settings with which this base cannot be run.
        """
        from .bases import adapter_of  # needs torch

        depth = text_config.num_hidden_layers
        adapter = adapter_of(text_config)
        loop_layers = self.loop_layers or adapter.default_loop_layers(text_config)
        if loop_layers[1] > depth:
            works = f"the base has {depth} layers, so b is at most {depth}"
            raise reject("SleepConfig.loop_layers", loop_layers, works)
        block_layers = self._place_blocks(depth, loop_layers, adapter.has_fast_weights(text_config))
        self._check_positions(getattr(text_config, "max_position_embeddings", None))
        heads = getattr(text_config, "num_attention_heads", 1)
        head_dim = self.block_head_dim or getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
        if not is_whole(width := head_dim * self.block_expand_v):
            raise self._wrong(
                "block_expand_v",
                f"times a head_dim of {head_dim} it is {width:g} values a head, which must be a whole number: "
                f"{max(1, round(width)) / head_dim:g} works",
            )
        return dataclasses.replace(
            self,
            loop_layers=loop_layers,
            between=self.between or adapter.default_between,
            block_layers=block_layers,
            num_blocks=len(block_layers),
            block_head_dim=head_dim,
            block_num_heads=self.block_num_heads or max(1, text_config.hidden_size // (3 * head_dim)),
        )

    def _place_blocks(self, depth: int, loop_layers: tuple[int, int], has_fast_weights: bool) -> tuple[int, ...]:
        """Choose the layers after which blocks are injected into a base of `depth` layers: those that loop first."""
        layers = self.block_layers
        if layers is None:
            default = 0 if has_fast_weights else max(1, depth // 4)
            count = default if self.num_blocks is None else self.num_blocks
            if count > depth:
                works = f"the base has {depth} layers, so at most {depth} blocks fit"
                raise reject("SleepConfig.num_blocks", count, works)
            looped = range(*loop_layers)
            others = [i for i in range(depth) if i not in looped]
            inside = min(count, len(looped))
            layers = tuple(sorted(_evenly(looped, inside) + _evenly(others, count - inside)))
        if layers and layers[-1] >= depth:
            raise reject("SleepConfig.block_layers", layers, f"the base's layers are 0 to {depth - 1}")
        if not layers and not has_fast_weights:
            raise self._wrong(
                "num_blocks" if self.block_layers is None else "block_layers",
                "the base has no linear-recurrent layers, so nothing could remember: inject at least one",
            )
        return layers

    def _check_positions(self, addressable: int | None) -> None:
        """Raise `ValueError` unless the base has a position number for every token of a window and those before it."""
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
            raise self._wrong("window_size", f"{needs}: use at most {sizes[fitting - 1]}")
        most = bisect(range(self.num_sink_tokens), False, key=lambda sinks: too_many(sinks + 1, sinks)) - 1
        raise self._wrong("num_sink_tokens", f"{needs}: use at most {most}")

    def changed(self, asked: "SleepConfig | dict[str, Any]") -> "SleepConfig":
        """Return a checkpoint's settings with those that were asked for. Its blocks are what they are.

        Args:
            asked: settings. A dictionary sets just the fields that it names. Of a `SleepConfig` every field is set, but
                `loop_layers` and the blocks' fields only where they are not the defaults.

        Raises:
            ValueError: other blocks than the checkpoint's.
        """
        if isinstance(asked, SleepConfig):
            default = SleepConfig()
            values = {field.name: getattr(asked, field.name) for field in dataclasses.fields(SleepConfig)}
            kept = ["loop_layers", *BUILT_FIELDS]
            asked = {k: v for k, v in values.items() if k not in kept or v != getattr(default, k)}
        asked = {name: tuple(value) if isinstance(value, list) else value for name, value in asked.items()}
        for name in BUILT_FIELDS:
            if name in asked and asked[name] != getattr(self, name):
                works = f"the checkpoint's blocks have {name}={getattr(self, name)!r}. Leave it out"
                raise reject(f"SleepConfig.{name}", asked[name], works)
        return dataclasses.replace(self, **asked)

    def to_dict(self) -> dict[str, Any]:
        """Make a JSON-ready dictionary; `from_dict` reads it back.

        Where a field names a class from outside this package, `imports` says which module registers it.
        """
        from .engine.passes import policy_fields

        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}
        plain |= {"version": __version__, "sleep_passes": policy_fields(self.make_policy())}
        modules = {name: registry.module_of(getattr(self, name)) for name, registry in REGISTRIES.items()}
        imports = {name: module for name, module in modules.items() if module is not None}
        return plain | ({"imports": imports} if imports else {})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SleepConfig":
        """Read what `to_dict` wrote. Fields of a newer hf_sleep are named in a warning and left out.

        Raises:
            ValueError: a setting that cannot work, or a name whose module has not been imported here.
        """
        values = dict(values)
        modules = values.pop("imports", {})
        for name, registry in REGISTRIES.items():
            if name in modules and values[name] not in registry:
                raise reject(f"SleepConfig.{name}", values[name], registry.what_works(modules[name]))
        if "version" in values:
            values = BEFORE | values
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            written_by = values.get("version", "unknown")
            warnings.warn(
                f"SleepConfig: unknown fields {unknown} (written by hf_sleep {written_by}, this is {__version__}) "
                "are ignored",
                stacklevel=2,
            )
        return cls(**{key: value for key, value in values.items() if key in known})


def _evenly(layers: Sequence[int], count: int) -> list[int]:
    """Choose `count` of the layers, evenly spaced."""
    return [layers[int((i + 0.5) * len(layers) / count)] for i in range(count)]


SETTINGS = {field.name: field for field in dataclasses.fields(SleepConfig) if "help" in field.metadata}
"""The fields that a user sets, each with `metadata["help"]`."""

BUILT_FIELDS = [name for name in SETTINGS if name.startswith("block_") or name in ("num_blocks", "between")]
"""The fields that modules were built by, which no setting changes later."""

if SleepConfig.__doc__:  # python -OO leaves none
    _lines = (f"{name}: {field.metadata['help']}" for name, field in SETTINGS.items())
    _lines = (textwrap.fill(line, 120, initial_indent=" " * 8, subsequent_indent=" " * 12) for line in _lines)
    SleepConfig.__doc__ = SleepConfig.__doc__.replace("{settings}", "\n".join(_lines).lstrip())
