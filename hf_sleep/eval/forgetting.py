"""Forgetting: how much of a text is left in a memory after others were read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..cache import SleepCache
from ..checks import require_int
from ..modeling import SleepForCausalLM
from .answers import check_mode
from .position import FEWEST_ROWS, RESAMPLES, without_fast_weights

TOLD = 4
"""Windows of a text that are read before others are, and then the next one of it."""


@dataclass(frozen=True, eq=False)
class Forgetting:
    """Next-token losses in the next window of a text, of which some windows were read before others were.

    Args:
        between: windows of other text that were read in between, ascending.
        losses: `[R, K, L - 1]` in nats, float32, of R texts at each of K `between`.
        zeroed: the same with the fast weights set to zero before the next window: what the KV that is kept tells.
        others: the same of a memory that has read the others alone, and never the text.
    """

    between: tuple[int, ...]
    losses: torch.Tensor
    zeroed: torch.Tensor
    others: torch.Tensor

    def left(self) -> list[tuple[float, float, float]]:
        """By `between`: what having read the text takes off the loss, in nats, and its 95 % interval (bootstrap).

        That is what is left of it: the others are in both. The ends are NaN of fewer than 5 texts.
        """
        return self._mean(self.others - self.losses)

    def gained(self) -> list[tuple[float, float, float]]:
        """The same of what the whole memory takes off, the others' part and the harm that they do included."""
        return self._mean(self.zeroed - self.losses)

    @staticmethod
    def _mean(taken_off: torch.Tensor) -> list[tuple[float, float, float]]:
        by_text = taken_off.mean(-1)
        if len(by_text) < FEWEST_ROWS:
            return [(gained, math.nan, math.nan) for gained in by_text.mean(0).tolist()]
        drawn = torch.randint(len(by_text), (RESAMPLES, len(by_text)), generator=torch.Generator().manual_seed(0))
        ends = by_text[drawn].mean(1).quantile(by_text.new_tensor([0.025, 0.975]), dim=0)
        return list(zip(by_text.mean(0).tolist(), *ends.tolist(), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        left, gained = (
            [[None if math.isnan(number) else round(number, 5) for number in each] for each in of]
            for of in (self.left(), self.gained())
        )
        return {
            "texts": len(self.losses),
            "told_windows": TOLD,
            "between": list(self.between),
            "loss": self.losses.mean((0, 2)).tolist(),
            "loss_zeroed": self.zeroed.mean((0, 2)).tolist(),
            "loss_others": self.others.mean((0, 2)).tolist(),
            "left_95": left,
            "gained_95": gained,
        }


def forgetting(
    model: SleepForCausalLM,
    tokens: torch.Tensor,
    between: Sequence[int],
    texts: int,
    sleep_passes: int,
    batch_size: int = 1,
    start: Sequence[int] = (),
) -> Forgetting:
    """Read four windows of a text, then windows of others, and measure the loss in the text's next window.

    Against it stand the same with the memory zeroed, and a memory that has read the others alone.

    Args:
        model: in eval mode.
        tokens: `[n]`, of a long text. The places in it that count as texts are spread evenly and do not overlap; the
            others of each begin half of `tokens` away.
        between: windows of others, each number of which is measured; 0 always is.
        texts: the most of them; no more than there is room for.
        sleep_passes: N.
        batch_size: of them are read at once.
        start: tokens that each of them begins with, as the tokenizer has it.

    Raises:
        ValueError: tokens that are too few; a number of windows below 0, or of texts or rows below 1.
    """
    check_mode(model)
    require_int("texts", texts, 1)
    require_int("batch_size", batch_size, 1)
    for windows in between:
        require_int("between", windows, 0)
    size, between = model.config.sleep.window_size, tuple(sorted({0, *between}))
    length, needed = (TOLD + 1) * size, 2 * (between[-1] + TOLD + 1) * size
    if len(tokens) < needed:
        raise ValueError(
            f"the text has {len(tokens)} tokens, and forgetting over {between[-1]} windows of {size} takes {needed}: "
            "give more text, or fewer windows"
        )
    texts = min(texts, len(tokens) // length)
    circle = torch.cat((tokens, tokens))
    starts = [i * (len(tokens) // texts) for i in range(texts)]
    begin = tokens.new_tensor(start)
    told = torch.stack([torch.cat((begin, circle[i:][: length - len(begin)])) for i in starts])
    far = [(i + len(tokens) // 2) % len(tokens) for i in starts]
    others = torch.stack([circle[i:][: between[-1] * size] for i in far])
    found = [
        _of_batch(model, mine.to(model.device), theirs.to(model.device), begin, between, sleep_passes)
        for mine, theirs in zip(told.split(batch_size), others.split(batch_size), strict=True)
    ]
    return Forgetting(between, *(torch.cat(parts) for parts in zip(*found, strict=True)))


@torch.no_grad()
def _of_batch(
    model: SleepForCausalLM,
    told: torch.Tensor,
    others: torch.Tensor,
    begin: torch.Tensor,
    between: Sequence[int],
    passes: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    size, cache, alone, read = model.config.sleep.window_size, SleepCache(), SleepCache(), 0
    losses, zeroed, of_others = [], [], []
    asked = told[:, -size:]

    def loss(fork: SleepCache) -> torch.Tensor:
        logits = model(asked[:, :-1], cache=fork, sleep_passes=passes).logits.float()
        return F.cross_entropy(logits.transpose(1, 2), asked[:, 1:], reduction="none").cpu()

    if len(begin):  # as the text begins: it may be a sink
        model(begin.to(told).expand(len(told), -1), cache=alone, logits_to_keep=1)
        model.sleep(alone, passes)
    model(told[:, :-size], cache=cache, sleep_passes=passes, logits_to_keep=1)
    model.sleep(cache, passes)
    for windows in between:
        if windows > read:
            for each in (cache, alone):
                model(others[:, read * size : windows * size], cache=each, sleep_passes=passes, logits_to_keep=1)
                model.sleep(each, passes)
            read = windows
        losses.append(loss(cache.fork()))
        of_others.append(loss(alone.fork()))
        nothing = cache.fork()
        nothing.hold(model, without_fast_weights(cache.memory))
        zeroed.append(loss(nothing))
    return torch.stack(losses, 1), torch.stack(zeroed, 1), torch.stack(of_others, 1)
