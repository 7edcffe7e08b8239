"""Looking at the first rows of training data, before anything is trained on them."""

from collections.abc import Mapping
from typing import Any

import datasets
import torch
from transformers.utils import logging

from ..labels import IGNORED
from ..packing import refuse_packed
from .collator import SleepCollator

CHECKED_ROWS = 64
logger = logging.get_logger(__name__)


def check_rows(dataset: Any, collator: Any, model: Any) -> None:
    """Check the first rows of the training data, in which what the Trainer drops is still there.

    Args:
        dataset: to train on.
        collator: makes batches of it.
        model: to be trained.

    Raises:
        ValueError: rows that cannot be trained on.
    """
    rows = [row for row in first_rows(dataset) if isinstance(row, Mapping)]
    for row in rows:
        refuse_packed(row)
    warn_if_awake(rows, model)
    if not rows or not isinstance(collator, SleepCollator):
        return
    if not all("labels" in row for row in rows):
        raise ValueError(
            "train_dataset has rows without labels: add a labels column, "
            "for next-token loss on everything a copy of input_ids"
        )
    if bool((collator(rows)["labels"] == IGNORED).all()):
        raise ValueError(
            f"train_dataset: none of the first {len(rows)} rows has a label to train on. "
            f"Labels are those of input_ids at the same place, {IGNORED} for no loss; "
            "the first token of a row cannot be predicted"
        )


def warn_if_awake(rows: list[Any], model: Any) -> None:
    """Warn where no row is longer than a window: the model would train, and never learn to remember."""
    longest = max((len(row["input_ids"]) for row in rows if "input_ids" in row and "sleep_after" not in row), default=0)
    size = getattr(getattr(model.config, "sleep", None), "window_size", 0)
    if 0 < longest <= size:
        logger.warning(
            f"None of the first {len(rows)} training rows is longer than a window (window_size={size}, at most "
            f"{longest} tokens): the model does not sleep in them and learns to remember nothing. Make the window "
            "smaller, the rows longer, or mark where to sleep (sleep_after)"
        )


def first_rows(dataset: Any) -> list[Any]:
    """A few rows to look at, of a dataset that can be read again; none of one that cannot."""
    if isinstance(dataset, datasets.IterableDataset):
        return list(dataset.take(CHECKED_ROWS))
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return []
    return [dataset[i] for i in range(min(CHECKED_ROWS, len(dataset)))]
