"""What it costs to read a text and to decode after it. Needs torch alone, so that any environment can load it."""

import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WARM_UP = 16
"""Tokens that are read before the clock runs."""


class Reader(Protocol):
    """A model with what it has read; it begins with nothing.

    Args:
        sleeps: seconds of each sleep so far.
    """

    sleeps: list[float]

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Read further tokens `[1, T]`; the last one's logits `[1, 1, vocab]`."""

    def num_bytes(self) -> int:
        """Bytes of all that it holds of what it has read."""


@dataclass(frozen=True)
class Measured:
    """What one reader took.

    Args:
        read_tokens_per_second: sleeps included.
        first_token_seconds: from the text to the first token after it.
        seconds_per_sleep: mean, of those while it read; `None` where there was none.
        decode_ms_per_token: median, after all was read. A sleep is rarer than every second token, so it is not in it.
        bytes_held: by the cache, after all was read. Of a model that sleeps it is most where a window is full.
        peak_bytes: of the tensors that were alive at once while it read, the cache among them, the weights not.
    """

    read_tokens_per_second: float
    first_token_seconds: float
    seconds_per_sleep: float | None
    decode_ms_per_token: float
    bytes_held: int
    peak_bytes: int


class TensorBytes(TorchDispatchMode):
    """Counts the bytes of tensors made within it that are alive; `peak` is the most there were at once.

    It sees what operators return, and not what they use inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.sizes: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, torch.Tensor):
                self.sizes.setdefault(given.untyped_storage(), 0)  # made elsewhere, and a view of it is not new
        out = function(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor) and (storage := made.untyped_storage()) not in self.sizes:
                self.sizes[storage] = size = storage.nbytes()
                self.alive += size
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._forget, size)
        return out

    def _forget(self, size: int) -> None:
        self.alive -= size


def measure(
    readers: Mapping[str, Callable[[], Reader]],
    ids: torch.Tensor,
    decode: int,
    turns: int = 1,
    counted_apart: bool = True,
) -> dict[str, Measured]:
    """Measure readers on one text: in every turn each reads it, then all decode in turns, token by token.

    Args:
        readers: by name, what makes an empty one.
        ids: `[1, T]`.
        decode: tokens to decode after them.
        turns: readings of which the median counts.
        counted_apart: whether `peak_bytes` are those of a reading of their own. Otherwise they are counted in the last
            timed one, which is slower for it: by some µs per operator.
    """
    with torch.inference_mode():
        for make in readers.values():  # what is done once a process
            _timed(warm := make(), _timed(warm, ids[:, :WARM_UP])[0])
        peaks = {name: _peak(make(), ids) for name, make in readers.items()} if counted_apart else {}
        took: dict[str, list[float]] = {name: [] for name in readers}
        for turn in range(turns):
            held: dict[str, tuple[Reader, torch.Tensor]] = {}  # nothing of the turn before is held
            for name, make in readers.items():
                reader = make()
                if turn == turns - 1 and not counted_apart:
                    with TensorBytes() as counted:
                        token, seconds = _timed(reader, ids)
                    peaks[name] = counted.peak
                else:
                    token, seconds = _timed(reader, ids)
                took[name].append(seconds)
                held[name] = reader, token
        slept = {name: list(reader.sleeps) for name, (reader, _) in held.items()}
        num_bytes = {name: reader.num_bytes() for name, (reader, _) in held.items()}
        steps = _decode(held, decode)
    return {
        name: Measured(
            ids.shape[1] / (seconds := statistics.median(took[name])),
            seconds,
            statistics.mean(slept[name]) if slept[name] else None,
            1000 * statistics.median(steps[name]),
            num_bytes[name],
            peaks[name],
        )
        for name in readers
    }


def _decode(held: dict[str, tuple[Reader, torch.Tensor]], tokens: int) -> dict[str, list[float]]:
    """Seconds of every step."""
    steps: dict[str, list[float]] = {name: [] for name in held}
    last = {name: token for name, (_, token) in held.items()}
    for _ in range(tokens):
        for name, (reader, _) in held.items():
            last[name], seconds = _timed(reader, last[name])
            steps[name].append(seconds)
    return steps


def _peak(reader: Reader, ids: torch.Tensor) -> int:
    with TensorBytes() as counted:
        reader(ids)
    return counted.peak


def _timed(reader: Reader, new: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Read `new`: the likeliest next token, and seconds."""
    began = _now(new)
    token = reader(new)[:, -1:].argmax(-1)
    return token, _now(new) - began


def _now(ids: torch.Tensor) -> float:
    """Seconds, when the device of `ids` has done all it was given."""
    if ids.device.type == "cuda":
        torch.cuda.synchronize(ids.device)
    return time.perf_counter()
