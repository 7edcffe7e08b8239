"""Slots: the layers of a model in running order, and what each carries from pass to pass.

A slot is a decoder layer of the base, an injected fast-weight block, or the final norm of a family that norms the end
of every pass. Slots before the loop run once per window, slots in it N times, slots after it once more on what the last
pass made.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..bases.decoder import Decoder
from ..layers import FastWeightBlock
from ..memory import KV, Carried, FastWeights, Memory
from ..placement import compute_device
from .eviction import EvictionPlan
from .window import Window, take_columns


class Slot:
    """One layer in running order.

    Args:
        decoder: of the base.
        index: the decoder layer that it is, or that it follows.
        is_looped: whether every pass of a sleep runs it.
    """

    remembers = False
    """Whether it carries fast weights."""

    holds_kv = False
    """Whether it carries keys and values."""

    def __init__(self, decoder: Decoder, index: int, is_looped: bool):
        self.decoder, self.index, self.is_looped = decoder, index, is_looped

    @property
    def module(self) -> nn.Module:
        """The module that it runs."""
        return self.decoder.layers[self.index]

    @property
    def device(self) -> torch.device:
        """Where it computes, and what it carries lives."""
        return compute_device(self.module)

    def empty(self, batch_size: int, dtype: torch.dtype) -> Carried:
        """What it carries of sequences that have read nothing; `dtype` is the activations'."""
        return None

    def run(self, x: torch.Tensor, carried: Any, window: Window) -> tuple[torch.Tensor, Carried]:
        """Run it over a window: `[B, T, C]` and what it carried before, to the same of after."""
        raise NotImplementedError

    def window_start(self, carried: Any) -> FastWeights | None:
        """What a memory keeps of a window's start, so that `at_start` can go back there."""
        return None

    def at_start(self, carried: Any, kept: FastWeights | None, retained: int) -> Carried:
        """What it carried when the window began.

        Args:
            carried: at the window's end.
            kept: what `window_start` kept.
            retained: KV columns that the last eviction left, of the row that has most.
        """
        return None

    def rewound(self, carried: Any, start: Any) -> Carried:
        """What a new pass finds: `start`, what `at_start` gave, but for what continues from pass to pass."""
        return start

    def evicted(self, carried: Any, plan: EvictionPlan | None) -> Carried:
        """What is left after an eviction."""
        return carried


class Norm(Slot):
    """The base's final norm, which carries nothing."""

    @property
    def module(self) -> nn.Module:
        return self.decoder.final_norm

    def run(self, x: torch.Tensor, carried: None, window: Window) -> tuple[torch.Tensor, None]:
        return self.decoder.norm(x), None


class WindowKV:
    """Stands in for a cache while one attention layer runs: joins its new keys and values to what was retained."""

    def __init__(self, held: KV | None, append: Callable[[torch.Tensor | None, torch.Tensor], torch.Tensor]):
        self.pair, self.append = held, append
        self.is_updated = False

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> KV:
        """Called by the base's attention layer with `[B, H, T, D]`."""
        held = self.pair or (None, None)
        self.pair, self.is_updated = KV(self.append(held[0], keys), self.append(held[1], values)), True
        return self.pair


class Attention(Slot):
    """An attention layer of the base. It carries the KV of what was retained and of the current window.

    Args:
        kind: the decoder's name for this kind of layer, which decides RoPE and mask.
    """

    holds_kv = True

    def __init__(self, decoder: Decoder, index: int, is_looped: bool, kind: str):
        super().__init__(decoder, index, is_looped)
        self.kind = kind

    def run(self, x: torch.Tensor, carried: KV | None, window: Window) -> tuple[torch.Tensor, KV | None]:
        kv = WindowKV(carried, window.append)
        x = self.decoder.attention_layer(self.index, x, window.ropes[self.kind], window.masks[self.kind], kv)
        if not kv.is_updated:
            raise RuntimeError(
                f"decoder layer {self.index} left its cache alone: turn the base's own gradient checkpointing off, and "
                "the SleepForCausalLM's on"
            )
        return x, kv.pair

    def at_start(self, carried: KV | None, kept: FastWeights | None, retained: int) -> KV | None:
        if carried is None or not retained:
            return None
        # Copies: a view would keep the whole window's KV alive through the backward.
        return KV(*(t[..., :retained, :].clone() for t in carried))

    def evicted(self, carried: KV | None, plan: EvictionPlan | None) -> KV | None:
        if carried is None or plan is None:
            return None
        keys, values = (take_columns(t, plan.columns) for t in carried)
        if plan.turns:
            turned = self.decoder.shift_keys(keys, plan.shift, self.kind)
            keys = torch.where(plan.is_sink[:, None, :, None].to(keys.device), keys, turned)
        return KV(keys, values)


class Recurrence(Slot):
    """A layer with fast weights. In the loop they continue from pass to pass; the convolution starts over."""

    remembers = True

    def step(
        self, x: torch.Tensor, carried: FastWeights, lengths: torch.Tensor | None, decays: bool
    ) -> tuple[torch.Tensor, FastWeights]:
        """Run the layer over `[B, T, C]`, of which `lengths` `[B]` tokens are real.

        `decays`: whether what was written before decays.
        """
        raise NotImplementedError

    def run(self, x: torch.Tensor, carried: FastWeights, window: Window) -> tuple[torch.Tensor, FastWeights]:
        x = x.to(carried.recurrent_state.device)
        lengths = None if window.lengths is None else window.lengths.to(x.device)
        x, after = self.step(x, carried, lengths, window.decays)
        old, new = carried.recurrent_state.dtype, after.recurrent_state.dtype
        if new != old:
            raise ValueError(
                f"fast weights come out of layer {self.index} in {new} and went in in {old}: FSDP's mixed precision "
                "casts them. Use SleepTrainer, which leaves the casts to autocast, or a MixedPrecisionPolicy with "
                "cast_forward_inputs=False and output_dtype=None"
            )
        return x, after

    def window_start(self, carried: FastWeights) -> FastWeights:
        if not self.is_looped:
            return carried
        # In the loop the fast weights continue from pass to pass: their old value is not worth its bytes.
        recurrent_state, conv_state = carried
        return FastWeights(recurrent_state.new_empty(recurrent_state.shape[0], 0, 0), conv_state)

    def at_start(self, carried: FastWeights, kept: FastWeights | None, retained: int) -> FastWeights | None:
        return kept

    def rewound(self, carried: FastWeights, start: FastWeights) -> FastWeights:
        return FastWeights(carried.recurrent_state, start.conv_state) if self.is_looped else start


class BaseRecurrence(Recurrence):
    """A linear-recurrent layer of the base's own."""

    def __init__(self, decoder: Decoder, index: int, is_looped: bool, kind: str):
        super().__init__(decoder, index, is_looped)
        self.kind = kind

    def empty(self, batch_size: int, dtype: torch.dtype) -> FastWeights:
        return self.decoder.empty_fast_weights(self.index, batch_size, self.device, dtype)

    def step(
        self, x: torch.Tensor, carried: FastWeights, lengths: torch.Tensor | None, decays: bool
    ) -> tuple[torch.Tensor, FastWeights]:
        return self.decoder.recurrent_layer(self.index, x, carried, lengths, decays)


class Block(Recurrence):
    """An injected fast-weight block.

    Args:
        block: the block.
    """

    def __init__(self, decoder: Decoder, index: int, is_looped: bool, block: FastWeightBlock):
        super().__init__(decoder, index, is_looped)
        self.block = block

    @property
    def module(self) -> nn.Module:
        return self.block

    def empty(self, batch_size: int, dtype: torch.dtype) -> FastWeights:
        return self.block.empty(batch_size, self.device, dtype)

    def step(
        self, x: torch.Tensor, carried: FastWeights, lengths: torch.Tensor | None, decays: bool
    ) -> tuple[torch.Tensor, FastWeights]:
        return self.block(x, carried, lengths, decays)


@dataclass(frozen=True)
class RunningOrder:
    """All slots in running order, which of them loop, and what they do together.

    Args:
        slots: in running order.
        loop: the slots that every pass runs.
    """

    slots: tuple[Slot, ...]
    loop: range

    @property
    def before(self) -> range:
        """Slots before the loop, which run once per window."""
        return range(self.loop.start)

    @property
    def up_to_loop(self) -> range:
        """Slots before the loop and in it."""
        return range(self.loop.stop)

    @property
    def after(self) -> range:
        """Slots after the loop, which run once per window, on the last pass's output."""
        return range(self.loop.stop, len(self.slots))

    @property
    def all(self) -> range:
        """Every slot."""
        return range(len(self.slots))

    @property
    def up_to_memory(self) -> range:
        """Slots up to the last with fast weights: all that is needed of a window whose KV is dropped."""
        return range(1 + max(self.fast_slots, default=-1))

    @property
    def fast_slots(self) -> frozenset[int]:
        """Which slots carry fast weights."""
        return frozenset(i for i, slot in enumerate(self.slots) if slot.remembers)

    def run(
        self, slots: range, x: torch.Tensor, carried: Sequence[Carried], window: Window, is_checkpointing: bool
    ) -> tuple[torch.Tensor, tuple[Carried, ...]]:
        """Run `slots` once over a window.

        Args:
            slots: which ones.
            x: `[B, T, C]`.
            carried: what all slots carry.
            window: the tokens' places.
            is_checkpointing: compute it again in the backward instead of keeping its activations.

        Returns:
            `[B, T, C]`, and what all slots carry then.
        """
        part, mine = self.slots[slots.start : slots.stop], carried[slots.start : slots.stop]
        kept = len(part)
        if is_checkpointing and torch.is_grad_enabled():
            # Of the first frozen layers nothing is kept anyway, and nothing has to be computed again.
            kept = _passing_no_gradient(part, x, mine)
        x, first = run_slots(part[:kept], x, mine[:kept], window)
        rest: list[Carried] = []
        if kept < len(part):
            x, rest = checkpoint(run_slots, part[kept:], x, mine[kept:], window, use_reentrant=False)
        return x, (*carried[: slots.start], *first, *rest, *carried[slots.stop :])

    def empty(self, batch_size: int, dtype: torch.dtype) -> tuple[Carried, ...]:
        """What all slots carry of sequences that have read nothing; `dtype` is the activations'."""
        return tuple(slot.empty(batch_size, dtype) for slot in self.slots)

    def evicted(self, carried: Sequence[Carried], plan: EvictionPlan | None) -> tuple[Carried, ...]:
        """What all slots carry after an eviction."""
        return tuple(slot.evicted(pair, plan) for slot, pair in zip(self.slots, carried, strict=True))

    def window_start(self, carried: Sequence[Carried]) -> dict[int, FastWeights]:
        """What a memory keeps of the window that begins now, of the slots that a sleep runs again."""
        kept = {i: self.slots[i].window_start(carried[i]) for i in range(self.loop.start, len(carried))}
        return {i: pair for i, pair in kept.items() if pair is not None}

    def at_start(self, memory: Memory) -> list[Carried]:
        """What each slot carried when the window began; of those before the loop, which do not run again, `None`."""
        retained, kept = max(row.retained for row in memory.counters), memory.window_start
        return [
            slot.at_start(pair, kept.get(i), retained) if i >= self.loop.start else None
            for i, (slot, pair) in enumerate(zip(self.slots, memory.carried, strict=True))
        ]

    def rewound(self, slots: range, carried: Sequence[Carried], start: Sequence[Carried]) -> list[Carried]:
        """`carried`, but of `slots` what a new pass over them finds, `start` being what `at_start` gave."""
        again = [self.slots[i].rewound(carried[i], start[i]) for i in slots]
        return [*carried[: slots.start], *again, *carried[slots.stop :]]

    def looped(self, carried: Sequence[Carried]) -> list[torch.Tensor]:
        """The fast weights `[B, H, K, V]` of every slot in the loop."""
        return [pair.recurrent_state for i in self.loop if isinstance(pair := carried[i], FastWeights)]


def running_order(decoder: Decoder, blocks: Mapping[str, Any], loop_layers: tuple[int, int]) -> RunningOrder:
    """Put a base's layers and its blocks in order.

    Args:
        decoder: of the base.
        blocks: fast-weight blocks by the decoder layer that they follow; a block loops where its layer does.
        loop_layers: half-open range of decoder layers that loop.
    """
    slots: list[Slot] = []
    first, end = loop_layers
    for index, kind in enumerate(decoder.kinds):
        is_looped = first <= index < end
        layer = BaseRecurrence if kind in decoder.recurrent_kinds else Attention
        slots.append(layer(decoder, index, is_looped, kind))
        if (block := blocks.get(str(index))) is not None:
            slots.append(Block(decoder, index, is_looped, block))
    if decoder.norm_every_pass:
        last = len(decoder.kinds) - 1
        slots.append(Norm(decoder, last, first <= last < end))
    looped = [i for i, slot in enumerate(slots) if slot.is_looped]
    return RunningOrder(tuple(slots), range(looped[0], looped[-1] + 1))


def among(slots: range, first: range) -> range:
    """Those of `slots` that are among the `first`, which begin at 0."""
    return range(slots.start, max(slots.start, min(slots.stop, first.stop)))


def _passing_no_gradient(slots: Sequence[Slot], x: torch.Tensor, carried: Sequence[Carried]) -> int:
    """How many of the first slots no gradient passes through: all up to the first that is trained."""
    if x.requires_grad:
        return 0
    return next(
        (
            i
            for i, (slot, pair) in enumerate(zip(slots, carried, strict=True))
            if any(t.requires_grad for t in (*slot.module.parameters(), *(pair or ())))
        ),
        len(slots),
    )


def run_slots(
    slots: Sequence[Slot], x: torch.Tensor, carried: Sequence[Carried], window: Window
) -> tuple[torch.Tensor, list[Carried]]:
    """Run slots one after the other over a window: `[B, T, C]` and what each carried before, to the same of after."""
    after: list[Carried] = []
    for slot, pair in zip(slots, carried, strict=True):
        x, pair = slot.run(x, pair, window)
        after.append(pair)
    return x, after
