"""Watching sleeps: what a caller's hooks are told, and when."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..memory import Counters


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


PassHook = Callable[[int, list[torch.Tensor]], None]
SleepHook = Callable[[SleepEvent], None]


@dataclass(frozen=True)
class Watchers:
    """The hooks of a call.

    Args:
        of_passes: called with the number of every pass over a window that sleeps, from 1, and the fast weights
            `[B, H, K, V]` that it leaves in each slot of the loop.
        of_sleeps: called after every sleep, once per row that slept.
    """

    of_passes: tuple[PassHook, ...] = ()
    of_sleeps: tuple[SleepHook, ...] = ()

    def clock(self, device: torch.device) -> float:
        """Seconds, when the device has done all it was asked; 0 where nobody asks for them."""
        if not self.of_sleeps:
            return 0.0
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    def tell_pass(self, number: int, written: list[torch.Tensor]) -> None:
        """Tell what pass `number` has written."""
        for hook in self.of_passes:
            hook(number, written)

    def tell_sleep(self, rows: Sequence[int], counters: Sequence[Counters], seconds: float, passes: int) -> None:
        """Tell that `rows` of a batch have slept."""
        for b in rows if self.of_sleeps else ():
            for hook in self.of_sleeps:
                hook(SleepEvent(b, counters[b].seen, seconds, passes))
