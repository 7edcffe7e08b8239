"""Refusal of rows into which several samples are packed: memory would run from one into the next."""

from collections.abc import Mapping
from typing import Any

import torch

MARKS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Arguments of a stock forward that exist for packed samples alone."""


def refuse_packed(columns: Mapping[str, Any], attention_mask: torch.Tensor | None = None) -> None:
    """Check that nothing says that a row holds several samples.

    Args:
        columns: what a row of a data set or a batch has, by name; `position_ids` are `[T]`, or `[B, T]` or `[1, T]`.
        attention_mask: `[B, T]` or `[B, past + T]`, 0 at pads, whose positions say nothing; `None`: there are none.

    Raises:
        ValueError: packed samples, with what says so.
    """
    given = [name for name, value in columns.items() if value is not None]
    marks = [name for name in given if name in MARKS or name.startswith("cu_seq")]
    if "seq_lengths" in given and torch.as_tensor(columns["seq_lengths"]).numel() > 1:
        marks.append("seq_lengths")
    if "position_ids" in given:
        steps = torch.as_tensor(columns["position_ids"]).diff(dim=-1)
        breaks = steps != 1
        if attention_mask is not None:
            real = attention_mask[:, -steps.shape[-1] - 1 :].to(steps.device) != 0
            breaks = breaks & real[:, 1:] & real[:, :-1]
        if bool(breaks.any()):
            marks.append(f"position_ids that {'restart' if bool((breaks & (steps < 1)).any()) else 'skip'}")
    if marks:
        raise ValueError(
            f"a row holds several packed samples (it has {', '.join(marks)}): one would remember the other. Turn "
            "packing off and give each sample a row of its own: pads never reach the memory"
        )
