"""What a session tells of itself: a report, and how far a read has come."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers.utils import logging

from .held import Held, Source


@dataclass(frozen=True)
class Report:
    """What a session has read, and what it costs.

    Args:
        tokens: read, those of turns and of their template included.
        window_tokens: of them in the current window, not yet slept on.
        sleeps: so far.
        sleep_passes: N of each of them.
        seconds_awake: of reading and answering.
        seconds_asleep: of sleeping.
        kv_bytes: of keys and values held now.
        fast_weight_bytes: of recurrent states and convolution tails.
        num_bytes: of the whole memory, with what the next sleep starts from.
        sources: titles, token counts and digests of what was read.
    """

    tokens: int
    window_tokens: int
    sleeps: int
    sleep_passes: list[int]
    seconds_awake: float
    seconds_asleep: float
    kv_bytes: int
    fast_weight_bytes: int
    num_bytes: int
    sources: list[Source]


@dataclass(frozen=True)
class Progress:
    """How far a `read` has come.

    Args:
        tokens: read of this text.
        total: that it has; `None` where that is not known before its end.
        sleeps: of the session, so far.
        num_bytes: of its memory, now.
        seconds: since this read began.
    """

    tokens: int
    total: int | None
    sleeps: int
    num_bytes: int
    seconds: float


class Reading:
    """Tells how far a `read` has come."""

    def __init__(self, total: int | None, shows_bar: bool, told: Callable[[Progress], None] | None):
        self.tokens, self.total, self.told, self.digest = 0, total, told, hashlib.sha256()
        self.began = time.perf_counter()
        self.bar = logging.tqdm(total=total, unit=" tokens", disable=not shows_bar)

    def tell(self, ids: list[int], held: Held) -> None:
        """Tell that `ids` have been read."""
        self.tokens += len(ids)
        self.digest.update(b"".join(token.to_bytes(4, "little") for token in ids))
        sleeps, num_bytes = held.row.sleeps, held.memory.num_bytes()
        self.bar.set_postfix_str(f"{sleeps} sleeps, {num_bytes / 1e6:.1f} MB", refresh=False)
        self.bar.update(len(ids))
        if self.told is not None:
            self.told(Progress(self.tokens, self.total, sleeps, num_bytes, time.perf_counter() - self.began))

    def __enter__(self) -> "Reading":
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()
