"""Watching sleeps: what a caller's hooks are told, and when."""

import functools
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..memory import Memory


@dataclass(frozen=True)
class SleepEvent:
    """One sleep of one row.

    Args:
        row: of the batch that the call read; of a beam search, a beam.
        tokens: that the row has read so far, in this call and before it; pads do not count.
        seconds: that passes 2 to N and the eviction took. Rows that slept together share them.
        sleep_passes: N, the ordinary read included.
        batch: the memory of all rows when it had slept; it is held for as long as the hook runs.
        of: the cache that the call moves on, while there is one.
    """

    row: int
    tokens: int
    seconds: float
    sleep_passes: int
    batch: Callable[[], Memory | None] = field(default=lambda: None, repr=False, compare=False)
    of: Callable[[], Any] = field(default=lambda: None, repr=False, compare=False)

    def left(self) -> Memory:
        """The memory that the sleep left of the row, as if the row had been read alone; asked for in the hook.

        Raises:
            RuntimeError: later, when the call is on its way and nothing holds that memory any more.
        """
        memory = self.batch()
        if memory is None:
            raise RuntimeError("what a sleep left is there while its hook runs, and not later: take it in the hook")
        return memory.select([self.row]).alone()


@dataclass(frozen=True, eq=False)
class PassEvent:
    """One pass over a window of rows that sleep together; its tensors are part of the graph.

    Args:
        number: of the pass; the ordinary read is 1.
        written: the fast weights `[B, H, K, V]` that it left in each slot of the loop.
        z: `[B, T, C]`, what it made of the window in the loop.
        e: `[B, T, C]`, what pass 1 read there; `None` where what lies between two passes does not ask for it.
        counts: per row, how many of the T tokens are its own; after them come pads.
    """

    number: int
    written: list[torch.Tensor]
    z: torch.Tensor
    e: torch.Tensor | None
    counts: list[int]


PassHook = Callable[[PassEvent], None]
SleepHook = Callable[[SleepEvent], None]


def of_cache(cache: Any, hook: SleepHook) -> SleepHook:
    """The same hook, told of the sleeps of this thread's calls with `cache` alone.

    A model's hooks hear of every call: of other threads', and of those that are made within a call, as guidance in
    `generate` makes them, or another hook.
    """
    thread = threading.get_ident()

    @functools.wraps(hook)
    def told(event: SleepEvent) -> None:
        if threading.get_ident() == thread and event.of() is cache:
            hook(event)

    return told


@dataclass(frozen=True)
class Watchers:
    """The hooks of a call.

    Args:
        of_passes: called after every pass over a window that sleeps.
        of_sleeps: called after every sleep, once per row that slept.
        cache: that the call moves on, if any.
    """

    of_passes: tuple[PassHook, ...] = ()
    of_sleeps: tuple[SleepHook, ...] = ()
    cache: Any = None

    def clock(self, device: torch.device) -> float:
        """Seconds, when the device has done all it was asked; 0 where nobody asks for them."""
        if not self.of_sleeps:
            return 0.0
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    def tell_pass(self, event: PassEvent) -> None:
        """Tell what a pass has made."""
        for hook in self.of_passes:
            hook(event)

    def tell_sleep(self, rows: Sequence[int], memory: Memory, seconds: float, passes: int) -> None:
        """Tell that `rows` of a batch have slept."""
        of = SleepEvent.of if self.cache is None else weakref.ref(self.cache)
        for b in rows if self.of_sleeps else ():
            for hook in self.of_sleeps:
                hook(SleepEvent(b, memory.counters[b].seen, seconds, passes, weakref.ref(memory), of))
