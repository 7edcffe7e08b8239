"""Loss by position in a long text: how much of what has left the window a memory gives back."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from ..cache import SleepCache
from ..info import most_passes
from ..memory import FastWeights, Memory
from ..modeling import SleepForCausalLM
from .answers import check_mode

FULL, WINDOW, ZEROED = "full context", "window alone", "memory zeroed"
RESAMPLES = 2000
FEWEST_ROWS = 5
"""Of which an interval is told."""


def asleep(passes: int) -> str:
    """Name of what the sleeping model reads with N passes."""
    return f"sleep, N = {passes}"


@dataclass(frozen=True, eq=False)
class PositionLosses:
    """Next-token losses of the same rows of text, read in several ways.

    Args:
        window_size: L, in tokens.
        losses: by the way of reading, `[R, T - 1]` in nats, float32: at t what the token after t costs.
    """

    window_size: int
    losses: dict[str, torch.Tensor]

    def by_window(self, reads: str) -> list[float]:
        """Mean loss in each window, in nats; a token counts in the window that is open when it is predicted."""
        return [part.mean().item() for part in self.losses[reads].split(self.window_size, dim=1)]

    def recovered(self, reads: str, beyond: str = WINDOW) -> tuple[float, float, float]:
        """Share of what a full context gains over the window alone that `reads` gains, from the second window on.

        Args:
            reads: a way of reading.
            beyond: what it gains over: `WINDOW`; or `ZEROED`, for what memory alone gives, without what the blocks have
                learnt of the text's kind.

        Returns:
            The share, and the ends of its 95 % interval over rows (bootstrap). Beyond the window alone 1 is as good as
            the full context, 0 as to forget, and below it is worse. NaN where a full context does not help; the ends
            too where it does not in a part of the draws, and of fewer than 5 rows.
        """
        names = (WINDOW, FULL, beyond, reads)
        window, full, without, mine = (self.losses[name][:, self.window_size :].sum(1) for name in names)
        gained, available = without - mine, window - full
        drawn = torch.randint(len(window), (RESAMPLES, len(window)), generator=torch.Generator().manual_seed(0))
        shares = _share(gained[drawn].sum(1), available[drawn].sum(1))
        low, high = torch.quantile(shares, torch.tensor([0.025, 0.975])).tolist()
        if len(window) < FEWEST_ROWS:
            low = high = math.nan
        return _share(gained.sum(), available.sum()).item(), low, high

    def to_dict(self) -> dict[str, Any]:
        """By the way of reading the loss of each window, the share recovered, and what memory alone gives of it.

        All are plain numbers, `None` for NaN.
        """
        ways: dict[str, Any] = {}
        for reads in self.losses:
            ways[reads] = {"loss_by_window": [_plain(round(loss, 4)) for loss in self.by_window(reads)]}
            if reads in (FULL, WINDOW):
                continue
            for name, beyond in (("recovered", WINDOW), ("by_memory", ZEROED)):
                share, *ends = map(_plain, self.recovered(reads, beyond))
                ways[reads] |= {name: share, f"{name}_95": ends}
        rows, tokens = self.losses[FULL].shape
        return {"window_size": self.window_size, "rows": rows, "tokens": tokens + 1, "reads": ways}


def _plain(value: float) -> float | None:
    """A number as JSON can have it."""
    return value if math.isfinite(value) else None


def _share(gained: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
    return torch.where(available > 0, gained / available, torch.nan)


def loss_by_position(
    model: SleepForCausalLM, ids: torch.Tensor, sleep_passes: Sequence[int] = (), batch_size: int = 1
) -> PositionLosses:
    """Read the same text in four ways.

    The sleeping model, at each N; the same with its memory zeroed after each sleep, at the last of them; the base with
    its full context; and the base with its window alone, which keeps the KV that the model's eviction keeps and no
    fast weights. The base is the model's own without what was injected: of one that was trained whole it has changed.

    Args:
        model: in eval mode.
        ids: `[R, T]`, rows of text of the same length, of more than a window.
        sleep_passes: each N; by default the config's.
        batch_size: rows that are read at once.

    Raises:
        ValueError: rows that a full context cannot read, or that are no longer than a window.
    """
    found = losses_asleep(model, ids, sleep_passes, batch_size) | losses_of_base(model, ids, batch_size)
    return PositionLosses(model.config.sleep.window_size, found)


def losses_asleep(
    model: SleepForCausalLM, ids: torch.Tensor, sleep_passes: Sequence[int] = (), batch_size: int = 1
) -> dict[str, torch.Tensor]:
    """The part of `loss_by_position` that changes as the blocks learn: at each N, and with the memory zeroed."""
    passes = tuple(sleep_passes) or (most_passes(model.config.sleep),)
    check_rows(model, ids)
    found = {asleep(n): _losses(model, ids, n, batch_size) for n in passes}
    return found | {ZEROED: _losses(model, ids, passes[-1], batch_size, forgets=True)}


def losses_of_base(model: SleepForCausalLM, ids: torch.Tensor, batch_size: int = 1) -> dict[str, torch.Tensor]:
    """The part of `loss_by_position` that a model's base alone makes: its window alone, and its full context.

    A base that was pre-trained with loops reads with all of them, and a window without what the eviction keeps.
    """
    check_rows(model, ids)
    if model.decoder.base_loops > 1:
        size = model.config.sleep.window_size
        return {WINDOW: _of_loops(model, ids, batch_size, size), FULL: _of_loops(model, ids, batch_size, ids.shape[1])}
    base = SleepForCausalLM.from_base(model.lm, model.config.sleep, model.config.probed).eval()
    window = _losses(base, ids, 1, batch_size, forgets=True)
    with base.sleeping(window_size=ids.shape[1]):
        return {WINDOW: window, FULL: _losses(base, ids, 1, batch_size, chunk=model.config.sleep.window_size)}


@torch.no_grad()
def _of_loops(model: SleepForCausalLM, ids: torch.Tensor, batch_size: int, size: int) -> torch.Tensor:
    """Losses `[R, T - 1]` of the base's own forward, which begins with nothing after every `size` tokens."""
    found = []
    for rows in ids.to(model.device).split(batch_size):
        logits = torch.cat([model.lm(input_ids=part, use_cache=False).logits for part in rows.split(size, dim=1)], 1)
        found.append(F.cross_entropy(logits[:, :-1].float().transpose(1, 2), rows[:, 1:], reduction="none").cpu())
    return torch.cat(found)


def check_rows(model: SleepForCausalLM, ids: torch.Tensor) -> None:
    """Check that rows are longer than a window, and no longer than a full context can be; and that nothing trains."""
    check_mode(model)
    size, most = model.config.sleep.window_size, getattr(model.config.text_config, "max_position_embeddings", None)
    if ids.dim() != 2 or ids.shape[1] <= size:
        raise ValueError(f"ids has shape {list(ids.shape)}: it must be [R, T] with T above window_size={size}")
    if most is not None and ids.shape[1] > most:
        raise ValueError(
            f"ids has rows of {ids.shape[1]} tokens, and the base reads {most} with a full context: give shorter rows"
        )


@torch.no_grad()
def _losses(
    model: SleepForCausalLM,
    ids: torch.Tensor,
    passes: int,
    batch_size: int,
    forgets: bool = False,
    chunk: int | None = None,
) -> torch.Tensor:
    """Losses `[R, T - 1]` of a text that is read `chunk` tokens at a time, by default a window."""
    return torch.cat([_of_batch(model, rows, passes, forgets, chunk) for rows in ids.split(batch_size)])


def _of_batch(
    model: SleepForCausalLM, ids: torch.Tensor, passes: int, forgets: bool, chunk: int | None
) -> torch.Tensor:
    cache, parts, size = SleepCache(), [], chunk or model.config.sleep.window_size
    ids = ids.to(model.device)
    for start in range(0, ids.shape[1] - 1, size):
        if forgets and start:
            model.sleep(cache, passes)
            cache.hold(model, without_fast_weights(cache.memory))
        targets = ids[:, start + 1 : start + size + 1]
        logits = model(ids[:, start : start + size], cache=cache, sleep_passes=passes).logits
        logits = logits[:, : targets.shape[1]].float()
        parts.append(F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").cpu())
    return torch.cat(parts, dim=1)


def without_fast_weights(memory: Memory) -> Memory:
    """The same memory with zeros for fast weights: what the KV that is held alone tells."""

    def zeroed(carried: Any) -> Any:
        return FastWeights(*map(torch.zeros_like, carried)) if isinstance(carried, FastWeights) else carried

    starts = {slot: zeroed(pair) for slot, pair in memory.window_start.items()}
    return replace(memory, carried=tuple(map(zeroed, memory.carried)), window_start=starts)
