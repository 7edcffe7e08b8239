"""What a sequence carries from call to call: the window's KV, the fast weights, and what the next sleep needs."""

import dataclasses
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache

Pair = tuple[torch.Tensor, torch.Tensor]
"""The two tensors a layer carries, batch first: `(keys, values)` `[B, H, T, D]`, or a fast-weight layer's
`(recurrent_state, conv_state)`."""


@dataclass
class Row:
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


def mark_of(columns: torch.Tensor) -> int:
    """A number of 64 bits that tells sets of columns (integers, 1-D) apart; those of disjoint sets add up."""
    mixed = columns.long() + 1
    for factor in (-7046029254386353131, -4658895280553007687):  # splitmix64's
        mixed = mixed * factor
        mixed = mixed ^ (mixed >> 29)
    return int(mixed.sum()) % 2**64


@dataclass
class Tensors:
    """The tensors of a batch of sequences, rows left-aligned. Values, never written in place.

    Args:
        layers: per slot of the model's programme, what that layer carries; `None` where nothing was read yet.
        window_start: per fast-weight slot, its state when the current window began.
        hidden: `[B, T, C]`, what the looped layers made of the current window in pass 1: where the next sleep starts.
    """

    layers: list[Pair | None] = field(default_factory=list)
    window_start: dict[int, Pair] = field(default_factory=dict)
    hidden: torch.Tensor | None = None

    def map(self, function: Any) -> "Tensors":
        """Apply `function` to every tensor."""

        def pair(p: Pair | None) -> Pair | None:
            return None if p is None else (function(p[0]), function(p[1]))

        return Tensors(
            [pair(p) for p in self.layers],
            {slot: (function(p[0]), function(p[1])) for slot, p in self.window_start.items()},
            None if self.hidden is None else function(self.hidden),
        )

    def select(self, rows: torch.Tensor) -> "Tensors":
        """The given rows, in the given order."""
        return self.map(lambda t: t.index_select(0, rows.to(t.device)))

    def merge(self, rows: torch.Tensor, part: "Tensors", batch_size: int) -> "Tensors":
        """This batch with `rows` replaced by `part`."""

        def place(old: torch.Tensor | None, new: torch.Tensor | None) -> torch.Tensor | None:
            if new is None:
                return old
            if old is None:
                old = new.new_zeros(batch_size, *new.shape[1:])
            old, new = _same_width(old, new)
            return old.index_copy(0, rows.to(new.device), new)

        def pair(old: Pair | None, new: Pair | None) -> Any:
            if new is None:
                return old
            old_first, old_second = old or (None, None)
            return place(old_first, new[0]), place(old_second, new[1])

        return Tensors(
            [pair(old, new) for old, new in zip(self.layers, part.layers, strict=True)],
            {slot: pair(self.window_start[slot], new) for slot, new in part.window_start.items()},
            place(self.hidden, part.hidden),
        )

    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        total = 0

        def count(t: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += t.numel() * t.element_size()
            return t

        self.map(count)
        return total


def _same_width(a: torch.Tensor, b: torch.Tensor) -> Pair:
    """Pad the shorter one with zeros behind its tokens (dimension -2), where rows hold different numbers of them."""
    width = max(a.shape[-2], b.shape[-2])
    if a.shape[-2] == b.shape[-2]:
        return a, b

    def pad(t: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(t, (0, 0, 0, width - t.shape[-2]))

    return pad(a), pad(b)


class SleepCache(Cache):
    """Cache of a `SleepForCausalLM`: bounded KV, fast weights, and the current window.

    Make an empty one and pass it as `cache`, or take it from a model's output. It holds one batch; every
    row has its own counters, so rows may be of different lengths and sleep at different steps.

    Source: Lee et al. 2026, Alg. 1 and §5.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.rows: list[Row] = []
        self.tensors = Tensors()
        self.columns = 0
        self.fast_slots: frozenset[int] = frozenset()
        self._owner: weakref.ref | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no call has used this cache yet."""
        return not self.rows

    def start(self, owner: Any, batch_size: int, tensors: Tensors, fast_slots: frozenset[int]) -> None:
        """Make an empty cache the cache of a batch of `owner`, whose `fast_slots` carry fast weights."""
        self.rows = [Row() for _ in range(batch_size)]
        self.tensors = tensors
        self.fast_slots = fast_slots
        self._owner = weakref.ref(owner)

    def count_columns(self, start: list[int], counts: list[int], width: int) -> None:
        """Note that a call has been read.

        Args:
            start: per row, the call's first column with a token.
            counts: per row, how many have one.
            width: columns of the call.
        """
        column = torch.arange(self.columns, self.columns + width)
        for row, first, count in zip(self.rows, start, counts, strict=True):
            if count < width and row.pads is not None:
                pads = torch.cat((column[:first], column[first + count :]))
                row.pads = (row.pads + mark_of(pads)) % 2**64
        self.columns += width

    def check_past(self, past: torch.Tensor | None) -> None:
        """Whether a mask over the columns read so far is the one that they were read with.

        Args:
            past: `[B, columns]`, 0 at pads; `None`: all are tokens.

        Raises:
            ValueError: it is not, which could only be ignored: what was read cannot be changed.
        """
        column = torch.arange(self.columns)
        said = torch.ones(len(self.rows), self.columns) if past is None else past.detach().cpu()
        for b, row in enumerate(self.rows):
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

    def belongs_to(self, model: Any) -> bool:
        """Whether `model` wrote this cache."""
        return self._owner is not None and self._owner() is model

    def fork(self) -> "SleepCache":
        """A second cache with the same content; tensors are shared, since none is ever written in place."""
        twin = SleepCache()
        twin.assign(self)
        return twin

    def assign(self, other: "SleepCache") -> None:
        """Take over the content of `other`."""
        self.rows = [dataclasses.replace(row) for row in other.rows]
        self.tensors, self.columns = other.tensors, other.columns
        self.fast_slots, self._owner = other.fast_slots, other._owner

    def __reduce__(self) -> Any:
        raise TypeError(
            "a SleepCache belongs to a live model and cannot be pickled: "
            "use SleepState.from_cache(model, cache).save(path), or for an output without one pass use_cache=False"
        )

    def __copy__(self) -> "SleepCache":
        return self.fork()

    def __deepcopy__(self, memo: dict) -> "SleepCache":
        twin = self.fork()
        twin.tensors = self.tensors.map(lambda t: t.clone())
        return twin

    # What generate asks of a Cache.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read so far, pads included: the logical length, which eviction does not change."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: a stream may be endless."""
        return -1

    def select_rows(self, index: torch.Tensor) -> None:
        """Keep rows `index` (`[B']`, any order, repeats allowed)."""
        if self.is_empty:
            return
        self.rows = [dataclasses.replace(self.rows[i]) for i in index.tolist()]
        self.tensors = self.tensors.select(index)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Follow a beam search: row i becomes the old row `beam_idx[i]`."""
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep rows `indices`."""
        self.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self.select_rows(torch.arange(len(self.rows)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what a sleep wrote cannot be taken back."""
        raise NotImplementedError(
            "a SleepCache cannot be cropped: fast weights cannot be rewound. Keep `cache.fork()` from before "
            "and go on from it"
        )

    def reset(self) -> None:
        """Forget everything."""
        self.assign(SleepCache())

    def activate_past_recording(self) -> None:
        """Refused, as `crop` is."""
        self.crop(0)

    @property
    def batch_size(self) -> int:
        """Rows held."""
        return len(self.rows)

    @property
    def is_initialized(self) -> bool:
        return not self.is_empty

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_linear(self) -> list[bool]:
        # Asked by generate before it leaves out what the cache has read; of no layers, all would be linear.
        return [False]

    def __len__(self) -> int:
        return len(self.tensors.layers)

    def __repr__(self) -> str:
        return f"SleepCache(rows={len(self.rows)}, columns={self.columns}, max_kv_length={self.max_kv_length})"

    # What is held.

    @property
    def max_kv_length(self) -> int:
        """KV of how many tokens is held, of the row that holds most."""
        return max((row.kv_length for row in self.rows), default=0)

    def kv_bytes(self) -> int:
        """Bytes of keys and values."""
        return Tensors([p for i, p in enumerate(self.tensors.layers) if i not in self.fast_slots]).num_bytes()

    def fast_weight_bytes(self) -> int:
        """Bytes of recurrent states and convolution tails."""
        return Tensors([p for i, p in enumerate(self.tensors.layers) if i in self.fast_slots]).num_bytes()

    def num_bytes(self) -> int:
        """Bytes of everything held: KV, fast weights, and what the next sleep starts from."""
        return self.tensors.num_bytes()
