"""Labels, and the one next-token shift."""

import torch
import torch.nn.functional as F

IGNORED = -100
"""The label of a token that nothing is to predict."""


def next_labels(labels: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
    """Shift labels, so that each column has that of the next one.

    Args:
        labels: `[B, T]`.
        real: `[B, T]`, whether a column holds a token and not a pad; `None`: all do.

    Returns:
        `[B, T]`, `IGNORED` in the last column, at pads, and where the next column is a pad.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if real is None:
        return targets
    return targets.masked_fill(~(real & F.pad(real[:, 1:], (0, 1))), IGNORED)
