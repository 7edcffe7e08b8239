"""Memory of sequences from call to call, as values: the window's KV, the fast weights, what the next sleep needs.

Nothing here is ever written in place. To read or to sleep is to make a new `Memory` of an old one.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch


class KV(NamedTuple):
    """Keys and values of one attention layer, rows left-aligned, batch first.

    Args:
        keys: `[B, H, T, D]`, rotated by their positions.
        values: `[B, H, T, V]`.
    """

    keys: torch.Tensor
    values: torch.Tensor


class FastWeights(NamedTuple):
    """Memory that a linear-recurrent layer carries from token to token, batch first.

    Args:
        recurrent_state: S, `[B, H, K, V]`, fp32 (fp64 in an fp64 model).
        conv_state: `[B, D, W]`, the last W inputs of its short convolution, oldest first.
    """

    recurrent_state: torch.Tensor
    conv_state: torch.Tensor


Carried = KV | FastWeights | None
"""Content of one slot; `None` where nothing was read yet, or there is nothing to carry."""


@dataclass(frozen=True)
class Counters:
    """Counters of one sequence, in tokens.

    Args:
        seen: real tokens read since the sequence began.
        fill: tokens in the current window, not yet slept on.
        retained: tokens whose KV survived the last eviction (sinks included).
        position: position number of the next token.
        sleeps: sleeps so far.
        pads: `mark_of` the columns that were pads in the calls that read the row; `None` where that is not known. Not
            the row's own: rows that read the same are equal, whatever their neighbours made of their columns.
    """

    seen: int = 0
    fill: int = 0
    retained: int = 0
    position: int = 0
    sleeps: int = 0
    pads: int | None = field(default=0, compare=False)

    @property
    def kv_length(self) -> int:
        """Tokens whose KV is held."""
        return self.retained + self.fill

    def after_reading(self, tokens: int) -> "Counters":
        """The counters when `tokens` more have been read into the window."""
        seen, fill, position = self.seen + tokens, self.fill + tokens, self.position + tokens
        return Counters(seen, fill, self.retained, position, self.sleeps, self.pads)

    def after_sleep(self, retained: int, position: int) -> "Counters":
        """The counters when the window has been slept on and evicted."""
        return Counters(self.seen, 0, retained, position, self.sleeps + 1, self.pads)


def mark_of(columns: torch.Tensor) -> int:
    """A number of 64 bits that tells sets of columns (integers, 1-D) apart; those of disjoint sets add up."""
    mixed = columns.long() + 1
    for factor in (-7046029254386353131, -4658895280553007687):  # splitmix64's
        mixed = mixed * factor
        mixed = mixed ^ (mixed >> 29)
    return int(mixed.sum()) % 2**64


@dataclass(frozen=True, eq=False)
class Memory:
    """A batch of sequences between two steps. A value.

    Args:
        counters: per row.
        carried: per slot of the running order, what that layer carries.
        window_start: per fast-weight slot, what a rewind to the current window's start needs.
        loop_output: `[B, T, C]`, what the looped layers made of the current window in pass 1: where a sleep starts.
        loop_input: `[B, T, C]`, what they made it of, where what happens between two passes asks for it.
        columns: columns of the calls that read it, pads included.
    """

    counters: tuple[Counters, ...] = ()
    carried: tuple[Carried, ...] = ()
    window_start: Mapping[int, FastWeights] = field(default_factory=dict)
    loop_output: torch.Tensor | None = None
    loop_input: torch.Tensor | None = None
    columns: int = 0

    @property
    def device(self) -> torch.device:
        """Where the looped layers left the current window."""
        return self.current_window()[0].device

    def current_window(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`loop_output` and `loop_input` up to the end of the longest row's window; pads after the shorter ones."""
        assert self.loop_output is not None  # a row with tokens in its window has read them
        width = max(row.fill for row in self.counters)
        entered = None if self.loop_input is None else self.loop_input[:, :width].to(self.loop_output.device)
        return self.loop_output[:, :width], entered

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Memory":
        """Apply `function` to every tensor."""
        return replace(
            self,
            carried=tuple(None if pair is None else type(pair)(*map(function, pair)) for pair in self.carried),
            window_start={slot: FastWeights(*map(function, pair)) for slot, pair in self.window_start.items()},
            loop_output=None if self.loop_output is None else function(self.loop_output),
            loop_input=None if self.loop_input is None else function(self.loop_input),
        )

    def select(self, rows: Sequence[int]) -> "Memory":
        """Pick rows, in the given order, repeats allowed; of all rows as they are it is `self`, without a copy."""
        if list(rows) == list(range(len(self.counters))):
            return self
        index = _on_device(rows)
        part = self.map(lambda t: t.index_select(0, index(t.device)))
        return replace(part, counters=tuple(self.counters[b] for b in rows))

    def merge(self, rows: Sequence[int], part: "Memory") -> "Memory":
        """This batch with its `rows`, each once, replaced by those of `part`."""
        batch = len(self.counters)
        if list(rows) == list(range(batch)):
            return part
        index = _on_device(rows)

        def place(old: torch.Tensor | None, new: torch.Tensor | None) -> torch.Tensor | None:
            if new is None:
                return old
            old = new.new_zeros(batch, *new.shape[1:]) if old is None else old
            old, new = _same_width(old, new)
            # Under autocast what a row begins with is float32, and what it has read is not. A GPU promotes neither.
            dtype = torch.promote_types(old.dtype, new.dtype)
            return old.to(dtype).index_copy(0, index(new.device), new.to(dtype))

        def pair(old: Any, new: Any) -> Any:
            if new is None:
                return old
            return type(new)(*(place(*tensors) for tensors in zip(old or (None, None), new, strict=True)))

        counters = list(self.counters)
        for b, row in zip(rows, part.counters, strict=True):
            counters[b] = row
        return Memory(
            tuple(counters),
            tuple(pair(old, new) for old, new in zip(self.carried, part.carried, strict=True)),
            {slot: pair(self.window_start[slot], new) for slot, new in part.window_start.items()},
            place(self.loop_output, part.loop_output),
            place(self.loop_input, part.loop_input),
            self.columns,
        )

    @staticmethod
    def cat(memories: Sequence["Memory"]) -> "Memory":
        """One batch of the rows of several, in order. None may be of sequences that have read nothing.

        Those of fewer columns count as padded on the left, so that all have as many.
        """
        counts, columns = [len(m.counters) for m in memories], max(m.columns for m in memories)
        counters: list[Counters] = []
        for memory in memories:
            more = columns - memory.columns
            pads = mark_of(torch.arange(more))
            counters += [replace(row, pads=pads if row.pads == 0 else None) if more else row for row in memory.counters]

        def joined(parts: Sequence[torch.Tensor | None]) -> torch.Tensor:
            like = next(t for t in parts if t is not None)
            whole = [like.new_zeros(n, *like.shape[1:]) if t is None else t for n, t in zip(counts, parts, strict=True)]
            return torch.cat(_same_width(*(t.to(like.device) for t in whole)))

        def pair(parts: Sequence[Any]) -> Any:
            like = next((part for part in parts if part is not None), None)
            if like is None:
                return None
            return type(like)(*map(joined, zip(*(part or (None,) * len(like) for part in parts), strict=True)))

        def window(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
            return None if all(t is None for t in parts) else joined(parts)

        return Memory(
            tuple(counters),
            tuple(map(pair, zip(*(m.carried for m in memories), strict=True))),
            {slot: pair([m.window_start[slot] for m in memories]) for slot in memories[0].window_start},
            window([m.loop_output for m in memories]),
            window([m.loop_input for m in memories]),
            columns,
        )

    def without_columns(self) -> "Memory":
        """The same, as if no call had read it: the next one's columns are the first, and no mask speaks of the past.

        So what a call costs does not grow with what was read.
        """
        return replace(self, counters=tuple(replace(row, pads=0) for row in self.counters), columns=0)

    def alone(self) -> "Memory":
        """A memory of one row, as if no other row had been there: without the columns in which it had no token."""
        (row,) = self.counters
        return replace(self, counters=(replace(row, pads=0),), columns=row.seen)

    def detach_rows(self, rows: Sequence[int]) -> "Memory":
        """This batch, through whose `rows` no gradient passes."""
        return self.merge(rows, self.select(rows).map(torch.Tensor.detach)) if rows else self

    def with_columns(self, start: Sequence[int], counts: Sequence[int], width: int) -> "Memory":
        """Note the columns of a call that has been read.

        Args:
            start: per row, the call's first column with a token.
            counts: per row, how many have one.
            width: columns of the call.
        """
        counters = list(self.counters)
        for b, (row, first, count) in enumerate(zip(counters, start, counts, strict=True)):
            if count < width and row.pads is not None:
                column = torch.arange(self.columns, self.columns + width)
                pads = torch.cat((column[:first], column[first + count :]))
                counters[b] = replace(row, pads=(row.pads + mark_of(pads)) % 2**64)
        return replace(self, counters=tuple(counters), columns=self.columns + width)

    def check_past(self, past: torch.Tensor | None) -> None:
        """Check that a mask over the columns read so far is the one that they were read with.

        Args:
            past: `[B, columns]`, 0 at pads; `None`: all are tokens.

        Raises:
            ValueError: it is not, which could only be ignored: what was read cannot be changed.
        """
        if not self.columns:  # `without_columns`
            return
        column = torch.arange(self.columns)
        said = torch.ones(len(self.counters), self.columns) if past is None else past.detach().cpu()
        for b, row in enumerate(self.counters):
            tokens, pads = int((said[b] != 0).sum()), column[said[b] == 0]
            if tokens == row.seen and (row.pads is None or mark_of(pads) == row.pads):
                continue
            differs = f"row {b} has {tokens} tokens in the past, and cache has read {row.seen}"
            if tokens == row.seen:
                differs = f"the pads in the past of row {b} stand at other columns than in what cache has read"
            raise ValueError(
                f"attention_mask says that {differs}. What was read cannot be changed: pass a mask that agrees over "
                "the past (generate reads no pads after a row's end: they are 0 in it), or read the whole conversation "
                "again with an empty SleepCache"
            )

    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        pairs = (*self.carried, *self.window_start.values(), (self.loop_output, self.loop_input))
        return sum(t.numel() * t.element_size() for pair in pairs if pair is not None for t in pair if t is not None)


def _on_device(rows: Sequence[int]) -> Callable[[torch.device], torch.Tensor]:
    """The rows as an index `[len(rows)]`, which goes to each device once."""
    return functools.cache(torch.tensor(rows, dtype=torch.long).to)


def _same_width(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Pad the shorter ones with zeros after their tokens (dimension -2), where rows hold different numbers of them."""
    width = max(t.shape[-2] for t in tensors)
    return [t if t.shape[-2] == width else torch.nn.functional.pad(t, (0, 0, 0, width - t.shape[-2])) for t in tensors]
