"""The algorithm: read a window in one pass, consolidate it with N, evict its KV.

A *slot* is one layer of the model in running order: a decoder layer of the base, or an injected fast-weight block.
Slots before the loop run once per window, slots in it N times, slots after it once more on what the last pass made.
Where a family norms the end of every pass, that norm is a slot too, behind the last layer. The ordinary read of a
window is pass 1, so a window that was read token by token needs only N - 1 passes more.

Source: Lee et al. 2026 (arXiv 2605.26099), Alg. 1.
"""

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .cache import Pair, Row, SleepCache, Tensors
from .config import SleepConfig
from .offload import compute_device

PassHook = Callable[[int, list[torch.Tensor]], None]


@dataclass(frozen=True)
class SleepEvent:
    """One sleep of one row.

    Args:
        row: of the batch that the call read; of a beam search, a beam.
        tokens: that the row has read so far, in this call and before it; pads do not count.
        seconds: that passes 2 to N and the eviction took. Rows that slept together share them.
        sleep_passes: N, the ordinary read included.
    """

    row: int
    tokens: int
    seconds: float
    sleep_passes: int


SleepHook = Callable[[SleepEvent], None]


@dataclass(frozen=True)
class Slot:
    """One layer in running order.

    Args:
        role: `"attention"` or `"linear"` (decoder layers of the base), `"block"` (an injected fast-weight block), or
            `"norm"` (the base's final norm, which carries nothing).
        index: the decoder layer it is, or that it follows.
        kind: for attention, the base's name for this kind of layer, which decides RoPE and mask.
    """

    role: str
    index: int
    kind: str


@functools.lru_cache(maxsize=32)
def programme(
    kinds: tuple[str, ...], blocks: tuple[int, ...], loop_layers: tuple[int, int], norm_every_pass: bool
) -> tuple[tuple[Slot, ...], range]:
    """All slots in running order, and which of them loop.

    Args:
        kinds: what kind of layer each decoder layer is.
        blocks: decoder layers that a fast-weight block follows; it loops where its layer does.
        loop_layers: half-open range of decoder layers that loop.
        norm_every_pass: whether the final norm closes every pass, and loops where the last layer does.
    """
    slots: list[Slot] = []
    starts = []
    for index, kind in enumerate(kinds):
        starts.append(len(slots))
        slots.append(Slot("linear" if kind == "linear_attention" else "attention", index, kind))
        if index in blocks:
            slots.append(Slot("block", index, ""))
    if norm_every_pass:
        slots.append(Slot("norm", len(kinds) - 1, ""))
    starts.append(len(slots))
    return tuple(slots), range(starts[loop_layers[0]], starts[loop_layers[1]])


@dataclass
class Piece:
    """What one window read of some rows produced.

    Args:
        rows: which rows of the batch.
        start: per row, how many of the call's tokens came before.
        counts: per row, how many tokens were read; pads stand behind them.
        hidden: `[len(rows), max(counts), C]`, what `Decoder.logits` takes, or `None` where nobody wanted it.
    """

    rows: list[int]
    start: list[int]
    counts: list[int]
    hidden: torch.Tensor | None


class Join:
    """Puts each row's new columns right behind its old ones, rows left-aligned.

    Args:
        old: columns held per row.
        new: columns that come per row.
        device: of the tensors.
    """

    def __init__(self, old: list[int], new: list[int], device: torch.device):
        self.held = max(old)
        self.index: torch.Tensor | None = None
        if min(old) != self.held:
            width = max(a + b for a, b in zip(old, new, strict=True))
            column = torch.arange(width, device=device)
            lengths = torch.tensor(old, device=device).unsqueeze(1)
            last = self.held + max(new) - 1
            self.index = torch.where(column < lengths, column, self.held + column - lengths).clamp(max=last)

    def __call__(self, old: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        """`[B, ..., W, D]` and `[B, ..., T, D]` to `[B, ..., W', D]`."""
        if old is None:
            return new
        both = torch.cat((old[..., : self.held, :], new), dim=-2)
        return both if self.index is None else take_columns(both, self.index)


def take_columns(t: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Columns `index` `[B, W]` of `[B, ..., T, D]`, per row; `[1, W]`: the same of every row."""
    index = index.to(t.device)
    if index.shape[0] == 1:
        # Its backward needs no copy of t, as gather's does.
        return t.index_select(-2, index[0])
    index = index.view(index.shape[0], *(1,) * (t.dim() - 3), index.shape[1], 1)
    return t.gather(-2, index.expand(*t.shape[:-2], -1, t.shape[-1]))


@dataclass
class Geometry:
    """Where the tokens of one pass stand, and who sees whom.

    Args:
        lengths: `[B]` real tokens per row, `None` where all are real.
        join: puts the pass's keys and values behind the retained ones.
        ropes: by kind of attention layer, its `position_embeddings`.
        masks: by kind of attention layer, `[B or 1, 1, T, W]`; `None` where plain causality says it all.
    """

    lengths: torch.Tensor | None
    join: Join
    ropes: dict[str, Any]
    masks: dict[str, torch.Tensor | None]


class WindowKV:
    """Stands in for a cache while one attention layer runs: joins its new keys and values to what was retained."""

    def __init__(self, held: Pair | None, join: Join):
        self.pair = held
        self.join = join
        self.updated = False

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> Pair:
        """Called by the base's attention layer with `[B, H, T, D]`."""
        old_keys, old_values = self.pair or (None, None)
        self.pair, self.updated = (self.join(old_keys, keys), self.join(old_values, values)), True
        return self.pair


class Sleeper:
    """Runs a base's layers and its fast-weight blocks over windows: reads, consolidates, evicts.

    Holds no state of its own: all that crosses a call is in the `SleepCache` it is given.

    Args:
        decoder: how to run the base's layers, a `decoders.Decoder`.
        blocks: fast-weight blocks by the decoder layer they follow.
        config: resolved.
        checkpointing: recompute each (window, pass) in the backward instead of keeping its activations.
        hooks: called with the number of every pass over a window that sleeps, from 1, and the fast weights
            `[B, H, K, V]` that it leaves in each slot of the loop.
        sleep_hooks: called after every sleep, once per row that slept.
    """

    def __init__(
        self,
        decoder: Any,
        blocks: nn.ModuleDict,
        config: SleepConfig,
        checkpointing: bool = False,
        hooks: tuple[PassHook, ...] = (),
        sleep_hooks: tuple[SleepHook, ...] = (),
    ):
        self.decoder = decoder
        self.blocks: dict[str, Any] = dict(blocks.items())
        self.config = config
        self.checkpointing = checkpointing
        self.hooks, self.sleep_hooks = hooks, sleep_hooks
        loop_layers = config.loop_layers or (0, len(decoder.kinds))
        self.slots, self.loop = programme(
            tuple(decoder.kinds), tuple(map(int, blocks)), loop_layers, decoder.norm_every_pass
        )
        self.head, self.tail = range(self.loop.start), range(self.loop.stop, len(self.slots))
        self.fast_slots = frozenset(i for i, slot in enumerate(self.slots) if slot.role in ("linear", "block"))
        self.attention_kinds = sorted({slot.kind for slot in self.slots if slot.role == "attention"})

    # Reading.

    def read(
        self,
        cache: SleepCache,
        x: torch.Tensor,
        counts: list[int],
        passes: int,
        wanted: list[list[bool]] | None,
        backprop_windows: int | None = None,
    ) -> Iterator[Piece]:
        """Read tokens, sleeping whenever a window is full and another token comes.

        Args:
            cache: is moved on; must hold as many rows as `x`.
            x: embeddings `[B, T, C]`, rows left-aligned.
            counts: real tokens per row.
            passes: N of every sleep on the way.
            wanted: per row and token, whether its output is needed; `None` for all.
            backprop_windows: cut a row's graph behind every so many of its sleeps; `None`: never.

        Yields:
            A `Piece` per window read.
        """
        size = self.config.window_size
        done, slept = [0] * len(counts), [0] * len(counts)
        while rows := [b for b, n in enumerate(counts) if done[b] < n]:
            full = [b for b in rows if cache.rows[b].fill == size]
            self.consolidate(cache, full, passes)
            if backprop_windows is not None:
                for b in full:
                    slept[b] += 1
                self._cut(cache, [b for b in full if slept[b] % backprop_windows == 0], x.device)
            start = [done[b] for b in rows]
            take = [min(counts[b] - done[b], size - cache.rows[b].fill) for b in rows]
            need = wanted is None or any(any(wanted[b][s : s + n]) for b, s, n in zip(rows, start, take, strict=True))
            # A window that sleeps within this call runs its tail then: only its logits would need it now.
            sleeps_now = all(
                cache.rows[b].fill + n == size and s + n < counts[b] for b, s, n in zip(rows, start, take, strict=True)
            )
            hidden = self.wake(
                cache, rows, self._tokens(x, rows, start, take), take, need or passes == 1 or not sleeps_now
            )
            for b, n in zip(rows, take, strict=True):
                done[b] += n
            yield Piece(rows, start, take, hidden if need else None)

    @staticmethod
    def _tokens(x: torch.Tensor, rows: list[int], start: list[int], take: list[int]) -> torch.Tensor:
        """The next `take` tokens of `rows`, `[len(rows), max(take), C]`."""
        if len(rows) == x.shape[0] and len(set(start)) == 1:
            return x[:, start[0] : start[0] + max(take)]
        index = torch.tensor(start).unsqueeze(1) + torch.arange(max(take))
        picked = x[torch.tensor(rows, device=x.device)]
        return take_columns(picked, index.clamp(max=x.shape[1] - 1).to(x.device))

    def wake(
        self, cache: SleepCache, rows: list[int], x: torch.Tensor, counts: list[int], run_tail: bool
    ) -> torch.Tensor:
        """One ordinary pass over new tokens of the current windows: pass 1.

        Args:
            cache: is moved on.
            rows: which rows read.
            x: `[len(rows), T, C]`.
            counts: tokens per row, at least 1.
            run_tail: whether the slots behind the loop are needed now.

        Returns:
            `[len(rows), T, C]`, what `Decoder.logits` takes.
        """
        part, index = self._part(cache, rows, x.device)
        held = [cache.rows[b].kv_length for b in rows]
        geometry = self._geometry(x, [cache.rows[b] for b in rows], held, counts)
        x, layers = self._run(range(self.loop.stop), x, part.layers, geometry)
        join = Join([cache.rows[b].fill for b in rows], counts, x.device)
        hidden = join(None if part.hidden is None else part.hidden.to(x.device), x)
        if run_tail:
            x, layers = self._run(self.tail, x, layers, geometry)
        self._put(cache, index, Tensors(layers, part.window_start, hidden))
        for b, n in zip(rows, counts, strict=True):
            row = cache.rows[b]
            row.seen, row.fill, row.position = row.seen + n, row.fill + n, row.position + n
        return x

    # Sleeping.

    def consolidate(self, cache: SleepCache, rows: list[int], passes: int) -> None:
        """Sleep: run passes 2..N over the current windows of `rows`, then evict.

        Every pass starts from the fast weights that the pass before left and from the convolution tail of the
        window's start, and sees the retained KV and its own. Slots behind the loop read the window anew, on the last
        pass's output and from their state at the window's start, so that they too have read it once.

        Args:
            cache: is moved on.
            rows: rows with at least one token in their window; others are left alone.
            passes: N; pass 1 was the ordinary read.
        """
        rows = [b for b in rows if cache.rows[b].fill]
        if not rows:
            return
        device = self._hidden(cache).device
        began = self._clock(device)
        part, index = self._part(cache, rows, device)
        states = [cache.rows[b] for b in rows]
        self._show(1, part.layers)
        if passes > 1:
            fills = [row.fill for row in states]
            retained = [row.retained for row in states]
            x = self._hidden(part)[:, : max(fills)]
            geometry = self._geometry(x, states, retained, fills, rewind=True)
            layers, start = part.layers, self._start_of_window(part, max(retained))
            for number in range(2, passes + 1):
                x, layers = self._run(self.loop, x, self._rewind(layers, start, self.loop), geometry)
                self._show(number, layers)
            _, layers = self._run(self.tail, x, self._rewind(layers, start, self.tail), geometry)
            part = Tensors(layers, part.window_start, None)
        layers = self._evict(part.layers, states, device)
        self._put(cache, index, Tensors(layers, self._window_start(layers), None))
        seconds = self._clock(device) - began
        for b in rows if self.sleep_hooks else ():
            for hook in self.sleep_hooks:
                hook(SleepEvent(b, cache.rows[b].seen, seconds, passes))

    def _clock(self, device: torch.device) -> float:
        """Seconds, when the device has done all it was asked; 0 where nobody asks for them."""
        if not self.sleep_hooks:
            return 0.0
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    def _show(self, number: int, layers: list[Pair | None]) -> None:
        """Show the hooks what pass `number` has written."""
        for hook in self.hooks:
            hook(number, [pair[0] for i in self.loop if i in self.fast_slots and (pair := layers[i]) is not None])

    def _cut(self, cache: SleepCache, rows: list[int], device: torch.device) -> None:
        """Let no gradient pass from what `rows` read next to what they have read."""
        if rows:
            part, index = self._part(cache, rows, device)
            self._put(cache, index, part.map(torch.Tensor.detach))

    def _window_start(self, layers: list[Pair | None]) -> dict[int, Pair]:
        """What a rewind will need: convolution tails in the loop, whole states behind it."""
        kept: dict[int, Pair] = {}
        for i in sorted(self.fast_slots):
            if (pair := layers[i]) is None or i in self.head:
                continue
            # In the loop the fast weights go on from pass to pass: their old value is not worth its bytes.
            kept[i] = pair if i in self.tail else (pair[0].new_empty(pair[0].shape[0], 0, 0), pair[1])
        return kept

    def _start_of_window(self, part: Tensors, retained: int) -> dict[int, Pair | None]:
        """What each slot that runs again carried when the window began."""
        start: dict[int, Pair | None] = dict(part.window_start)
        for i in (*self.loop, *self.tail):
            if i not in self.fast_slots:
                pair = part.layers[i]
                # Copies: a view would keep the whole window's KV alive through the backward.
                start[i] = (
                    (pair[0][..., :retained, :].clone(), pair[1][..., :retained, :].clone())
                    if pair and retained
                    else None
                )
        return start

    def _rewind(self, layers: list[Pair | None], start: dict[int, Pair | None], slots: range) -> list[Pair | None]:
        """Slots as a new pass finds them: as at the window's start, but in the loop the recurrent states go on."""
        layers = list(layers)
        for i in slots:
            pair, begin = layers[i], start[i]
            if i in self.fast_slots and i in self.loop and pair is not None and begin is not None:
                begin = (pair[0], begin[1])
            layers[i] = begin
        return layers

    def _evict(self, layers: list[Pair | None], rows: list[Row], device: torch.device) -> list[Pair | None]:
        """Drop the KV that the eviction style drops, and wind the position numbers back so that they stay bounded."""
        sinks = [min(self.config.num_sink_tokens, row.seen) for row in rows]
        recent = self.config.window_size - 1 if self.config.eviction == "sliding" else 0
        cap = self.config.max_position - self.config.window_size
        kept = [s + min(recent, row.kv_length - s) for s, row in zip(sinks, rows, strict=True)]
        dropped = [row.kv_length - keep for keep, row in zip(kept, rows, strict=True)]
        shifts = [min(row.position, cap) - row.position for row in rows]
        # A table of one row where all rows are alike.
        plan = torch.tensor(sorted({*zip(sinks, dropped, kept, shifts, strict=True)}))
        if len(plan) > 1:
            plan = torch.tensor([sinks, dropped, kept, shifts]).T
        column = torch.arange(max(kept))
        is_sink = column < plan[:, :1]
        index = torch.where(is_sink, column, column + plan[:, 1:2]).clamp(max=max(row.kv_length for row in rows) - 1)
        index, is_sink, shift = index.to(device), is_sink.to(device), plan[:, 3]
        layers = list(layers)
        for i, slot in enumerate(self.slots):
            pair = layers[i]
            if slot.role != "attention" or pair is None:
                continue
            if not max(kept):
                layers[i] = None
                continue
            keys, values = (take_columns(t, index) for t in pair)
            if recent and any(shifts):
                turned = self.decoder.shift_keys(keys, shift, slot.kind)
                keys = torch.where(is_sink[:, None, :, None].to(keys.device), keys, turned)
            layers[i] = (keys, values)
        for row, keep, change in zip(rows, kept, shifts, strict=True):
            row.fill, row.retained, row.position, row.sleeps = 0, keep, row.position + change, row.sleeps + 1
        return layers

    # Running.

    def start(self, batch_size: int, x: torch.Tensor) -> Tensors:
        """The tensors of a batch that has read nothing."""
        layers: list[Pair | None] = []
        for i, slot in enumerate(self.slots):
            if i not in self.fast_slots:
                layers.append(None)
            elif slot.role == "block":
                mixer = self.blocks[str(slot.index)].mixer
                layers.append(mixer.init_state(batch_size, self.device_of(slot), x.dtype))
            else:
                layers.append(self.decoder.linear_state(slot.index, batch_size, self.device_of(slot), x.dtype))
        return Tensors(layers, self._window_start(layers), None)

    def device_of(self, slot: Slot) -> torch.device:
        """Where a slot computes, and its cache lives."""
        if slot.role == "norm":
            return compute_device(self.decoder.model.norm)
        return compute_device(self.blocks[str(slot.index)] if slot.role == "block" else self.decoder.layers[slot.index])

    def _run(
        self, slots: range, x: torch.Tensor, layers: list[Pair | None], geometry: Geometry
    ) -> tuple[torch.Tensor, list[Pair | None]]:
        """Run `slots` once; `layers` is what they carry, of which a new list comes back."""
        if not slots:
            return x, layers
        mine = [layers[i] for i in slots]
        if self.checkpointing and torch.is_grad_enabled():
            x, mine = checkpoint(self._pass, slots, x, mine, geometry, use_reentrant=False)
        else:
            x, mine = self._pass(slots, x, mine, geometry)
        return x, [*layers[: slots.start], *mine, *layers[slots.stop :]]

    def _pass(
        self, slots: range, x: torch.Tensor, carried: list[Pair | None], geometry: Geometry
    ) -> tuple[torch.Tensor, list[Pair | None]]:
        out: list[Pair | None] = []
        for i, pair in zip(slots, carried, strict=True):
            slot = self.slots[i]
            if slot.role == "norm":
                x = self.decoder.model.norm(x)
                out.append(None)
                continue
            if slot.role == "attention":
                kv = WindowKV(pair, geometry.join)
                x = self.decoder.attention_layer(
                    slot.index, x, geometry.ropes[slot.kind], geometry.masks[slot.kind], kv
                )
                if not kv.updated:
                    raise RuntimeError(
                        f"decoder layer {slot.index} left its cache alone: turn the base's own gradient "
                        "checkpointing off, and the SleepForCausalLM's on"
                    )
                out.append(kv.pair)
                continue
            assert pair is not None  # fast weights begin as zeros, not as nothing
            x = x.to(pair[0].device)
            lengths = None if geometry.lengths is None else geometry.lengths.to(x.device)
            if slot.role == "block":
                x, state = self.blocks[str(slot.index)](x, pair, lengths)
            else:
                x, state = self.decoder.linear_layer(slot.index, x, pair, lengths)
            if state[0].dtype != pair[0].dtype:
                raise ValueError(
                    f"fast weights come out of layer {slot.index} in {state[0].dtype} and went in in {pair[0].dtype}: "
                    "FSDP's mixed precision casts them. Use SleepTrainer, which leaves the casts to autocast, or a "
                    "MixedPrecisionPolicy with cast_forward_inputs=False and output_dtype=None"
                )
            out.append(state)
        return x, out

    def _geometry(
        self, x: torch.Tensor, rows: list[Row], held: list[int], counts: list[int], rewind: bool = False
    ) -> Geometry:
        """Positions, masks and lengths for `counts` new tokens behind `held` KV columns.

        Args:
            x: the new tokens `[B, T, C]`.
            rows: their counters before the read; with `rewind`, after it.
        """
        device, width = x.device, x.shape[1]
        first = [row.position - n if rewind else row.position for row, n in zip(rows, counts, strict=True)]
        seen = [row.seen if rewind else row.seen + n for row, n in zip(rows, counts, strict=True)]
        sinks = [min(self.config.num_sink_tokens, n) for n in seen]
        one = len({*zip(first, held, counts, sinks, strict=True)}) == 1
        if one:
            first, held, sinks = first[:1], held[:1], sinks[:1]
        ragged = min(counts) != width
        steps = torch.arange(width, device=device)
        positions = (
            torch.tensor(first, device=device).unsqueeze(1) + steps if not one else (steps + first[0]).unsqueeze(0)
        )
        join = Join(held, counts[:1] if one else counts, device)
        masks = {}
        for kind in self.attention_kinds:
            own = self.decoder.own_window(kind)
            masks[kind] = self._mask(x, positions, first, held, counts, sinks, own, plain=one and not ragged)
        ropes = {kind: self.decoder.rope(x, positions, kind) for kind in self.attention_kinds}
        lengths = torch.tensor(counts, device=device) if ragged else None
        return Geometry(lengths, join, ropes, masks)

    def _mask(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        first: list[int],
        held: list[int],
        counts: list[int],
        sinks: list[int],
        own_window: int | None,
        plain: bool,
    ) -> torch.Tensor | None:
        """Who sees whom, `[B or 1, 1, T, W]`: boolean for sdpa, additive for eager; `None` where plain causality says
        it all."""
        width = positions.shape[1]
        implementation = self.decoder.config._attn_implementation
        span = self.config.window_size if self.config.eviction == "sliding" else None
        if plain:
            whole = held[0] + width
            farthest = whole if held[0] == first[0] or not sinks[0] else first[0] + width
            in_reach = (span is None or whole <= span + sinks[0]) and (own_window is None or farthest <= own_window)
            # Flash attention lines its causal mask up with the last key, sdpa with the first.
            from_start = held[0] == 0 and implementation != "eager"
            if in_reach and (width == 1 or from_start or implementation.startswith("flash")):
                return None
        if implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"attn_implementation={implementation!r} cannot express this mask (rows of different lengths, "
                "sliding eviction "
                "or sinks): load the base with attn_implementation='sdpa'"
            )
        device = x.device
        have = torch.tensor(held, device=device).unsqueeze(1)
        ends = torch.tensor(first, device=device).unsqueeze(1)
        new = torch.tensor(counts[: len(held)], device=device).unsqueeze(1)
        sink = torch.tensor(sinks, device=device).unsqueeze(1)
        column = torch.arange(
            max(h + n for h, n in zip(held, counts, strict=False)) if not plain else held[0] + width, device=device
        )
        keys = torch.where(column < sink, column, column + (ends - have))
        distance = positions.unsqueeze(2) - keys.unsqueeze(1)
        visible = (distance >= 0) & (column < have + new).unsqueeze(1)
        if span is not None:
            visible &= (distance < span) | (column < sink).unsqueeze(1)
        if own_window is not None:
            visible &= distance < own_window
        visible = visible.unsqueeze(1)
        if implementation == "eager":
            return torch.zeros_like(visible, dtype=x.dtype).masked_fill(~visible, torch.finfo(x.dtype).min)
        return visible

    # Rows.

    @staticmethod
    def _hidden(holder: SleepCache | Tensors) -> torch.Tensor:
        hidden = holder.tensors.hidden if isinstance(holder, SleepCache) else holder.hidden
        assert hidden is not None  # a row with tokens in its window has read them
        return hidden

    @staticmethod
    def _part(cache: SleepCache, rows: list[int], device: torch.device) -> tuple[Tensors, torch.Tensor | None]:
        """The tensors of `rows`, and where to put them back; the whole batch needs no copy."""
        if len(rows) == len(cache.rows):
            return cache.tensors, None
        index = torch.tensor(rows, device=device)
        return cache.tensors.select(index), index

    @staticmethod
    def _put(cache: SleepCache, index: torch.Tensor | None, part: Tensors) -> None:
        cache.tensors = part if index is None else cache.tensors.merge(index, part, len(cache.rows))
