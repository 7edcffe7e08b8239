"""Sleep in the background, when nothing was asked for a while."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .engine import PassPolicy, pass_policy


class Cancelled(Exception):
    """A sleep in the background that somebody interrupted; nothing of it is kept."""


class Cancellable(PassPolicy):
    """Another policy's passes, given up between two of them when `cancelled` is set."""

    at_least = 1

    def __init__(self, inner: PassPolicy, cancelled: threading.Event):
        self.inner, self.cancelled = inner, cancelled
        self.at_most = inner.at_most
        self.depends_on_data = inner.depends_on_data  # type: ignore[misc]

    def begin(self) -> "Cancellable":
        return Cancellable(self.inner.begin(), self.cancelled)

    def another(self, number: int, before: Sequence[torch.Tensor] | None, after: Sequence[torch.Tensor] | None) -> bool:
        if self.cancelled.is_set():
            raise Cancelled
        return self.inner.continues(self.inner, number, before, after)


class IdleSleep:
    """A timer that sleeps when it is not paused for so many seconds.

    Args:
        seconds: without a pause.
        sleep: `sleep(cancelled)` sleeps, and raises `Cancelled` when the event is set before it is over.
    """

    def __init__(self, seconds: float, sleep: Callable[[threading.Event], None]):
        self.seconds, self.sleep = seconds, sleep
        self._cancelled, self._timer = threading.Event(), threading.Timer(0, lambda: None)

    @staticmethod
    def policy(model: Any, passes: int | PassPolicy | None, cancelled: threading.Event) -> PassPolicy:
        """A session's policy, that ends when `cancelled` is set."""
        return Cancellable(pass_policy(model.config.sleep.sleep_passes if passes is None else passes), cancelled)

    def pause(self) -> None:
        """End a sleep that is on its way, and begin none."""
        self._timer.cancel()
        self._cancelled.set()
        if self._timer.is_alive() and self._timer is not threading.current_thread():
            self._timer.join()

    def resume(self) -> None:
        """Wait for the seconds, from now."""
        self._cancelled.clear()
        self._timer = threading.Timer(self.seconds, self._run)
        self._timer.daemon = True
        self._timer.start()

    def _run(self) -> None:
        try:
            self.sleep(self._cancelled)
        except Cancelled:
            return
