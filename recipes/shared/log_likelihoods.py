"""Log-likelihoods of continuations, after contexts of any length, in batches."""

from collections.abc import Sequence
from typing import Any

import torch

Pair = tuple[Sequence[int], Sequence[int]]


@torch.no_grad()
def log_likelihoods(model: Any, pairs: Sequence[Pair], batch_size: int) -> list[tuple[float, bool]]:
    """Score continuations.

    Args:
        model: a `SleepForCausalLM`. It reads windows, so no context is cut.
        pairs: ids of a context, at least one, and of what follows it, at least one.
        batch_size: pairs that are read together; it changes nothing but the time.

    Returns:
        Per pair, in order: the sum of the continuation's log-probabilities, and whether each token was the likeliest.
    """
    longest_first = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    scores: dict[int, tuple[float, bool]] = {}
    for first in range(0, len(pairs), batch_size):
        batch = longest_first[first : first + batch_size]
        scores |= dict(zip(batch, _of_batch(model, [pairs[i] for i in batch]), strict=True))
    return [scores[i] for i in range(len(pairs))]


def _of_batch(model: Any, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
    rows = [[*context, *continuation][:-1] for context, continuation in pairs]
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long, device=model.device)
    mask = torch.zeros_like(ids)
    for r, row in enumerate(rows):
        ids[r, width - len(row) :], mask[r, width - len(row) :] = torch.tensor(row), 1
    # Padded on the left, all continuations end in the last column: no other logits are made.
    longest = max(len(continuation) for _, continuation in pairs)
    logits = model(ids, attention_mask=mask, logits_to_keep=longest, use_cache=False).logits
    scores = []
    for row, (_, continuation) in zip(logits, pairs, strict=True):
        said = row[-len(continuation) :].double().log_softmax(-1)
        targets = torch.tensor(continuation, device=said.device)
        total = said.gather(-1, targets.unsqueeze(-1)).sum().item()
        scores.append((total, bool((said.argmax(-1) == targets).all())))
    return scores
