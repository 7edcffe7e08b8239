"""A window as one pass sees it: where its tokens stand, who sees whom, and where new KV goes.

A `Window` is built for new tokens (`Window.of_new`), or to read the tokens of the current window once more
(`Window.again`). Both say the same of the same tokens, so a pass over a window equals its ordinary read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..bases.decoder import Decoder, Rope
from ..memory import Counters, Memory
from .eviction import Eviction


@dataclass(frozen=True)
class Span:
    """The tokens of a call that some rows read next, none beyond the end of its row's window.

    Args:
        rows: which rows of the batch.
        start: per row, how many of the call's tokens come before.
        counts: per row, how many tokens, at least 1.
        is_wanted: whether an output of any of them is needed.
        sleeps_next: whether every row sleeps then, within the call.
    """

    rows: list[int]
    start: list[int]
    counts: list[int]
    is_wanted: bool
    sleeps_next: bool

    @classmethod
    def next(
        cls,
        memory: Memory,
        done: list[int],
        counts: list[int],
        window_size: int,
        wanted: list[list[bool]] | None,
        sleep_after: list[list[int]],
    ) -> "Span":
        """What every row that has tokens left reads next.

        Args:
            memory: of the batch; no window is full.
            done: per row, tokens of the call that were read.
            counts: per row, tokens of the call.
            window_size: L.
            wanted: per row and token, whether its output is needed; `None` for all.
            sleep_after: per row, after how many tokens of the call it sleeps, ascending.
        """
        rows = [b for b, n in enumerate(counts) if done[b] < n]
        start = [done[b] for b in rows]
        fill = [memory.counters[b].fill for b in rows]
        told = [next((e for e in sleep_after[b] if e > s), counts[b]) for b, s in zip(rows, start, strict=True)]
        take = [min(t, counts[b], s + window_size - f) - s for b, s, f, t in zip(rows, start, fill, told, strict=True)]
        ends = [s + n for s, n in zip(start, take, strict=True)]
        return cls(
            rows,
            start,
            take,
            wanted is None or any(any(wanted[b][s:e]) for b, s, e in zip(rows, start, ends, strict=True)),
            all(
                e in sleep_after[b] or (f + n == window_size and e < counts[b])
                for b, f, n, e in zip(rows, fill, take, ends, strict=True)
            ),
        )

    def of(self, pieces: dict[int, torch.Tensor]) -> torch.Tensor:
        """Its tokens, `[rows, tokens, C]`, pads after the shorter rows' tokens.

        Args:
            pieces: the call's `[B, T, C]`, as `in_pieces` cut it.
        """
        first = max(begin for begin in pieces if begin <= min(self.start))
        x, start, width = pieces[first], [s - first for s in self.start], max(self.counts)
        if len(self.rows) == x.shape[0] and len(set(start)) == 1:
            return x if x.shape[1] == width else x[:, start[0] : start[0] + width]
        index = torch.tensor(start).unsqueeze(1) + torch.arange(width)
        picked = x[torch.tensor(self.rows, device=x.device)]
        return take_columns(picked, index.clamp(max=x.shape[1] - 1).to(x.device))


def in_pieces(x: torch.Tensor, fill: Sequence[int], window_size: int) -> dict[int, torch.Tensor]:
    """Cut a call's tokens `[B, T, C]` where windows end, if all rows' end together; by the first token of each piece.

    The gradient of a slice is as long as what it was taken from, and that of a piece as long as the piece: of a long
    call, windows that are slices cost the square of their number.

    Args:
        x: the tokens.
        fill: per row, tokens in its window before them.
        window_size: L.
    """
    first = window_size - fill[0] % window_size
    if len(set(fill)) > 1 or x.shape[1] <= first:
        return {0: x}
    begins = [0, *range(first, x.shape[1], window_size)]
    sizes = [end - begin for begin, end in zip(begins, [*begins[1:], x.shape[1]], strict=True)]
    return dict(zip(begins, x.split(sizes, dim=1), strict=True))


@dataclass(frozen=True, eq=False)
class Read:
    """What came of one span.

    Args:
        span: the tokens that were read.
        hidden: `[rows, tokens, C]`, what `Decoder.logits` takes; `None` where nobody wanted it.
    """

    span: Span
    hidden: torch.Tensor | None


class Append:
    """Puts each row's new columns right after its old ones, rows left-aligned.

    Args:
        old: columns held per row.
        new: columns that come per row.
        device: of the tensors.
    """

    def __init__(self, old: Sequence[int], new: Sequence[int], device: torch.device):
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


@dataclass(frozen=True, eq=False)
class Window:
    """One pass over some tokens.

    Args:
        lengths: `[B]` real tokens per row, `None` where all are real.
        append: puts the pass's keys and values after the retained ones.
        ropes: by kind of attention layer, its `position_embeddings`.
        masks: by kind of attention layer, `[B or 1, 1, T, W]`; `None` where plain causality says it all.
        decays: whether fast weights decay.
    """

    lengths: torch.Tensor | None
    append: Callable[[torch.Tensor | None, torch.Tensor], torch.Tensor]
    ropes: dict[str, Rope]
    masks: dict[str, torch.Tensor | None]
    decays: bool = True

    @classmethod
    def of_new(
        cls, decoder: Decoder, eviction: Eviction, x: torch.Tensor, rows: Sequence[Counters], counts: list[int]
    ) -> "Window":
        """The ordinary read.

        Args:
            decoder: of the base.
            eviction: says how far attention reaches, and which tokens are sinks.
            x: the new tokens, `[B, T, C]`.
            rows: their counters before the read.
            counts: new tokens per row.
        """
        seen = [row.seen + n for row, n in zip(rows, counts, strict=True)]
        held, first = [row.kv_length for row in rows], [row.position for row in rows]
        return cls._of(decoder, x, Places(first, held, counts, [eviction.sinks(n) for n in seen], eviction.span))

    @classmethod
    def again(cls, decoder: Decoder, eviction: Eviction, x: torch.Tensor, rows: Sequence[Counters]) -> "Window":
        """One more pass over what the current windows hold, `x` `[B, T, C]`; `rows` are the counters after the read."""
        held, first = [row.retained for row in rows], [row.position - row.fill for row in rows]
        sinks, counts = [eviction.sinks(row.seen) for row in rows], [row.fill for row in rows]
        return cls._of(decoder, x, Places(first, held, counts, sinks, eviction.span))

    @classmethod
    def _of(cls, decoder: Decoder, x: torch.Tensor, places: "Places") -> "Window":
        device, width = x.device, x.shape[1]
        is_ragged = min(places.counts) != width
        lengths = torch.tensor(places.counts, device=device) if is_ragged else None
        if are_alike := len({*zip(places.first, places.held, places.counts, places.sinks, strict=True)}) == 1:
            places = places.of_one_row()
        steps = torch.arange(width, device=device)
        if are_alike:
            positions = (steps + places.first[0]).unsqueeze(0)
        else:
            positions = torch.tensor(places.first, device=device).unsqueeze(1) + steps
        implementation, dtype = decoder.attention_implementation, x.dtype
        masks, ropes = {}, {}
        for kind in decoder.attention_kinds:
            own = decoder.own_window(kind)
            is_plain = are_alike and not is_ragged and places.need_no_mask(width, own, implementation)
            masks[kind] = None if is_plain else _mask(places, positions, own, implementation, dtype)
            ropes[kind] = decoder.rope(x, positions, kind)
        return cls(lengths, Append(places.held, places.counts, device), ropes, masks)


@dataclass(frozen=True)
class Places:
    """Where the tokens of one pass stand, row by row; of one row where all are alike.

    Args:
        first: position number of the first new token.
        held: KV columns before it.
        counts: new tokens.
        sinks: how many of the columns are sinks, which stand first.
        span: tokens that a query sees besides the sinks, `None` for all.
    """

    first: list[int]
    held: list[int]
    counts: list[int]
    sinks: list[int]
    span: int | None

    def of_one_row(self) -> "Places":
        """The first row's."""
        return Places(self.first[:1], self.held[:1], self.counts[:1], self.sinks[:1], self.span)

    def need_no_mask(self, width: int, own_window: int | None, implementation: str) -> bool:
        """Whether an attention layer's own causality says it all, for rows that are alike and without pads."""
        first, held, sinks = self.first[0], self.held[0], self.sinks[0]
        whole = held + width
        farthest = whole if held == first or not sinks else first + width
        is_flash = implementation.startswith("flash")
        in_span = self.span is None or whole <= self.span + sinks
        # At just its own window's length transformers makes a mask for sdpa, in which all is visible.
        in_own_window = own_window is None or farthest < own_window + is_flash
        # Flash attention lines its causal mask up with the last key, sdpa with the first.
        from_start = held == 0 and implementation != "eager"
        return in_span and in_own_window and (width == 1 or from_start or is_flash)


def _mask(
    places: Places, positions: torch.Tensor, own_window: int | None, implementation: str, dtype: torch.dtype
) -> torch.Tensor:
    """Who sees whom, `[B or 1, 1, T, W]`, of places that are known as numbers."""
    first, held, new, sinks = (
        torch.tensor(values, device=positions.device).unsqueeze(1)
        for values in (places.first, places.held, places.counts, places.sinks)
    )
    width = max(h + n for h, n in zip(places.held, places.counts, strict=True))
    at = PlacedOnDevice(positions, first, held, new, sinks, width, places.span)
    return mask_of(at, own_window, implementation, dtype)


@dataclass(frozen=True)
class PlacedOnDevice:
    """`Places` as tensors.

    Args:
        positions: `[B or 1, T]`, of the new tokens.
        first: `[B or 1, 1]`, as the others are: position number of the first new token.
        held: KV columns before it.
        new: new tokens.
        sinks: how many of the columns are sinks, which stand first.
        width: W, columns that attention reads; those that hold nothing are masked.
        span: tokens that a query sees besides the sinks, `None` for all.
    """

    positions: torch.Tensor
    first: torch.Tensor
    held: torch.Tensor
    new: torch.Tensor | int
    sinks: torch.Tensor
    width: int
    span: int | None


def mask_of(at: PlacedOnDevice, own_window: int | None, implementation: str, dtype: torch.dtype) -> torch.Tensor:
    """Who sees whom, `[B or 1, 1, T, W]`: boolean for sdpa, additive in `dtype` for eager."""
    require_masks(implementation)
    column = torch.arange(at.width, device=at.positions.device)
    keys = torch.where(column < at.sinks, column, column + (at.first - at.held))
    distance = at.positions.unsqueeze(2) - keys.unsqueeze(1)
    visible = (distance >= 0) & (column < at.held + at.new).unsqueeze(1)
    if at.span is not None:
        visible &= (distance < at.span) | (column < at.sinks).unsqueeze(1)
    if own_window is not None:
        visible &= distance < own_window
    visible = visible.unsqueeze(1)
    if implementation == "eager":
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    return visible


def require_masks(implementation: str) -> None:
    """Check that a way to compute attention takes masks like ours.

    Raises:
        ValueError: it does not.
    """
    if implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"attn_implementation={implementation!r} cannot express this mask (rows of different lengths, sliding "
            "eviction, sinks or fixed buffers): load the base with attn_implementation='sdpa'"
        )
