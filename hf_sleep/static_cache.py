"""A SleepCache whose decode step is one graph: what a sequence remembers has a fixed size, so it can lie in buffers."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .cache import SleepCache
from .engine import Buffers, can_step, has_room
from .memory import Memory

Step = Callable[[Buffers], tuple[torch.Tensor, list[torch.Tensor]]]
"""`Sleeper.read_token`, compiled or not."""


class StaticSleepCache(SleepCache):
    """A `SleepCache` for compiled decoding, as transformers' `StaticCache` is: `cache_implementation="static"`.

    While tokens come one by one within a window, the memory lies in tensors of a fixed size (the window, sinks and what
    a sliding eviction retains), after which a compiled step writes. Whoever asks for `memory` gets a value, and
    everything else, sleep above all, works on values, as in a `SleepCache`. Where nothing is compiled the buffers are
    never made, and it is one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: Buffers | None = None
        self._held: Memory | None = None  # what the buffers hold, as a value
        self._is_ahead = False  # whether they hold what `_memory` has no tensors of
        self._autocast = False  # whether it was read under autocast

    @classmethod
    def of(cls, cache: SleepCache) -> "StaticSleepCache":
        """One that continues from what another cache holds, of `SleepState.to_cache` for example."""
        twin = cls()
        twin.become(cache)
        return twin

    @property
    def memory(self) -> Memory:
        """What was read, as a value."""
        if self._is_ahead and self._buffers is not None:
            self._held = self._memory = self._buffers.memory(self._memory)
            self._is_ahead = False
        return self._memory

    @memory.setter
    def memory(self, memory: Memory) -> None:
        if memory is not self._held:
            self._held = None
        self._memory, self._is_ahead = memory, False

    def hold(self, owner: Any, memory: Memory) -> None:
        super().hold(owner, memory)
        self._autocast = torch.is_autocast_enabled(owner.device.type)

    def reset(self) -> None:
        super().reset()
        self._buffers = None

    @property
    def is_compileable(self) -> bool:
        return True

    @property
    def is_in_place(self) -> bool:
        """Whether the last token was read in place."""
        return self._is_ahead

    @property
    def shell(self) -> Memory:
        """What was read, up to date but for the tensors, which may be in the buffers."""
        return self._memory

    def __len__(self) -> int:
        return len(self._buffers.carried) if self._is_ahead and self._buffers is not None else super().__len__()

    def num_bytes(self) -> int:
        """Bytes of everything held; the buffers count whole."""
        return self._memory.num_bytes() + (0 if self._buffers is None else self._buffers.num_bytes())

    def can_step(self, sleeper: Any, counts: Sequence[int]) -> bool:
        """Whether a token of every row that has one (`counts`: 1 or 0) can be read in place: no row sleeps first."""
        device = sleeper.order.slots[0].device.type
        if torch.is_autocast_enabled(device) != self._autocast:  # it would come in another dtype
            return False
        if not has_room(self._memory.counters, sleeper.eviction, counts):
            return False
        return self._is_ahead or can_step(self._memory, sleeper.order)

    def read_token(self, owner: Any, sleeper: Any, step: Step, input_ids: torch.Tensor, counts: Sequence[int]) -> Any:
        """Read a token of every row in place, where `can_step`.

        Args:
            owner: the model whose cache this is.
            sleeper: its algorithm, as its settings are now.
            step: its `read_token`.
            input_ids: `[B, 1]`.
            counts: per row, 1, or 0 where the column is a pad.

        Returns:
            Logits `[B, 1, vocab]`.
        """
        buffers = self._loaded(sleeper)
        buffers.put(input_ids, counts)
        if not self._is_ahead:
            self._held = None  # what the step writes is not in the value
        logits, states = step(buffers)
        counters = tuple(row.after_reading(n) for row, n in zip(self._memory.counters, counts, strict=True))
        # The tensors are in the buffers now.
        shell = replace(self._memory, counters=counters, carried=(), loop_output=None, loop_input=None)
        shell = shell.with_columns([0] * len(counts), counts, 1)
        buffers.move_on(states)
        self._memory, self._held, self._is_ahead, self._read_with = shell, None, True, owner.config.sleep
        return logits

    def _loaded(self, sleeper: Any) -> Buffers:
        """The buffers, with what was read in them; new ones where they are of another size."""
        if self._is_ahead and self._buffers is not None and self._buffers.size == _size(sleeper):
            return self._buffers
        memory = self.memory
        if self._buffers is None or not self._buffers.fit(memory, sleeper.eviction):
            self._buffers, self._held = Buffers.like(memory, sleeper.eviction), None
        if self._held is not memory:
            self._buffers.load(memory)
        return self._buffers


def _size(sleeper: Any) -> tuple[int, int]:
    return sleeper.eviction.window_size, sleeper.eviction.most_retained
