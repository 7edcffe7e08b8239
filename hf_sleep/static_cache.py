"""A SleepCache whose decode step is one graph: what a sequence remembers has a fixed size, so it can lie in buffers."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .cache import SleepCache
from .engine import Buffers, can_step
from .memory import Memory

Step = Callable[[Buffers], torch.Tensor]
"""`Sleeper.read_token`, compiled or not: logits `[B, 1, vocab]` out."""


class StaticSleepCache(SleepCache):
    """A `SleepCache` for compiled decoding, as transformers' `StaticCache` is: `cache_implementation="static"`.

    While tokens come one by one within a window, the memory lies in tensors of a fixed size (the window, sinks and what
    a sliding eviction retains), which a compiled step writes in place. Whoever asks for `memory` gets a value, and
    everything else, sleep above all, works on values, as in a `SleepCache`. Where nothing is compiled the buffers are
    never made, and it is one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: Buffers | None = None
        self._held: Memory | None = None  # what the buffers hold, as a value
        self._is_ahead = False  # whether they hold what `_memory` has no tensors of

    @property
    def memory(self) -> Memory:
        """What was read, as a value."""
        if self._is_ahead and self._buffers is not None:
            self._held = self._memory = self._buffers.memory(self._memory)
            self._is_ahead = False
        return self._memory

    @memory.setter
    def memory(self, memory: Memory) -> None:
        self._memory, self._is_ahead = memory, False

    @property
    def is_compileable(self) -> bool:
        return True

    def num_bytes(self) -> int:
        """Bytes of everything held; the buffers count whole."""
        return super().num_bytes() if self._buffers is None else self._buffers.num_bytes() + self._memory.num_bytes()

    @property
    def shell(self) -> Memory:
        """What was read, up to date but for the tensors, which may be in the buffers."""
        return self._memory

    def can_step(self, sleeper: Any, counts: Sequence[int]) -> bool:
        """Whether a token of every row that has one (`counts`: 1 or 0) can be read in place: no row sleeps first."""
        if self._is_ahead:
            size = sleeper.eviction.window_size
            return all(row.fill + n <= size for row, n in zip(self._memory.counters, counts, strict=True))
        return can_step(self._memory, sleeper.order, sleeper.eviction.window_size, counts)

    def read_token(self, sleeper: Any, step: Step, input_ids: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Read a token of every row in place, where `can_step`.

        Args:
            sleeper: of the model whose cache this is.
            step: its `read_token`.
            input_ids: `[B, 1]`.
            counts: per row, 1, or 0 where the column is a pad.

        Returns:
            Logits `[B, 1, vocab]`.
        """
        if not self._is_ahead and (self._buffers is None or self._held is not self._memory):
            if self._buffers is None or not self._buffers.fit(self._memory, sleeper.eviction):
                self._buffers = Buffers.like(self._memory, sleeper.eviction)
            self._buffers.load(self._memory)
        buffers: Any = self._buffers
        buffers.put(input_ids, counts)
        try:
            logits = step(buffers)
        except BaseException:
            # What a token writes first stands where nothing is held yet: only where the next one goes has to be mended.
            buffers.place(self._memory)
            raise
        self._held, self._is_ahead = None, True
        counters = tuple(row.after_reading(n) for row, n in zip(self._memory.counters, counts, strict=True))
        # The tensors are in the buffers now.
        shell = replace(self._memory, counters=counters, carried=(), loop_output=None, loop_input=None)
        self._memory = shell.with_columns([0] * len(counts), counts, 1)
        return logits
