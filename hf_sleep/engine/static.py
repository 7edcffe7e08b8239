"""Decoding in place: a batch's memory in tensors of a fixed size, and one token read into them.

A `Memory` is a value, of which every token makes a new one, of other shapes. Nothing of that can be one graph. While
tokens come one by one and no window is full, the same memory can lie in `Buffers`, as wide as it can ever become, and
`read_token` writes into them. Where tokens stand is said by tensors too, so every token takes the same steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..bases.decoder import Decoder
from ..memory import KV, Carried, Counters, FastWeights, Memory
from .eviction import Eviction
from .slots import RunningOrder
from .window import PlacedOnDevice, Window, mask_of


@dataclass(frozen=True, eq=False)
class Buffers:
    """What a batch carries while it decodes, and its next token, in tensors that are written in place.

    Args:
        input_ids: `[B, 1]`, int64, the next token.
        active: `[B]`, bool, which rows have one. A row alone always has.
        places: `[4, B]`, int64, of the next token: its position number, KV columns held, tokens in the window, and
            tokens read so far.
        carried: per slot, as in `Memory`; KV is `[B, H, M, D]`, M the most columns that are ever held.
        loop_output: `[B, L, C]`, as in `Memory`.
        loop_input: `[B, L, C]`, as in `Memory`.
        size: L, and the most columns that an eviction leaves.
    """

    input_ids: torch.Tensor
    active: torch.Tensor
    places: torch.Tensor
    carried: tuple[Carried, ...]
    loop_output: torch.Tensor
    loop_input: torch.Tensor | None
    size: tuple[int, int]

    @classmethod
    def like(cls, memory: Memory, eviction: Eviction) -> "Buffers":
        """Make some for a memory in the middle of its windows. They hold nothing of it yet."""
        tensors = (_fixed(t, width) for t, width in _widths(memory, eviction))
        carried = tuple(pair and type(pair)(*(next(tensors) for _ in pair)) for pair in memory.carried)
        loop_output, rows = next(tensors), len(memory.counters)
        ids, places = (torch.zeros(*shape, rows, dtype=torch.long, device=loop_output.device) for shape in ((), (4,)))
        return cls(
            _fixed(ids.unsqueeze(1)),
            _fixed(ids.bool()),
            _fixed(places),
            carried,
            loop_output,
            next(tensors, None),
            (eviction.window_size, eviction.most_retained),
        )

    def fit(self, memory: Memory, eviction: Eviction) -> bool:
        """Tell whether they can hold a memory: they are what `like` would make for it."""
        mine = [(t.shape, t.dtype, t.device) for t in _tensors_of(self)]
        return mine == [(_shape(t, width), t.dtype, t.device) for t, width in _widths(memory, eviction)]

    @torch.no_grad()
    def load(self, memory: Memory) -> None:
        """Write what a memory holds into them."""
        for mine, theirs in zip(_tensors_of(self), _tensors_of(memory), strict=True):
            width = min(mine.shape[-2], theirs.shape[-2])
            mine[..., :width, :].copy_(theirs[..., :width, :])
            mine[..., width:, :].zero_()  # masked, but 0 times what is not finite is not 0
        self.place(memory)

    @torch.no_grad()
    def put(self, input_ids: torch.Tensor, counts: Sequence[int]) -> None:
        """Write the next token: ids `[B, 1]`, and per row 1, or 0 where the column is a pad."""
        self.input_ids.copy_(input_ids)
        if len(counts) > 1:
            self.active.copy_(torch.tensor(counts))

    def moving(self) -> list[torch.Tensor]:
        """What a token changes where something is held already: fast weights, and the places."""
        return [*(t for pair in self.carried if isinstance(pair, FastWeights) for t in pair), self.places]

    @torch.no_grad()
    def move_on(self, states: list[torch.Tensor]) -> None:
        """Take what `read_token` returned: until then what was held before the token is held still."""
        torch._foreach_copy_(self.moving(), states)

    @torch.no_grad()
    def place(self, memory: Memory) -> None:
        """Say where the next token of every row stands."""
        rows = [(row.position, row.kv_length, row.fill, row.seen) for row in memory.counters]
        self.places.copy_(torch.tensor(rows).T)

    def memory(self, shell: Memory) -> Memory:
        """What they hold, as a value.

        Args:
            shell: has all but the tensors: counters, columns and what the windows began with.
        """
        width = max(row.kv_length for row in shell.counters)
        fill = max(row.fill for row in shell.counters)
        carried = tuple(
            KV(*(t[..., :width, :].clone() for t in pair))
            if isinstance(pair, KV)
            else pair and FastWeights(*(t.clone() for t in pair))
            for pair in self.carried
        )
        window = [None if t is None else t[:, :fill].clone() for t in (self.loop_output, self.loop_input)]
        return replace(shell, carried=carried, loop_output=window[0], loop_input=window[1])

    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in (self.input_ids, self.active, self.places, *_tensors_of(self)))


def _tensors_of(held: Memory | Buffers) -> list[torch.Tensor]:
    """All tensors, in an order that both have."""
    pairs = (*held.carried, (held.loop_output, held.loop_input))
    return [t for pair in pairs for t in pair or () if t is not None]


def _widths(memory: Memory, eviction: Eviction) -> Iterator[tuple[torch.Tensor, int]]:
    """All tensors of a memory, and how many columns (dimension -2) a buffer for each has."""
    window = eviction.window_size
    for pair in memory.carried:
        for t in pair or ():
            yield t, eviction.most_retained + window if isinstance(pair, KV) else t.shape[-2]
    for kept in (memory.loop_output, memory.loop_input):
        if kept is not None:
            yield kept, window


def _shape(t: torch.Tensor, width: int) -> torch.Size:
    return torch.Size((*t.shape[:-2], width, t.shape[-1]))


def _fixed(like: torch.Tensor, width: int | None = None) -> torch.Tensor:
    """Zeros as `like`, or with `width` columns (dimension -2), which graphs find at the same address every time."""
    with torch.inference_mode(False):
        t = torch.zeros(like.shape if width is None else _shape(like, width), dtype=like.dtype, device=like.device)
    torch._dynamo.mark_static_address(t)
    return t


class WriteAt:
    """Writes each row's new column into its buffer, in place; takes the part of `Append`.

    Args:
        column: `[B]`, where.
        active: `[B]`, the rows that have a new token; `None`: all.
    """

    def __init__(self, column: torch.Tensor, active: torch.Tensor | None):
        self.column, self.active = column, active
        self.row = torch.arange(len(column), device=column.device)

    def __call__(self, buffer: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        """Write `[B, ..., 1, D]` into `[B, ..., M, D]`, and return that."""
        assert buffer is not None  # all KV is there
        columns, new = buffer.movedim(-2, 1), new.movedim(-2, 1)[:, 0].to(buffer.dtype)
        # A row that has ended may be full: it gets back what stands in its last column.
        at = self.column.clamp(max=columns.shape[1] - 1)
        columns[self.row, at] = new if self.active is None else _where(self.active, new, columns[self.row, at])
        return buffer


def can_step(memory: Memory, order: RunningOrder) -> bool:
    """Whether all KV of a memory is there to be written after: windows have begun, and were read whole."""
    if memory.loop_output is None:
        return False
    return not any(slot.holds_kv and pair is None for slot, pair in zip(order.slots, memory.carried, strict=True))


def has_room(rows: Sequence[Counters], eviction: Eviction, counts: Sequence[int]) -> bool:
    """Whether a token of every row that has one fits into buffers as they are made for an eviction.

    It does not where the row sleeps first, nor where an eviction of before has left it more KV than this one would.

    Args:
        rows: their counters.
        eviction: of now.
        counts: per row, 1 or 0.
    """
    window = eviction.window_size
    most = eviction.most_retained + window
    return any(counts) and all(
        row.fill + n <= window and row.kv_length + n <= most for row, n in zip(rows, counts, strict=True)
    )


def read_token(
    decoder: Decoder, order: RunningOrder, eviction: Eviction, buffers: Buffers
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Read a token of every active row, no window of which is full: `Sleeper.wake` of one token, in place.

    Nothing here asks a tensor for its value, so that it can be compiled as one graph.

    Args:
        decoder: of the base.
        order: of its layers and the blocks.
        eviction: says how far attention reaches, and which tokens are sinks.
        buffers: have the token. Written are columns that hold nothing yet.

    Returns:
        Logits `[B, 1, vocab]`, zeros in rows that have no token, and what `Buffers.move_on` takes.
    """
    active = buffers.active if len(buffers.active) > 1 else None
    position, held, fill, seen = buffers.places.unbind()
    x: Any = decoder.embed(buffers.input_ids)
    at = PlacedOnDevice(
        position.unsqueeze(1),
        position.unsqueeze(1),
        held.unsqueeze(1),
        1,
        (seen + 1).clamp(max=eviction.num_sink_tokens).unsqueeze(1),
        eviction.most_retained + eviction.window_size,
        eviction.span,
    )
    implementation, kinds = decoder.attention_implementation, decoder.attention_kinds
    masks: Any = {kind: mask_of(at, decoder.own_window(kind), implementation, x.dtype) for kind in kinds}
    ropes = {kind: decoder.rope(x, at.positions, kind) for kind in kinds}
    window, in_window = Window(None, WriteAt(held, active), ropes, masks), WriteAt(fill, active)

    entered, carried = order.run(order.before, x, buffers.carried, window, is_checkpointing=False)
    left, carried = order.run(order.loop, entered, carried, window, is_checkpointing=False)
    x, carried = order.run(order.after, left, carried, window, is_checkpointing=False)
    logits = decoder.logits(x)

    in_window(buffers.loop_output, left)
    if buffers.loop_input is not None:
        in_window(buffers.loop_input, entered)
    states = [t for pair in carried if isinstance(pair, FastWeights) for t in pair]
    if active is None:
        return logits, [*states, buffers.places + 1]
    states = [_where(active, new, old) for new, old in zip(states, buffers.moving(), strict=False)]
    return _where(active, logits, torch.zeros_like(logits)), [*states, buffers.places + active]


def _where(active: torch.Tensor, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """`new` in the rows that are active, and `old` in the others: `[B, ...]` each."""
    return torch.where(active.view(-1, *(1,) * (new.dim() - 1)), new, old)
