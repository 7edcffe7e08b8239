"""Rows of different lengths to one batch, without touching what a row computes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..labels import IGNORED
from ..packing import refuse_packed

PADDING_SIDES = ("left", "right")


@dataclass
class SleepCollator:
    """Pads rows to one width.

    A sleeping model reads each row on its own, and its windows count real tokens. So the side and the amount of
    padding, and the token that pads are filled with, change no row's windows, loss or answers.

    Rows have `input_ids`, and may have `labels`, an `attention_mask` and `sleep_after` (0 or 1 for every token, 1 where
    the row sleeps after it, whatever its window holds). Other columns (`difficulty`, `answer`) are dropped. Labels that
    nothing predicts, at pads and at a row's first token, become `IGNORED`: the Trainer divides the loss by the number
    of labels, so they would count.

    Args:
        padding_side: `"left"` or `"right"`.
        pad_to_multiple_of: round the width up to a multiple of this many tokens.
        pad_token_id: what pads are filled with.

    Raises:
        ValueError: settings or rows that cannot work, packed samples among them.
    """

    padding_side: str = "right"
    pad_to_multiple_of: int = 1
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        if self.padding_side not in PADDING_SIDES:
            raise ValueError(f"SleepCollator.padding_side={self.padding_side!r}: it must be one of {PADDING_SIDES}")
        if not isinstance(self.pad_to_multiple_of, int) or self.pad_to_multiple_of < 1:
            raise ValueError(
                f"SleepCollator.pad_to_multiple_of={self.pad_to_multiple_of!r}: it must be an integer of at least 1"
            )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and, where the rows have them, `labels` and `sleep_after`: `[B, T]`, int64."""
        for row in rows:
            refuse_packed(row)
        if len({"labels" in row for row in rows}) > 1:
            raise ValueError(
                f"some rows of the batch have labels and some have none: label all, with {IGNORED} for no loss"
            )
        if len({"sleep_after" in row for row in rows}) > 1:
            raise ValueError(
                "some rows of the batch have sleep_after and some have none: give it to all, with 0 for no sleep"
            )
        longest = max(len(row["input_ids"]) for row in rows)
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        fills = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED, "sleep_after": 0}
        made = {"input_ids", "attention_mask"} | (fills.keys() & rows[0].keys())
        batch = {name: torch.full((len(rows), width), fill) for name, fill in fills.items() if name in made}
        for i, row in enumerate(rows):
            count = len(row["input_ids"])
            columns = slice(width - count, width) if self.padding_side == "left" else slice(count)
            batch["attention_mask"][i, columns] = 1
            for name in fills.keys() & row.keys():
                if len(row[name]) != count:
                    raise ValueError(f"a row has {count} input_ids and {len(row[name])} {name}: they must be as many")
                batch[name][i, columns] = torch.as_tensor(row[name])
        return without_unpredicted(batch)


def without_unpredicted(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch in which labels that nothing predicts, at pads and at a row's first token, are `IGNORED`."""
    if "labels" not in batch or batch.get("attention_mask") is None:
        return dict(batch)
    real = batch["attention_mask"] != 0
    return {**batch, "labels": batch["labels"].masked_fill(~real | (real.cumsum(1) == 1), IGNORED)}
