"""A curriculum over the number of windows: rows are cut to a few windows at first, and to more later."""

import random
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from ..checks import require_int
from ..labels import IGNORED
from .collator import without_unpredicted
from .schedules import DuringStep

KEPT = ("first", "last")

Batch = Mapping[str, Any]


class WindowsCurriculum(DuringStep):
    """Trains on a growing number of windows: `SleepTrainer` cuts the rows of each step to so many. Evaluation is uncut.

    The number of a step is a function of (arguments, step): the same on every rank, and after resuming. Windows are
    those that the whole row has, of the config's L real tokens, or shorter where its `sleep_after` says so. A row that
    has no more of them stays as it is. The last window of a row does not sleep: one that is cut to a single window
    trains no memory.

    Args:
        stages: by the optimizer step from which it holds, the number of windows, rising; or pairs of the two.
        keep: which windows of a row, `"first"` (text, which has labels everywhere) or `"last"` (labels at the end); or
            a function of (batch, windows) that returns the batch to train on, for rows that must be laid out again.
        seed: draw the number again for every optimizer step, from the first stage's to the current one's, all equally
            likely.

    Raises:
        ValueError: arguments that do not fit together; in training, a row whose labels would all be cut away, or a
            Trainer that does not cut.

    Source: ours; over more windows in each stage, as in ARMT (Rodkin et al. 2024, arXiv 2407.04841).
    """

    def __init__(
        self,
        stages: Mapping[int, int] | Iterable[tuple[int, int]],
        keep: str | Callable[[Batch, int], Batch] = "first",
        seed: int | None = None,
    ):
        given = dict(stages)
        for step, windows in given.items():
            require_int("WindowsCurriculum: the step of a stage", step, 0)
            require_int("WindowsCurriculum: the windows of a stage", windows, 1)
        pairs = sorted(given.items())
        numbers = [windows for _, windows in pairs]
        if not pairs or pairs[0][0] != 0 or numbers != sorted(numbers):
            raise ValueError(
                f"WindowsCurriculum: stages={dict(pairs)}: "
                "the first must begin at step 0, and the number of windows may only rise, as in {0: 1, 500: 2, 900: 4}"
            )
        if keep not in KEPT and not callable(keep):
            raise ValueError(
                f"WindowsCurriculum: keep={keep!r}: it must be one of {KEPT} or a function of (batch, windows)"
            )
        self.stages, self.keep, self.seed = pairs, keep, seed
        self._cut_for: int | None = None

    def windows(self, step: int) -> int:
        """The number of windows of the optimizer step that comes after `step` others."""
        most = [windows for first, windows in self.stages if first <= step][-1]
        if self.seed is None:
            return most
        # A string seeds through SHA-512, so that neighbouring steps are unrelated.
        return random.Random(f"{self.seed}/{step}").randint(self.stages[0][1], most)

    def cut(self, batch: Batch, window_size: int, step: int) -> dict[str, Any]:
        """A batch of the optimizer step that comes after `step` others, cut.

        Args:
            batch: `[B, T]` tensors, by name.
            window_size: L, in tokens.
            step: optimizer steps that are over.
        """
        self._cut_for = step
        if isinstance(self.keep, str):
            return cut_rows(batch, window_size, self.windows(step), self.keep)
        return dict(self.keep(batch, self.windows(step)))

    def change(self, state: Any, model: Any) -> AbstractContextManager:
        if self._cut_for != state.global_step:
            raise ValueError(
                "WindowsCurriculum: the rows of this step are as long as ever. "
                "Only a SleepTrainer cuts them: use it instead of this Trainer, or leave the callback out"
            )
        self._cut_for = None
        return nullcontext()

    def state(self) -> dict[str, Any]:
        recorded = super().state()
        if callable(self.keep):
            name = getattr(self.keep, "__qualname__", type(self.keep).__qualname__)
            recorded["args"]["keep"] = f"{self.keep.__module__}.{name}"
        return recorded


def window_numbers(real: torch.Tensor, sleep_after: torch.Tensor | None, window_size: int) -> torch.Tensor:
    """The window of its row that each token is read in, `[B, T]`, counted from 0; anything at pads.

    Args:
        real: `[B, T]`, whether a column holds a token.
        sleep_after: `[B, T]`, not 0 at tokens after which the row sleeps, whatever its window holds.
        window_size: L, in tokens.
    """
    place = real.cumsum(1) - 1
    since = torch.zeros_like(place)
    if sleep_after is not None:
        next_place = torch.where(real & (sleep_after != 0), place + 1, 0)
        since = F.pad(next_place.cummax(1).values[:, :-1], (1, 0))
    begins = real & ((place - since) % window_size == 0)
    return begins.cumsum(1) - 1


def cut_rows(batch: Batch, window_size: int, windows: int, keep: str) -> dict[str, Any]:
    """Cut every row of a batch to its first or last windows; whatever is `[B, T, ...]` is cut alike.

    Args:
        batch: with `input_ids` or `inputs_embeds`; `attention_mask`, `labels` and `sleep_after` are used if present.
        window_size: L, in tokens.
        windows: how many to keep.
        keep: `"first"` or `"last"`.

    Returns:
        The batch itself where no row has more windows, or one in which what is cut away became pads, and columns at
        the ends that held nothing else are gone.

    Raises:
        ValueError: a row whose labels would all be cut away.
    """
    ids = batch["input_ids"] if batch.get("input_ids") is not None else batch["inputs_embeds"]
    shape, mask = ids.shape[:2], batch.get("attention_mask")
    mask = ids.new_ones(shape, dtype=torch.long) if mask is None else mask
    real = mask != 0
    number = window_numbers(real, batch.get("sleep_after"), window_size)
    last = number.amax(1, keepdim=True)
    kept = real & (number < windows if keep == "first" else number > last - windows)
    if torch.equal(kept, real):
        return dict(batch)
    columns = kept.any(0).nonzero().flatten()
    span = slice(int(columns[0]), int(columns[-1]) + 1)
    cut = {**without_unpredicted({**batch, "attention_mask": mask}), "attention_mask": mask.masked_fill(~kept, 0)}
    if batch.get("sleep_after") is not None:
        # Nobody wants a sleep after the last token that is left, either.
        asleep = kept if keep == "last" else kept & ((number < windows - 1) | (last < windows))
        cut["sleep_after"] = batch["sleep_after"].masked_fill(~asleep, 0)
    before = cut.get("labels")
    cut = {name: v[:, span] if torch.is_tensor(v) and v.shape[:2] == shape else v for name, v in cut.items()}
    cut = without_unpredicted(cut)
    if before is not None:
        lost = (before != IGNORED).any(1) & ~(cut["labels"] != IGNORED).any(1)
        if bool(lost.any()):
            row = int(lost.nonzero()[0])
            labels, of = int((before[row] != IGNORED).sum()), int(last[row]) + 1
            other = "last" if keep == "first" else "first"
            raise ValueError(
                f"WindowsCurriculum: row {row} of a batch has {of} windows (L={window_size}) and {labels} labels, and "
                f"the {keep} {windows} of its windows predict none of them. "
                f"Use keep={other!r}, more windows, or a function of your own as keep"
            )
    return cut
