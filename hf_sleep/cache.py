"""Cache of a sleeping model: what transformers asks of a cache, around what a sequence remembers."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache

from .memory import KV, FastWeights, Memory
from .placement import is_sharded


def unwrapped(model: Any) -> Any:
    """The model that a `PeftModel` wraps, whose layers carry the adapter; or `model` itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


class SleepCache(Cache):
    """Cache of a `SleepForCausalLM`: bounded KV, fast weights, and the current window.

    Make an empty one and pass it as `cache`, or take it from a model's output. It holds one batch. Every row has its
    own counters, so rows may be of different lengths and sleep at different steps.

    Source: Lee et al. 2026, Alg. 1 and §5.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._memory = Memory()
        self._owner: weakref.ref | None = None
        self._read_with: Any = None
        self._dtype: torch.dtype | None = None

    @property
    def memory(self) -> Memory:
        """What was read, as a value."""
        return self._memory

    @memory.setter
    def memory(self, memory: Memory) -> None:
        self._memory = memory

    @property
    def is_empty(self) -> bool:
        """Tell whether no call has used this cache yet."""
        return not self._memory.counters

    def hold(self, owner: Any, memory: Memory) -> None:
        """Take what `owner` has read."""
        self.memory, self._owner = memory, weakref.ref(owner)
        self._read_with, self._dtype = owner.config.sleep, owner.dtype

    def belongs_to(self, model: Any) -> bool:
        """Tell whether `model`, or what a `PeftModel` wraps, wrote this cache."""
        return self._owner is not None and self._owner() is unwrapped(model)

    def check_settings(self, model: Any) -> None:
        """Check that `model`, whose cache this is, still sleeps such that it can continue from here.

        Raises:
            ValueError: another dtype, looped layers or sinks than what was read, or a window that is full already.
        """
        if model.dtype != self._dtype and not is_sharded(model):  # which is in another while it is gathered
            raise ValueError(
                f"the cache was read by a model in {self._dtype}, which is in {model.dtype} now: move it back with "
                f"model.to({self._dtype}), or start with an empty SleepCache"
            )
        before, now = self._read_with, model.config.sleep
        if now is before:
            return
        for name in ("loop_layers", "num_sink_tokens"):
            if getattr(before, name) != getattr(now, name):
                raise ValueError(
                    f"the cache was read with {name}={getattr(before, name)!r}, the model has "
                    f"{name}={getattr(now, name)!r} now: set it to that, or start with an empty SleepCache"
                )
        size, fill = now.window_size, max((row.fill for row in self._memory.counters), default=0)
        if fill > size:
            raise ValueError(
                f"the cache holds a window of {fill} tokens, the model has window_size={size} now: set it to {fill} or "
                "more, or sleep on the window first"
            )

    def fork(self) -> "SleepCache":
        """A second cache with the same content; tensors are shared, since none is ever written in place."""
        twin = type(self)()
        twin.become(self)
        return twin

    def become(self, other: "SleepCache") -> None:
        """Hold what another cache holds, as a `fork` of it does."""
        self.memory, self._owner = other.memory, other._owner
        self._read_with, self._dtype = other._read_with, other._dtype

    @classmethod
    def cat(cls, caches: Sequence["SleepCache"]) -> "SleepCache":
        """One batch of the rows of several caches, in order: sequences that were read one by one.

        `cache.fork()` and `batch_select_indices([i])` take a row out again. Where the caches have read different
        numbers of columns, an `attention_mask` over the past has zeros on the left of the shorter ones.

        Raises:
            ValueError: no cache, an empty one, or caches of several models or settings.
        """
        if not caches or any(cache.is_empty for cache in caches):
            raise ValueError(
                f"cat takes caches that something was read into: {sum(c.is_empty for c in caches)} of the "
                f"{len(caches)} given are empty. Call the model with each first"
            )
        first = caches[0]
        made = [(cache._owner, cache._read_with, cache._dtype) for cache in caches]
        if any(each != made[0] for each in made):
            raise ValueError("the caches were written by several models, or with other settings: join those of one")
        joined = first.fork()
        joined.memory = Memory.cat([cache.memory for cache in caches])
        return joined

    def __reduce__(self) -> Any:
        raise TypeError(
            "a SleepCache belongs to a live model and cannot be pickled: "
            "use SleepState.from_cache(model, cache).save(path), or for an output without one pass use_cache=False"
        )

    def __copy__(self) -> "SleepCache":
        return self.fork()

    def __deepcopy__(self, memo: dict) -> "SleepCache":
        twin = self.fork()
        twin.memory = self.memory.map(lambda t: t.clone())
        return twin

    # For generate.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read so far, pads included: the logical length, which eviction does not change."""
        return self._memory.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: a stream may be endless."""
        return -1

    def select_rows(self, index: torch.Tensor) -> None:
        """Keep rows `index` (`[B']`, any order, repeats allowed; negative ones count from the end)."""
        if self.is_empty:
            return
        rows, chosen = self.batch_size, index.tolist()
        if wrong := [i for i in chosen if not -rows <= i < rows]:
            raise IndexError(f"row {wrong[0]} of a cache with {rows} rows: -{rows} to {rows - 1} work")
        self.memory = self.memory.select([i % rows for i in chosen])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Follow a beam search: row i becomes the old row `beam_idx[i]`."""
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep rows `indices`; of a mask `[B]`, those where it is true."""
        self.select_rows(indices.nonzero().flatten() if indices.dtype is torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self.select_rows(torch.arange(self.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: what a sleep wrote cannot be taken back."""
        raise NotImplementedError(
            "a SleepCache cannot be cropped: fast weights cannot be rewound. Keep `cache.fork()` from before and "
            "continue from it"
        )

    def reset(self) -> None:
        """Forget everything."""
        self.memory, self._owner = Memory(), None

    def activate_past_recording(self) -> None:
        """Refuse, as `crop` does."""
        self.crop(0)

    @property
    def batch_size(self) -> int:
        """Rows held."""
        return len(self._memory.counters)

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
        return len(self.memory.carried)

    def __repr__(self) -> str:
        held = f"columns={self._memory.columns}, max_kv_length={self.max_kv_length}"
        return f"{type(self).__name__}(rows={self.batch_size}, {held})"

    # What is held.

    @property
    def max_kv_length(self) -> int:
        """Tokens whose KV is held, in the row that holds most."""
        return max((row.kv_length for row in self._memory.counters), default=0)

    @property
    def fast_slots(self) -> frozenset[int]:
        """Layers that carry fast weights, by their place in the running order."""
        return frozenset(i for i, pair in enumerate(self.memory.carried) if isinstance(pair, FastWeights))

    def kv_bytes(self) -> int:
        """Bytes of keys and values."""
        return Memory(carried=tuple(pair for pair in self.memory.carried if isinstance(pair, KV))).num_bytes()

    def fast_weight_bytes(self) -> int:
        """Bytes of recurrent states and convolution tails."""
        return Memory(carried=tuple(pair for pair in self.memory.carried if isinstance(pair, FastWeights))).num_bytes()

    def num_bytes(self) -> int:
        """Bytes of everything held: KV, fast weights, and what the next sleep starts from."""
        return self.memory.num_bytes()
